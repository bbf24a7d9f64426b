"""How sure a model is: intervals by split-conformal calibration, what they hold, risk against coverage, and whether
errors grow with the predicted spread of the raters.

Split-conformal prediction (Vovk et al. 2005; Lei et al. 2018) takes the quantile of absolute residuals on turns that
the model has not learned from as the reach of its intervals. It asks for exchangeable turns, which those of one
conversation are not; conversations are. Each conversation therefore counts as one, however many turns it has, and the
one to come counts as an infinite residual: with K conversations of n_k turns, the reach at level q is the smallest r
with

    sum_k 1 / ((K + 1) n_k) |{t : |y_kt - p_kt| <= r}| >= q

(Lee, Barber & Willett 2023, "Distribution-free inference with hierarchical data"; Dunn, Wasserman &
Ramdas 2022 for the setting). A turn drawn from a new conversation is then held with a probability of at least q, and of
at most q + 2 / (K + 1) where no two residuals are equal.

Where the model predicts the spread s of the raters, residuals are |y - p| / max(s, 0.01), and r is a multiple of the
spread (Papadopoulos, Gammerman & Vovk 2008, "Normalized nonconformity measures for regression Conformal Prediction";
the locally weighted intervals of Lei et al. 2018). What is promised is the same, whatever the spread is worth: it is a
function of the turn, as the prediction is.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..ccc_loss import MIN_SPREAD
from ..configuration_mamba_ema import NEUTRAL, MambaEMAConfig
from . import bootstrap_intervals, concordance_cc

logger = logging.getLogger(__name__)

LEVELS = (*(round(0.05 * step, 2) for step in range(1, 20)), 0.99)
RESAMPLES = 1000


def calibrate(config: MambaEMAConfig, table: pd.DataFrame) -> None:
    """Set `config.interval_radii`, in multiples of the spread where the model predicts one (`config.scaled_intervals`),
    from predictions on conversations that the model has not learned from: a [`prediction_table`] with references.

    Where there are too few conversations for `config.interval_level` (9 for 0.9), a warning is logged and the model has
    no intervals.
    """
    radii, config.scaled_intervals = {}, config.predict_spread
    for label, rows in _by_label(table, config.labels):
        residuals = (rows["reference"] - rows["prediction"]).abs() / _units(rows, config)
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
    """The reach r above for absolute residuals (turns,), infinite where the groups are too few for the level.

    Args:
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
    reach = table["label"].map(config.interval_radius).to_numpy(dtype=np.float64) * _units(table, config)
    ends = {"low": table["prediction"] - reach, "high": table["prediction"] + reach}
    if config.bounded_predictions:
        ends = {name: end.clip(0, 1) for name, end in ends.items()}
    columns = [table["label"], table["prediction"], *([table["spread"]] if config.scaled_intervals else [])]
    confidence = [config.confidence(*row) for row in zip(*columns)]
    return table.assign(**ends, confidence=confidence)


def coverage(table: pd.DataFrame, config: MambaEMAConfig) -> dict[str, float]:
    """Share of the labels that their intervals hold: the mean over conversations, which is what is promised. For each
    label that the table of [`add_intervals`] has references for, `coverage_<label>`; empty for a model without
    intervals."""
    if "low" not in table:
        return {}
    held = table["reference"].between(table["low"], table["high"])
    rows = table.assign(held=held)
    return {
        f"coverage_{label}": float(known.groupby("conversation_id")["held"].mean().mean())
        for label, known in _by_label(rows, config.labels)
        if len(known)
    }


def spread_metrics(table: pd.DataFrame, config: MambaEMAConfig) -> dict[str, float]:
    """What the predicted spread of the raters in a [`prediction_table`] is worth.

    Returns:
        For each label with references `spread_ccc_<label>`, the CCC of predicted and real standard deviations, where
        the corpus has them, and `error_with_spread_<label>`, Spearman's rank correlation of absolute error and
        predicted spread: above 0, errors grow with it. Each with 95 % intervals over conversations (`_low`, `_high`),
        where there are several.
        Empty for a model without spread.
    """
    metrics: dict[str, float] = {}
    if "spread" not in table:
        return metrics
    for label, rows in _by_label(table, config.labels):
        rated = rows[rows["reference_spread"].notna()]
        if len(rated) > 1:
            spreads = rated[["spread"]].to_numpy(), rated[["reference_spread"]].to_numpy()
            (low, _), (high, _) = bootstrap_intervals(*spreads, rated["conversation_id"].tolist())
            metrics |= _with_ends(f"spread_ccc_{label}", concordance_cc(*spreads), low, high)
        if len(rows) > 1:
            errors = (rows["reference"] - rows["prediction"]).abs().to_numpy()
            metrics |= _with_ends(
                f"error_with_spread_{label}", *rank_correlation(errors, rows["spread"], rows["conversation_id"])
            )
    return metrics


def rank_correlation(
    first: Sequence[float], second: Sequence[float], groups: Sequence[object]
) -> tuple[float, float, float]:
    """Spearman's rank correlation of two (turns,), and the ends of its 95 % interval from a bootstrap that draws whole
    groups; a turn's group is its conversation."""
    pair = np.stack([np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)], axis=1)
    # Numbered in the order of the rows, so that no interval depends on how conversations are called.
    group, names = pd.factorize(np.asarray(groups))
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    random = np.random.default_rng(0)
    drawn = [
        _spearman(pair[np.concatenate([members[one] for one in random.integers(len(names), size=len(names))])])
        for _ in range(RESAMPLES if len(names) > 1 else 0)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if drawn else (np.nan, np.nan)
    return _spearman(pair), float(low), float(high)


def _spearman(pair: np.ndarray) -> float:
    """Pearson's correlation of the ranks of (turns, 2); ties share their mean rank; NaN where one side is constant."""
    ranks = pd.DataFrame(pair).rank()
    return float(ranks[0].corr(ranks[1]))


def _with_ends(name: str, value: float, low: float, high: float) -> dict[str, float]:
    ends = {} if np.isnan(low) else {f"{name}_low": float(low), f"{name}_high": float(high)}
    return {name: float(value), **ends}


def risk_against_coverage(table: pd.DataFrame, config: MambaEMAConfig) -> pd.DataFrame:
    """What is left of a table of [`add_intervals`], and how wrong it is, where only predictions of at least some
    confidence are kept.

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


def _units(rows: pd.DataFrame, config: MambaEMAConfig) -> Any:
    """What `interval_radii` are multiples of: the spread of each row, or 1."""
    return rows["spread"].clip(lower=MIN_SPREAD).to_numpy() if config.scaled_intervals else 1.0


def _by_label(table: pd.DataFrame, labels: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    known = table[table["reference"].notna()]
    return [(label, known[known["label"] == label]) for label in labels]
