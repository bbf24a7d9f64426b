"""Concordance correlation coefficient for dimensional emotion, as an `evaluate` module.

Self-contained: `evaluate.load("<this folder>")` needs nothing of the package around it.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

MISSING_LABEL = -100.0

_DESCRIPTION = """
Concordance correlation coefficient (Lin 1989) with population moments, in float64 over the whole evaluation set, with
Pearson correlation, RMSE and MAE, for each label and as plain means over labels. With `conversation_ids`, intervals
from a bootstrap that resamples whole conversations: turns of one conversation are not independent, and intervals that
treat them so cover far less than they say.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: (turns,) or (turns, labels) numbers.
    references: same shape; -100 marks a missing label.
    label_names: a name for each label; default `label_0`, `label_1`, ...
    conversation_ids: one for each turn; with them intervals are computed.
    confidence_level: of the intervals, default 0.95.
    num_resamples: conversations are resampled this often, default 2000.
    seed: of the resampling.
Returns:
    `ccc`, `pearson`, `rmse`, `mae` (means over labels), the same with `_<label>`, `num_turns`; with conversation_ids
    also `num_conversations` and, of several, `ccc_low`, `ccc_high`, `ccc_<label>_low`, `ccc_<label>_high`.
Examples:
    >>> ccc = evaluate.load("modeling_mamba_ema/metrics/ccc")
    >>> ccc.compute(predictions=[0.1, 0.5, 0.9], references=[0.1, 0.5, 0.9])["ccc"]
    1.0
