"""How sure a model is: intervals by split-conformal calibration, what they hold, and risk against coverage.

Split-conformal prediction (Vovk et al. 2005; Lei et al. 2018) takes the quantile of absolute residuals on turns that
the model has not learned from as the reach of its intervals. It asks for exchangeable turns, which those of one
conversation are not; conversations are. Each conversation therefore counts as one, however many turns it has, and the
one to come counts as an infinite residual: with K conversations of n_k turns, the reach at level q is the smallest r
with

    sum_k 1 / ((K + 1) n_k) |{t : |y_kt - p_kt| <= r}| >= q

(Lee, Barber & Willett 2023, "Distribution-free inference with hierarchical data"; Dunn, Wasserman &
Ramdas 2022 for the setting). A turn drawn from a new conversation is then held with a probability of at least q, and of
at most q + 2 / (K + 1) where no two residuals are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..configuration_mamba_ema import NEUTRAL, MambaEMAConfig
from ..metrics import concordance_cc

logger = logging.getLogger(__name__)

LEVELS = (*(round(0.05 * step, 2) for step in range(1, 20)), 0.99)


def calibrate(config: MambaEMAConfig, table: pd.DataFrame) -> None:
    """Set `config.interval_radii` from predictions on conversations that the model has not learned from.

    Where there are too few conversations for `config.interval_level` (9 for 0.9), a warning is logged and the model has
    no intervals.

    Args:
        config: of the model.
        table: of [`prediction_table`], with references.
    """
    radii = {}
    for label, rows in _by_label(table, config.labels):
        residuals = (rows["reference"] - rows["prediction"]).abs()
        reach = {f"{level:g}": conformal_quantile(residuals, rows["conversation_id"], level) for level in LEVELS}
        radii[label] = {level: radius for level, radius in reach.items() if np.isfinite(radius)}
        count = rows["conversation_id"].nunique()
        if f"{config.interval_level:g}" not in radii[label]:
            logger.warning(
                "no intervals: %d conversations have a label for %s, too few for intervals that hold %g of all turns",
                *(count, label, config.interval_level),
            )
            config.interval_radii = None
            return
    config.interval_radii = radii


def conformal_quantile(residuals: Sequence[float], groups: Sequence[object], level: float) -> float:
    """The reach r above, infinite where the groups are too few for the level.

    Args:
        residuals: absolute residuals, (turns,).
        groups: the conversation of each turn, (turns,).
        level: share to hold, between 0 and 1.
    """
    _, group, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    values = np.asarray(residuals, dtype=np.float64)
    order = np.argsort(values)
    weights = 1 / ((len(counts) + 1) * counts[group])
    # A sum of shares may miss the level by its last digits.
    place = np.searchsorted(np.cumsum(weights[order]), level - 1e-12)
    return float(values[order[place]]) if place < len(values) else float("inf")


def add_intervals(table: pd.DataFrame, config: MambaEMAConfig) -> pd.DataFrame:
    """The table of [`prediction_table`] with `low` and `high` of each interval and the `confidence` (see
    `MambaEMAConfig.confidence`); as it is for a model without intervals."""
    if config.interval_radii is None:
        return table
    reach = table["label"].map(config.interval_radius).to_numpy(dtype=np.float64)
    ends = {"low": table["prediction"] - reach, "high": table["prediction"] + reach}
    if config.bounded_predictions:
        ends = {name: end.clip(0, 1) for name, end in ends.items()}
    confidence = [config.confidence(label, value) for label, value in zip(table["label"], table["prediction"])]
    return table.assign(**ends, confidence=confidence)


def coverage(table: pd.DataFrame, config: MambaEMAConfig) -> dict[str, float]:
    """Share of the labels that their intervals hold: the mean over conversations, which is what is promised.

    Args:
        table: of [`add_intervals`].

    Returns:
        `coverage_<label>` for each label that the table has references for; empty for a model without intervals.
    """
    if "low" not in table:
        return {}
    held = table["reference"].between(table["low"], table["high"])
    rows = table.assign(held=held)
    return {
        f"coverage_{label}": float(known.groupby("conversation_id")["held"].mean().mean())
        for label, known in _by_label(rows, config.labels)
        if len(known)
    }


def risk_against_coverage(table: pd.DataFrame, config: MambaEMAConfig) -> pd.DataFrame:
    """What is left, and how wrong it is, where only predictions of at least some confidence are kept.

    Args:
        table: of [`add_intervals`] for a model with intervals.

    Returns:
        A row a label and level: `label`, `min_confidence`, `kept` (share of the turns), `wrong_side` (share of the kept
        whose label lies on the other side of the middle), `mae` and `ccc` of the kept, on the unit scale; NaN where
        nothing is kept.
    """
    lines = []
    for label, rows in _by_label(table, config.labels):
        for level in (0.0, *LEVELS):
            kept = rows[rows["confidence"] >= level]
            if not len(kept):
                break
            predicted, reference = kept["prediction"], kept["reference"]
            lines.append(
                {
                    "label": label,
                    "min_confidence": level,
                    "kept": len(kept) / len(rows),
                    "wrong_side": float(((predicted - NEUTRAL) * (reference - NEUTRAL) < 0).mean()),
                    "mae": float((predicted - reference).abs().mean()),
                    "ccc": concordance_cc(predicted, reference) if len(kept) > 1 else float("nan"),
                }
            )
    return pd.DataFrame(lines)


def _by_label(table: pd.DataFrame, labels: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    known = table[table["reference"].notna()]
    return [(label, known[known["label"] == label]) for label in labels]
