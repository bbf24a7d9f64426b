"""Poolings and contexts compared over seeds and folds: trainings, statistics, costs, and a page in words."""

from .report import write_comparison
from .runs import check_comparable, train_all
from .statistics import Cell, PoolingResult
