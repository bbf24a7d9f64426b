"""Poolings compared with mean pooling: means over seeds, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..ccc_loss import MISSING_LABEL
from ..metrics import concordance_cc, paired_bootstrap_difference

BASELINE = "mean"
MEAN = "mean CCC"  # beside the labels' names: the mean over labels, on which the verdict rests
CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Cell:
    """One training of the comparison."""

    pooling: str
    context: str
    seed: int
    fold: str | None = None

    @property
    def name(self) -> str:
        parts = [self.pooling, self.context, f"seed{self.seed}", *([] if self.fold is None else [self.fold])]
        return "-".join(parts)


@dataclass(frozen=True)
class Difference:
    """CCC of a pooling minus CCC of mean pooling, with its interval, and with the interval that holds for all
    comparisons together (Bonferroni)."""

    value: float
    low: float
    high: float
    corrected_low: float
    corrected_high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def excludes_zero_corrected(self) -> bool:
        return self.corrected_low > 0 or self.corrected_high < 0


@dataclass(frozen=True)
class PoolingResult:
    """One pooling in one context, over all seeds and folds; dicts by label, and `MEAN`.

    Attributes:
        ccc: (mean) over seeds and folds.
        std_over_seeds: of the means over folds; NaN for a single seed.
        std_over_folds: of the means over seeds; None without folds.
        by_seed: means over folds, one a seed.
        difference: to mean pooling; None for mean pooling itself.
    """

    pooling: str
    context: str
    ccc: dict[str, float]
    std_over_seeds: dict[str, float]
    std_over_folds: dict[str, float] | None
    by_seed: dict[str, list[float]]
    difference: dict[str, Difference] | None


@dataclass(frozen=True)
class _Runs:
    """Predictions (seeds, turns, labels) of one pooling in one context, folds one after the other, and their CCC."""

    predictions: np.ndarray
    references: np.ndarray
    conversations: np.ndarray
    folds: np.ndarray
    ccc: np.ndarray  # (seeds, folds, labels + 1)


def compare_poolings(tables: Mapping[Cell, pd.DataFrame], labels: Sequence[str]) -> list[PoolingResult]:
    """Results of every pooling and context.

    Args:
        tables: predictions of every cell, as `prediction_table` gives them; every pooling with the same contexts, seeds
            and folds, mean pooling among them.
        labels: names of the labels.

    Raises:
        ValueError: mean pooling or a cell is missing, or cells were measured on different turns.
    """
    poolings = list(dict.fromkeys(cell.pooling for cell in tables))
    contexts = list(dict.fromkeys(cell.context for cell in tables))
    if BASELINE not in poolings:
        raise ValueError(f"poolings are compared with {BASELINE!r}, which is not among {', '.join(poolings)}")
    comparisons = (len(poolings) - 1) * len(contexts)
    results = []
    for context in contexts:
        runs = {pooling: _gather(tables, pooling, context, labels) for pooling in poolings}
        for pooling in poolings:
            if not np.array_equal(runs[pooling].references, runs[BASELINE].references):
                raise ValueError(f"{pooling} and {BASELINE} were measured on different turns")
            results.append(_result(pooling, context, runs[pooling], runs[BASELINE], labels, comparisons))
    return results


def cell_ccc(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, float]:
    """CCC of each label and their mean for one cell's predictions."""
    values = {}
    for label in labels:
        rows = table[(table["label"] == label) & table["reference"].notna()]
        values[label] = concordance_cc(rows["prediction"], rows["reference"])
    return {**values, MEAN: float(np.mean(list(values.values())))}


def _gather(tables: Mapping[Cell, pd.DataFrame], pooling: str, context: str, labels: Sequence[str]) -> _Runs:
    cells = [cell for cell in tables if (cell.pooling, cell.context) == (pooling, context)]
    seeds, folds = (list(dict.fromkeys(values)) for values in zip(*((cell.seed, cell.fold) for cell in cells)))
    by_seed, references, conversations, fold_of, ccc = [], [], [], [], []
    for seed in seeds:
        parts = []
        for fold in folds:
            cell = Cell(pooling, context, seed, fold)
            if cell not in tables:
                raise ValueError(f"the comparison lacks {cell.name}")
            ccc.append(list(cell_ccc(tables[cell], labels).values()))
            wide = tables[cell].pivot(
                index=["conversation_id", "turn"], columns="label", values=["prediction", "reference"]
            )
            parts.append(wide["prediction"][list(labels)].to_numpy())
            if seed == seeds[0]:
                references.append(wide["reference"][list(labels)].fillna(MISSING_LABEL).to_numpy())
                conversations.append(wide.index.get_level_values("conversation_id").astype(str))
                fold_of.append(np.full(len(wide), str(fold)))
        by_seed.append(np.concatenate(parts))
    return _Runs(
        predictions=np.stack(by_seed),
        references=np.concatenate(references),
        conversations=np.concatenate(conversations),
        folds=np.concatenate(fold_of),
        ccc=np.array(ccc).reshape(len(seeds), len(folds), -1),
    )


def _result(
    pooling: str, context: str, runs: _Runs, baseline: _Runs, labels: Sequence[str], comparisons: int
) -> PoolingResult:
    names, difference = [*labels, MEAN], None
    if pooling != BASELINE:
        values = (runs.ccc - baseline.ccc).mean(axis=(0, 1))
        intervals = [
            paired_bootstrap_difference(
                runs.predictions,
                baseline.predictions,
                runs.references,
                list(runs.conversations),
                confidence_level=level,
                num_resamples=RESAMPLES,
                folds=list(runs.folds),
            )
            for level in (CONFIDENCE, 1 - (1 - CONFIDENCE) / comparisons)
        ]
        columns = np.stack([values, *(bound for interval in intervals for bound in interval)], axis=1)
        difference = {name: Difference(*map(float, row)) for name, row in zip(names, columns)}
    by_seed, by_fold = runs.ccc.mean(axis=1), runs.ccc.mean(axis=0)
    return PoolingResult(
        pooling=pooling,
        context=context,
        ccc=_named(names, runs.ccc.mean(axis=(0, 1))),
        std_over_seeds=_named(names, _std(by_seed)),
        std_over_folds=None if len(by_fold) == 1 else _named(names, _std(by_fold)),
        by_seed={name: by_seed[:, column].tolist() for column, name in enumerate(names)},
        difference=difference,
    )


def _std(values: np.ndarray) -> np.ndarray:
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values)}
