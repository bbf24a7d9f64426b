"""Poolings and contexts compared over seeds and folds: trainings, statistics, costs, and a page in words."""

from .report import Measured, comparison_page, verdict, write_comparison
from .runs import Trainings, check_comparable, train_all
from .statistics import MEAN, Cell, Difference, PoolingResult, compare_poolings

__all__ = [
    "MEAN",
    "Cell",
    "Difference",
    "Measured",
    "PoolingResult",
    "Trainings",
    "check_comparable",
    "compare_poolings",
    "comparison_page",
    "train_all",
    "verdict",
    "write_comparison",
]
