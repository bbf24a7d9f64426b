"""Figures of a report: groups and the gaps between them, changes under a condition, correlations with the recording."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..ccc_loss import MISSING_LABEL
from ..feature_extraction_mamba_ema import SAMPLING_RATE
from ..metrics import bootstrap_intervals, concordance_cc, paired_bootstrap_difference

MOVED = 0.05  # on the unit scale
MIN_TURNS = 20  # of a group; smaller ones are counted, not measured
MOST_GROUPS = 8  # a column of numbers with more values is cut into thirds
PERMUTATIONS = 1_000
RECORDING = ("snr_db", "level_db", "seconds")
Rows = list[dict[str, Any]]  # one a label


def recording_facts(waveform: np.ndarray) -> dict[str, float]:
    """`snr_db`: how far the loud frames of 20 ms (95th percentile) lie over the quiet ones (5th), which is the
    signal-to-noise ratio where there are pauses; `level_db` of full scale; `seconds`."""
    size = SAMPLING_RATE // 50
    power = np.mean(waveform[: waveform.size // size * size].reshape(-1, size).astype(np.float64) ** 2, axis=1)
    low, high = np.percentile(10 * np.log10(power + 1e-10), [5, 95])
    level = 10 * np.log10(np.mean(np.square(waveform, dtype=np.float64)) + 1e-10)
    return {"snr_db": high - low, "level_db": float(level), "seconds": waveform.size / SAMPLING_RATE}


def measure(predictions: np.ndarray, references: np.ndarray, turns: pd.DataFrame, labels: Sequence[str]) -> Rows:
    """`turns`, and where there are at least `MIN_TURNS`, `ccc` with `low` and `high` (95 %, over conversations), `bias`
    (mean prediction minus mean label) and `spread` (ratio of the standard deviations).

    Args:
        predictions, references: (turns, labels) on the unit scale; -100 marks a missing label.
        turns: with `conversation_id`.
    """
    rows = []
    for column, label in enumerate(labels):
        given = references[:, column] != MISSING_LABEL
        y, t = predictions[given, column], references[given, column]
        row: dict[str, Any] = {"label": label, "turns": len(t)}
        if len(t) >= MIN_TURNS:
            low, high = bootstrap_intervals(y[:, None], t[:, None], turns["conversation_id"][given].tolist())
            row |= {"ccc": concordance_cc(y, t), "low": float(low[0]), "high": float(high[0])}
            row |= {"bias": float(y.mean() - t.mean()), "spread": float(y.std() / max(t.std(), 1e-9))}
        rows.append(row)
    return rows


def measure_groups(
    predictions: np.ndarray, references: np.ndarray, column: str, turns: pd.DataFrame, labels: Sequence[str]
) -> dict[str, Any]:
    """[`measure`] for each group of a column, and the gaps between the groups.

    Returns:
        `groups`, by name; `gaps`, one a label with two groups or more that are measured: `gap` between the largest and
        the smallest CCC, and `p`, the share of `PERMUTATIONS` of the groups with as large a gap. Permuted are speakers
        where each is in one group, else conversations where each is, else turns.
    """
    codes, names = _groups_of(turns[column])
    own = [codes == code for code in range(len(names))]
    groups = {str(n): measure(predictions[o], references[o], turns[o], labels) for n, o in zip(names, own)}
    unit = np.arange(len(turns))
    for name in ("conversation_id", "speaker"):
        if name in turns and turns[name].notna().all() and pd.Series(codes).groupby(turns[name]).nunique().max() == 1:
            unit = pd.factorize(turns[name])[0]
    first, generator, gaps = np.unique(unit, return_index=True)[1], np.random.default_rng(0), []
    for number, label in enumerate(labels):
        measured = [code for code, rows in enumerate(groups.values()) if "ccc" in rows[number]]
        if len(measured) > 1:
            given = references[:, number] != MISSING_LABEL
            y, t = predictions[given, number], references[given, number]
            gap = _gap(y, t, codes[given], measured)
            permuted = (generator.permutation(codes[first])[unit][given] for _ in range(PERMUTATIONS))
            larger = sum(_gap(y, t, groups_of, measured) >= gap for groups_of in permuted)
            gaps.append({"label": label, "gap": gap, "p": (1 + larger) / (1 + PERMUTATIONS)})
    return {"groups": groups, "gaps": gaps}


def _groups_of(values: pd.Series) -> tuple[np.ndarray, Sequence[Any]]:
    """The group of each turn, -1 where it has no value, and the groups' names: the column's own values as they come, or
    thirds of its numbers, the lowest first."""
    if not pd.api.types.is_numeric_dtype(values) or values.nunique() <= MOST_GROUPS:
        codes, names = pd.factorize(values)
        return codes, list(names)
    edges = [f"{edge:.3g}" for edge in values.quantile([0, 1 / 3, 2 / 3, 1])]
    names = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    thirds = pd.qcut(values.rank(method="first"), 3, labels=False).map(dict(enumerate(names)))
    ordered = pd.Categorical(thirds, categories=list(dict.fromkeys(names)))
    return ordered.codes, list(ordered.categories)


def _gap(y: np.ndarray, t: np.ndarray, codes: np.ndarray, measured: Sequence[int]) -> float:
    return float(np.ptp([concordance_cc(y[codes == code], t[codes == code]) for code in measured]))


def measure_changes(
    changed: np.ndarray, clean: np.ndarray, references: np.ndarray, turns: pd.DataFrame, labels: Sequence[str]
) -> Rows:
    """`ccc` under a condition, its `difference` to the clean one with a paired 95 % interval, the mean `shift` of
    values, and the share that `moved` by more than `MOVED`. Arguments as of [`measure`]."""
    rows = []
    for column, label in enumerate(labels):
        given = references[:, column] != MISSING_LABEL
        after, before, t = (values[given, column : column + 1] for values in (changed, clean, references))
        low, high = paired_bootstrap_difference(after, before, t, turns["conversation_id"][given].tolist())
        ccc, shifts = concordance_cc(after[:, 0], t[:, 0]), changed[:, column] - clean[:, column]
        row = {"label": label, "ccc": ccc, "difference": ccc - concordance_cc(before[:, 0], t[:, 0])}
        row |= {"low": float(low[0]), "high": float(high[0])}
        rows.append({**row, "shift": float(shifts.mean()), "moved": float(np.mean(np.abs(shifts) > MOVED))})
    return rows


def correlations(predictions: np.ndarray, references: np.ndarray, turns: pd.DataFrame, labels: Sequence[str]) -> Rows:
    """How labels, predictions and sizes of errors go with the recording: Pearson's r with `RECORDING`; with the
    speaker, the root of the variance that speakers' means explain beyond chance. Arguments as of [`measure`]."""
    rows = []
    for column, label in enumerate(labels):
        given = references[:, column] != MISSING_LABEL
        y, t = predictions[given, column], references[given, column]
        for quantity, values in (("label", t), ("prediction", y), ("error", np.abs(y - t))):
            row: dict[str, Any] = {"label": label, "of": quantity}
            for fact in RECORDING:
                measured = turns[fact][given]
                row[fact] = float(np.corrcoef(values, measured)[0, 1]) if measured.std() and values.std() else 0.0
            if "speaker" in turns:
                row["speaker"] = _explained(values, turns["speaker"][given].astype(str).to_numpy())
            rows.append(row)
    return rows


def _explained(values: np.ndarray, names: np.ndarray) -> float:
    """Root of epsilon squared (Kelley 1935): variance that groups explain, corrected for their number."""
    codes, groups = pd.factorize(names)
    if not 1 < len(groups) < len(values) or not values.std():
        return 0.0
    means = np.bincount(codes, values) / np.bincount(codes)
    within = np.sum((values - means[codes]) ** 2) / (len(values) - len(groups))
    return float(np.sqrt(max(1 - within / values.var(ddof=1), 0.0)))
