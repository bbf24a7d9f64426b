"""Poolings compared with mean pooling, and scopes of the context with that of the conversation: means over seeds, and
paired differences with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd

from ..ccc_loss import MISSING_LABEL
from ..metrics import concordance_cc, paired_bootstrap_difference

BASELINE, BASELINE_SCOPE = "mean", "conversation"
MEAN = "mean CCC"  # beside the labels' names: the mean over labels, on which the verdict rests
CONFIDENCE = 0.95
RESAMPLES = 2000
Kind: TypeAlias = tuple[str, str, str]  # of training: pooling, context, scope


@dataclass(frozen=True)
class Cell:
    """One training of the comparison."""

    pooling: str
    context: str
    seed: int
    fold: str | None = None
    scope: str = BASELINE_SCOPE

    @property
    def name(self) -> str:
        scope = [] if self.scope == BASELINE_SCOPE else [self.scope]
        fold = [] if self.fold is None else [self.fold]
        return "-".join([self.pooling, self.context, *scope, f"seed{self.seed}", *fold])


@dataclass(frozen=True)
class Difference:
    """CCC minus that of mean pooling, or of the conversation's scope, with its interval, and with the interval that
    holds for all comparisons together (Bonferroni)."""

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
    """One pooling with one context and scope, over all seeds and folds; dicts by label, and `MEAN`.

    Attributes:
        ccc: (mean) over seeds and folds.
        std_over_seeds: of the means over folds; NaN for a single seed.
        std_over_folds: of the means over seeds; None without folds.
        by_seed: means over folds, one a seed.
        difference: to mean pooling; None for mean pooling itself, and where it is not compared.
        scope_difference: to the conversation's scope with the same pooling and context; None likewise.
    """

    pooling: str
    context: str
    ccc: dict[str, float]
    std_over_seeds: dict[str, float]
    std_over_folds: dict[str, float] | None
    by_seed: dict[str, list[float]]
    difference: dict[str, Difference] | None
    scope: str = BASELINE_SCOPE
    scope_difference: dict[str, Difference] | None = None

    @property
    def setting(self) -> str:
        """Context and scope, as the page has them."""
        return f"`{self.context}`" + ("" if self.scope == BASELINE_SCOPE else f" of the scope `{self.scope}`")


@dataclass(frozen=True)
class _Runs:
    """Predictions (seeds, turns, labels) with one pooling, context and scope, folds one after the other; their CCC."""

    predictions: np.ndarray
    references: np.ndarray
    conversations: np.ndarray
    folds: np.ndarray
    ccc: np.ndarray  # (seeds, folds, labels + 1)


def compare_poolings(tables: Mapping[Cell, pd.DataFrame], labels: Sequence[str]) -> list[PoolingResult]:
    """Results of every pooling, context and scope, from the predictions of every cell, as `prediction_table` gives
    them; every pooling has the same contexts, scopes, seeds and folds.

    Raises:
        ValueError: of several poolings none is mean pooling, a cell is missing, or cells were measured on different
            turns.
    """
    poolings = list(dict.fromkeys(cell.pooling for cell in tables))
    settings = list(dict.fromkeys((cell.context, cell.scope) for cell in tables))
    if BASELINE not in poolings and (len(poolings) > 1 or len({scope for _, scope in settings}) == 1):
        raise ValueError(f"poolings are compared with {BASELINE!r}, which is not among {', '.join(poolings)}")
    runs = {
        kind: _gather(tables, kind, labels)
        for kind in ((pooling, *setting) for setting in settings for pooling in poolings)
    }
    first = next(iter(runs))
    for kind, others in runs.items():
        if not np.array_equal(others.references, runs[first].references):
            raise ValueError(f"{'-'.join(kind)} and {'-'.join(first)} were measured on different turns")
    to_mean = {kind: (BASELINE, *kind[1:]) for kind in runs if kind[0] != BASELINE and BASELINE in poolings}
    to_conversation = {kind: (*kind[:2], BASELINE_SCOPE) for kind in runs if kind[2] != BASELINE_SCOPE}
    to_conversation = {kind: baseline for kind, baseline in to_conversation.items() if baseline in runs}
    count = len(to_mean) + len(to_conversation)
    results = []
    for kind, own in runs.items():
        differences = [
            _difference(own, runs[baselines[kind]], labels, count) if kind in baselines else None
            for baselines in (to_mean, to_conversation)
        ]
        results.append(_result(kind, own, labels, *differences))
    return results


def cell_ccc(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, float]:
    """CCC of each label and their mean for one cell's predictions."""
    values = {}
    for label in labels:
        rows = table[(table["label"] == label) & table["reference"].notna()]
        values[label] = concordance_cc(rows["prediction"], rows["reference"])
    return {**values, MEAN: float(np.mean(list(values.values())))}


def _gather(tables: Mapping[Cell, pd.DataFrame], kind: Kind, labels: Sequence[str]) -> _Runs:
    pooling, context, scope = kind
    cells = [cell for cell in tables if (cell.pooling, cell.context, cell.scope) == kind]
    seeds, folds = (list(dict.fromkeys(values)) for values in zip(*((cell.seed, cell.fold) for cell in cells)))
    by_seed, references, conversations, fold_of, ccc = [], [], [], [], []
    for seed in seeds:
        parts = []
        for fold in folds:
            cell = Cell(pooling, context, seed, fold, scope)
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


def _difference(runs: _Runs, baseline: _Runs, labels: Sequence[str], comparisons: int) -> dict[str, Difference]:
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
    return {name: Difference(*map(float, row)) for name, row in zip([*labels, MEAN], columns)}


def _result(
    kind: Kind,
    runs: _Runs,
    labels: Sequence[str],
    difference: dict[str, Difference] | None,
    scope_difference: dict[str, Difference] | None,
) -> PoolingResult:
    names, (pooling, context, scope) = [*labels, MEAN], kind
    by_seed, by_fold = runs.ccc.mean(axis=1), runs.ccc.mean(axis=0)
    return PoolingResult(
        pooling=pooling,
        context=context,
        ccc=_named(names, runs.ccc.mean(axis=(0, 1))),
        std_over_seeds=_named(names, _std(by_seed)),
        std_over_folds=None if len(by_fold) == 1 else _named(names, _std(by_fold)),
        by_seed={name: by_seed[:, column].tolist() for column, name in enumerate(names)},
        difference=difference,
        scope=scope,
        scope_difference=scope_difference,
    )


def _std(values: np.ndarray) -> np.ndarray:
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values)}
