"""A comparison of poolings and scopes as a markdown page: tables, and the verdict in words."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.markdown_table import markdown_table
from ..data.text_files import json_text
from ..data.utterances import seconds_of
from ..plots import plot_pooling_comparison, write_picture
from .costs import Cost, encoder_cost, pooling_costs
from .runs import Trainings
from .statistics import BASELINE, BASELINE_SCOPE, MEAN, Difference, PoolingResult, cell_ccc, compare_poolings

# Below this, intervals over conversations are known to be too narrow: in simulations with 40 turns each, 95 % intervals
# held the truth 88 times of 100 with 8 conversations, 91 times with 30, and 95 times with 60.
FEW_CONVERSATIONS = 30
FEW_SPEAKERS = 20
ENCODER = "encoder"  # among the names of poolings


@dataclass(frozen=True)
class Measured:
    """What the poolings were measured on."""

    split: str
    chose_the_epoch: bool  # whether the split also chose each training's best epoch
    turns: int
    conversations: int
    speakers: int | None  # None where the corpus names none
    seeds: int
    folds: int  # 1 where there are none


def write_comparison(output: Path, trainings: Trainings, split: str, chose_the_epoch: bool, command: str) -> str:
    """Write comparison.md, .json, .csv (a row a training), .png and .svg; returns the page.

    Args:
        split: that the trainings predicted.
        chose_the_epoch: whether the split also chose each training's best epoch.
        command: what a reader runs to get the page.

    Raises:
        ValueError: see [`compare_poolings`].
    """
    config, tables = trainings.model.config, trainings.tables
    results = compare_poolings(tables, config.labels)
    rows = [splits[split] for splits in trainings.folds.values()]
    named = all("speaker" in part.column_names for part in rows)
    measured = Measured(
        split=split,
        chose_the_epoch=chose_the_epoch,
        turns=sum(map(len, rows)),
        conversations=sum(len(set(part["conversation_id"])) for part in rows),
        speakers=len({speaker for part in rows for speaker in part["speaker"]}) if named else None,
        seeds=len({cell.seed for cell in tables}),
        folds=len(rows),
    )
    seconds = float(np.median([seconds for part in rows for seconds in seconds_of(part)]))
    costs = pooling_costs(config, list(dict.fromkeys(result.pooling for result in results)), seconds)
    costs[ENCODER] = encoder_cost(trainings.model, seconds)
    page = comparison_page(results, costs, measured, seconds, command)
    everything = {
        "command": command,
        "measured": dataclasses.asdict(measured),
        "verdict": verdict(results, measured),
        "results": [dataclasses.asdict(result) for result in results],
        "utterance_seconds": seconds,
        "costs": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
    }
    (output / "comparison.md").write_text(page, encoding="utf-8")
    (output / "comparison.json").write_text(json_text(everything) + "\n", encoding="utf-8")
    lines = [{**dataclasses.asdict(cell), **cell_ccc(table, config.labels)} for cell, table in tables.items()]
    pd.DataFrame.from_records(lines).to_csv(output / "comparison.csv", index=False)
    title = f"{split}: {measured.conversations} conversations, {measured.seeds} seed{'s' * (measured.seeds != 1)}"
    write_picture(plot_pooling_comparison(results, MEAN, title), output / "comparison")
    return page


def verdict(results: Sequence[PoolingResult], measured: Measured) -> list[str]:
    """One sentence a context, then what the reader must know to trust them."""
    sentences = []
    for setting in dict.fromkeys(result.setting for result in results if result.difference is not None):
        own = {f"`{r.pooling}`": r.difference[MEAN] for r in results if r.setting == setting and r.difference}
        sentences.append(_sentence(f"With context {setting}", own, "mean pooling"))
    for pooling, context in dict.fromkeys((r.pooling, r.context) for r in results if r.scope_difference is not None):
        own = {
            f"`{r.scope}`": r.scope_difference[MEAN]
            for r in results
            if (r.pooling, r.context) == (pooling, context) and r.scope_difference is not None
        }
        with_ = f"With pooling `{pooling}` and context `{context}`"
        sentences.append(_sentence(with_, own, f"the scope `{BASELINE_SCOPE}`"))
    differences = [d[MEAN] for r in results for d in (r.difference, r.scope_difference) if d is not None]
    held, count = sum(difference.excludes_zero_corrected for difference in differences), len(differences)
    if count > 1:
        sentences.append(
            f"These are {count} comparisons, of which {0.05 * count:.2g} would exclude zero by chance if nothing "
            f"differed. After Bonferroni's correction {held} of {count} still {'does' if held == 1 else 'do'}."
        )
    return sentences + _caveats(measured)


def comparison_page(
    results: Sequence[PoolingResult], costs: Mapping[str, Cost], measured: Measured, seconds: float, command: str
) -> str:
    """The page; `costs` of the poolings, and of the encoder under `ENCODER`, are those of an utterance of `seconds`."""
    labels = list(results[0].ccc)
    titles = [name if name == MEAN else f"CCC {name}" for name in labels]
    sentences = [f"- {sentence}" for sentence in verdict(results, measured)]
    # To what each is compared; only one of the two where only poolings or only scopes are.
    columns = {"difference": "minus mean pooling", "scope_difference": f"minus scope `{BASELINE_SCOPE}`"}
    columns = {name: title for name, title in columns.items() if any(getattr(result, name) for result in results)}
    title = "Poolings" if "difference" in columns else "Scopes"
    lines = [f"# {title} compared", "", f"From `{command}`.", "", *sentences, ""]
    for setting in dict.fromkeys(result.setting for result in results):
        rows = []
        for result in (result for result in results if result.setting == setting):
            shown = [getattr(result, name) for name in columns]
            cells = ["" if difference is None else _signed(difference[MEAN]) for difference in shown]
            rows.append([f"`{result.pooling}`", *(_with_spread(result, name) for name in labels), *cells])
        lines += [f"## context {setting}", "", markdown_table(["pooling", *titles, *columns.values()], rows), ""]
    spread = "over seeds" if measured.folds == 1 else "over seeds, then over folds"
    lines += [f"Mean ± standard deviation {spread}; in brackets 95 % intervals of the difference in {MEAN}.", ""]
    return "\n".join([*lines, *_cost_table(costs, seconds), ""])


def _sentence(begin: str, differences: Mapping[str, Difference], baseline: str) -> str:
    clear = [_about(name, difference, baseline) for name, difference in differences.items() if difference.excludes_zero]
    unclear = [f"{name} {_interval(other)}" for name, other in differences.items() if not other.excludes_zero]
    sentence = f"{begin}, {'; '.join(clear) or f'no difference to {baseline} excludes zero'}."
    return sentence + (f" Not distinguishable from {baseline}: {', '.join(unclear)}." if unclear else "")


def _about(name: str, difference: Difference, baseline: str) -> str:
    word = "better" if difference.value > 0 else "worse"
    return f"{name} is {word} than {baseline} by {abs(difference.value):.3f} {_interval(difference)}"


def _interval(difference: Difference) -> str:
    return f"({difference.low:+.3f} to {difference.high:+.3f})"


def _caveats(measured: Measured) -> list[str]:
    runs = f"{measured.seeds} seed{'s' * (measured.seeds != 1)}"
    if measured.folds > 1:
        runs += f" and {measured.folds} folds"
    who = "speakers the corpus does not name" if measured.speakers is None else f"{measured.speakers} speakers"
    caveats = [
        f"Measured on `{measured.split}`: {measured.turns} turns in {measured.conversations} conversations of {who}, "
        f"with {runs} each. Intervals draw conversations"
        + (" and seeds anew." if measured.seeds > 1 else " anew; with one seed, chance in training is not in them.")
        + " What is not distinguishable is not shown to be equal."
    ]
    if measured.chose_the_epoch:
        caveats.append("This split also chose each training's best epoch: its CCC is too high for every pooling.")
    if measured.conversations < FEW_CONVERSATIONS:
        caveats.append(f"With only {measured.conversations} conversations, the intervals are too narrow.")
    if measured.speakers is not None and measured.speakers < FEW_SPEAKERS:
        caveats.append(f"What holds for {measured.speakers} speakers need not hold for others.")
    return caveats


def _with_spread(result: PoolingResult, name: str) -> str:
    text = f"{result.ccc[name]:.3f}"
    spreads = [result.std_over_seeds[name]] + ([] if result.std_over_folds is None else [result.std_over_folds[name]])
    return text + "".join(f" ± {spread:.3f}" for spread in spreads if not math.isnan(spread))


def _signed(difference: Difference) -> str:
    text = f"{difference.value:+.3f} {_interval(difference)}"
    return f"**{text}**" if difference.excludes_zero else text


def _cost_table(costs: Mapping[str, Cost], seconds: float) -> list[str]:
    more = "more than mean, share of WavLM's"
    rows = []
    base, encoder = costs.get(BASELINE, next(iter(costs.values()))), costs[ENCODER]
    for pooling, cost in costs.items():
        if pooling != ENCODER:
            flops = (cost.flops - base.flops) / encoder.flops
            time = (cost.milliseconds - base.milliseconds) / encoder.milliseconds
            cells = [f"`{pooling}`", f"{cost.parameters:,}", f"{cost.flops / 1e6:.2f}", f"{flops:.4%}"]
            rows.append([*cells, f"{cost.milliseconds:.3f}", f"{time:.2%}"])
    return [
        f"## cost of an utterance of {seconds:.1f} s",
        "",
        markdown_table(["pooling", "parameters", "MFLOPs", more, "ms", more], rows),
        "",
        f"WavLM itself: {encoder.flops / 1e9:.2f} GFLOPs, {encoder.milliseconds:.1f} ms. FLOPs of a pooling include "
        "the projection of its vector; times are medians on this machine.",
    ]