"""

_CITATION = """
@article{lin1989concordance,
  title={A Concordance Correlation Coefficient to Evaluate Reproducibility},
  author={Lin, Lawrence I-Kuei}, journal={Biometrics}, volume={45}, number={1}, pages={255--268}, year={1989}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CCC(evaluate.Metric):
    """The `ccc` metric; see the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        number, row = datasets.Value("float64"), datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": row, "references": row}),
                datasets.Features({"predictions": number, "references": number}),
            ],
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        label_names: Sequence[str] | None = None,
        conversation_ids: Sequence[Any] | None = None,
        confidence_level: float = 0.95,
        num_resamples: int = 2000,
        seed: int = 0,
    ) -> dict[str, float]:
        predicted, true = _as_tables(predictions, references)
        names = [f"label_{i}" for i in range(true.shape[1])] if label_names is None else list(label_names)
        if len(names) != true.shape[1]:
            raise ValueError(f"label_names has {len(names)} names, but there are {true.shape[1]} labels")
        by_label: dict[str, list[float]] = {"ccc": [], "pearson": [], "rmse": [], "mae": []}
        for column in range(true.shape[1]):
            given = true[:, column] != MISSING_LABEL
            y, t = predicted[given, column], true[given, column]
            if not given.any():
                raise ValueError(f"label {names[column]!r} is missing in all {len(true)} turns")
            by_label["ccc"].append(concordance_cc(y, t))
            by_label["pearson"].append(_pearson(y, t))
            by_label["rmse"].append(float(np.sqrt(np.mean((y - t) ** 2))))
            by_label["mae"].append(float(np.mean(np.abs(y - t))))
        results: dict[str, float] = {name: float(np.mean(values)) for name, values in by_label.items()}
        for name, values in by_label.items():
            results.update({f"{name}_{label}": value for label, value in zip(names, values)})
        results["num_turns"] = len(true)
        if conversation_ids is not None:
            low, high = bootstrap_intervals(
                predicted, true, conversation_ids, confidence_level, num_resamples, seed
            )  # (labels + 1,)
            for column, name in enumerate([f"ccc_{label}" for label in names] + ["ccc"]):
                if not np.isnan(low[column]):  # as of a single conversation
                    results[f"{name}_low"], results[f"{name}_high"] = float(low[column]), float(high[column])
            results["num_conversations"] = len(set(conversation_ids))
        return results


def concordance_cc(predictions: Any, references: Any) -> float:
    r"""CCC of two sequences: :math:`2\,cov(y,t) / (var(y) + var(t) + (\bar y - \bar t)^2)`, population moments.

    Returns:
        In [-1, 1]; 0 where one of them is constant; NaN with a warning for one turn, or for two equal constants, where
        0 / 0 says nothing.

    Raises:
        ValueError: no turns, different lengths, or values that are not finite.
    """
    y, t = (table[:, 0] for table in _as_tables(predictions, references))
    if y.size == 1:
        warnings.warn("CCC of a single turn is not defined: NaN", stacklevel=2)
        return float("nan")
    mean_y, mean_t = y.mean(), t.mean()
    denominator = y.var() + t.var() + (mean_y - mean_t) ** 2
    if denominator == 0:
        warnings.warn("CCC of predictions and references that are the same constant is not defined: NaN", stacklevel=2)
        return float("nan")
    return float(2 * np.mean((y - mean_y) * (t - mean_t)) / denominator)


def bootstrap_intervals(
    predictions: Any,
    references: Any,
    conversation_ids: Sequence[Any],
    confidence_level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of CCC by resampling conversations with replacement.

    Args:
        predictions, references: (turns, labels); -100 marks a missing reference.
        conversation_ids: one for each turn.

    Returns:
        low and high, (labels + 1,): each label, then the mean over labels. NaN with a single conversation, from which
        no spread can be told.
    """
    replicates = _bootstrap_ccc(predictions, references, conversation_ids, num_resamples, seed)
    return _percentiles(replicates, confidence_level)


def paired_bootstrap_difference(
    predictions_a: Any,
    predictions_b: Any,
    references: Any,
    conversation_ids: Sequence[Any],
    confidence_level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    folds: Sequence[Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of CCC(a) - CCC(b) when both models are measured on the same resampled conversations.

    Args:
        predictions_a, predictions_b: (turns, labels); or (runs, turns, labels), trainings that differ in their seed,
            run by run the same for a and b. Then the mean over runs is compared, and a resample draws runs too, so that
            the interval covers chance in training as well as in the conversations.
        references: (turns, labels); -100 marks a missing one.
        conversation_ids: one for each turn.
        folds: one for each turn; the CCC is computed within each fold and averaged over folds, and conversations are
            drawn within theirs.

    Returns:
        low and high, (labels + 1,); a difference whose interval excludes 0 is more than chance.

    Raises:
        ValueError: a and b have different shapes, or one that does not fit the references.
    """
    a, b = np.asarray(predictions_a, dtype=np.float64), np.asarray(predictions_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"predictions_a {a.shape} and predictions_b {b.shape} must have the same shape")
    if a.ndim < 3:
        a, b = a[None], b[None]
    true, conversations = np.asarray(references, dtype=np.float64), np.asarray(conversation_ids, dtype=str)
    fold_of = np.zeros(len(true)) if folds is None else np.asarray(folds, dtype=str)
    replicates = []
    for number, fold in enumerate(np.unique(fold_of)):
        own = fold_of == fold
        fold_seed: Any = seed if folds is None else [seed, number]
        differences = np.stack(
            [
                _bootstrap_ccc(run_a[own], true[own], conversations[own], num_resamples, fold_seed)
                - _bootstrap_ccc(run_b[own], true[own], conversations[own], num_resamples, fold_seed)
                for run_a, run_b in zip(a, b)
            ]
        )  # (runs, resamples, labels + 1)
        drawn = np.random.default_rng([seed, number, 1]).integers(len(a), size=(num_resamples, len(a)))
        replicates.append(differences[drawn, np.arange(num_resamples)[:, None]].mean(axis=1))
    return _percentiles(np.mean(replicates, axis=0), confidence_level)


def _bootstrap_ccc(
    predictions: Any, references: Any, conversation_ids: Sequence[Any], num_resamples: int, seed: Any
) -> np.ndarray:
    """(num_resamples, labels + 1) CCC of resampled sets of conversations."""
    predicted, true = _as_tables(predictions, references)
    if len(conversation_ids) != len(true):
        raise ValueError(f"conversation_ids has {len(conversation_ids)} values, but there are {len(true)} turns")
    # Numbered in the order of the rows, so that no interval depends on how conversations are called.
    _, first, group = np.unique(np.asarray(conversation_ids, dtype=str), return_index=True, return_inverse=True)
    group, num_groups = np.argsort(np.argsort(first))[group], len(first)
    if num_groups < 2:
        return np.full((num_resamples, true.shape[1] + 1), np.nan)
    # A resample's moments follow from sums over conversations; taken around the overall means they do not cancel.
    shifts, sums = [], np.zeros((num_groups, true.shape[1], 6))
    for column in range(true.shape[1]):
        given = true[:, column] != MISSING_LABEL
        mean_y, mean_t = predicted[given, column].mean(), true[given, column].mean()
        y, t = predicted[given, column] - mean_y, true[given, column] - mean_t
        np.add.at(sums[:, column], group[given], np.stack([np.ones_like(y), y, t, y * y, t * t, y * t], axis=1))
        shifts.append(mean_y - mean_t)
    random, flat = np.random.default_rng(seed), sums.reshape(num_groups, -1)
    drawn = np.empty((num_resamples, flat.shape[1]))
    for row in drawn:  # one by one: all of them at once would take memory for each conversation and resample
        row[:] = np.bincount(random.integers(num_groups, size=num_groups), minlength=num_groups) @ flat
    n, sy, st, syy, stt, syt = np.moveaxis(drawn.reshape(num_resamples, -1, 6), -1, 0)  # (resamples, labels) each
    with np.errstate(invalid="ignore", divide="ignore"):
        my, mt = sy / n, st / n
        spread = (syy / n - my**2) + (stt / n - mt**2) + (my - mt + np.array(shifts)) ** 2
        columns = 2 * (syt / n - my * mt) / spread
    return np.column_stack([columns, columns.mean(axis=1)])


def _percentiles(replicates: np.ndarray, confidence_level: float) -> tuple[np.ndarray, np.ndarray]:
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level is {confidence_level}, but must lie between 0 and 1")
    tail = (1 - confidence_level) / 2
    if np.isnan(replicates).all():
        return replicates[0], replicates[0]
    low, high = np.nanquantile(replicates, [tail, 1 - tail], axis=0)
    return low, high


def _pearson(y: np.ndarray, t: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant, NaN for a single turn."""
    if y.size < 2:
        return float("nan")
    spread = y.std() * t.std()
    return float(np.mean((y - y.mean()) * (t - t.mean())) / spread) if spread > 0 else 0.0


def _as_tables(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as (turns, labels) float64, checked."""
    y, t = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if y.shape != t.shape or y.ndim not in (1, 2):
        raise ValueError(f"predictions {y.shape} and references {t.shape} must have the same shape, 1-D or 2-D")
    if y.size == 0:
        raise ValueError("there are no turns to evaluate")
    for name, values in (("predictions", y), ("references", t)):
        bad = ~np.isfinite(values)
        if bad.any():
            first = int(np.argwhere(bad)[0][0])
            raise ValueError(f"{int(bad.sum())} of {values.size} {name} are NaN or infinite, the first at turn {first}")
    return y.reshape(len(y), -1), t.reshape(len(t), -1)
