"""Results of a run, written into the model card beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .model_card import RESULTS_PLACEHOLDER


def write_results_into_card(
    card: str | Path, results: Mapping[str, Mapping[str, float]], labels: Sequence[str], source: str, command: str
) -> None:
    """Replace the card's placeholder by a table of what was measured.

    Args:
        card: README.md of the model's folder, as `save_pretrained` wrote it.
        results: metrics by split, with intervals, as the `ccc` metric gives them.
        labels: names of the labels.
        source: the corpus, as the configuration names it; only its last part is shown.
        command: what a reader runs to get these numbers.

    Raises:
        ValueError: the card has no placeholder, so it is not known where results go.
    """
    text = Path(card).read_text(encoding="utf-8")
    if RESULTS_PLACEHOLDER not in text:
        raise ValueError(f"{card} has no place for results; remove it, and save_pretrained writes a new one")
    header = f"| split | turns | conversations | {' | '.join(f'CCC {label}' for label in labels)} | mean CCC |"
    lines = [header, "|" + " --- |" * (len(labels) + 4)]
    for split, metrics in results.items():
        cells = [
            f"{metrics[name]:.3f} ({metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})"
            for name in [*(f"ccc_{label}" for label in labels), "ccc"]
        ]
        counts = f"{metrics['num_turns']:.0f} | {metrics['num_conversations']:.0f}"
        lines.append(f"| {split} | {counts} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    measured = (
        f"On `{Path(source).name}`, CCC with 95 % intervals by bootstrap over conversations; the validation split\n"
        f"chose the checkpoint. From `{command}`.\n\n{table}\n"
    )
    Path(card).write_text(text.replace(RESULTS_PLACEHOLDER, measured), encoding="utf-8")
