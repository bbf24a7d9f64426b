"""How training went, and how good the predictions are."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..metrics import concordance_cc
from .style import COLOURS, GREY, STYLES, unit_limits


def plot_learning_curve(
    log_history: Sequence[dict[str, Any]], labels: Sequence[str], best_step: int | None = None
) -> Figure:
    """Training loss and validation CCC over the epochs, from Trainer's `log_history`; the evaluation at `best_step` is
    marked."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    training = [entry for entry in log_history if "loss" in entry]
    evaluations = [entry for entry in log_history if "eval_ccc" in entry]

    def draw(entries: list[dict[str, Any]], name: str, *style: str, **options: Any) -> None:
        axes.plot([entry["epoch"] for entry in entries], [entry[name] for entry in entries], *style, **options)

    draw(training, "loss", ":", color=GREY, label="loss, training")
    for colour, label in zip(COLOURS, labels):
        draw(evaluations, f"eval_ccc_{label}", "o-", markersize=3, color=colour, label=f"CCC of {label}, validation")
    draw(evaluations, "eval_ccc", color="black", linewidth=2, label="mean CCC, validation")
    chosen = [entry for entry in evaluations if entry.get("step") == best_step]
    draw(chosen, "eval_ccc", "D", color="black", markersize=9, label="chosen")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("CCC, loss")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure


def plot_predictions(table: pd.DataFrame) -> Figure:
    """Predicted against true, one panel a label, with the identity line and the CCC; of a `prediction_table`."""
    labels = list(dict.fromkeys(table["label"]))
    figure = Figure(figsize=(4.2 * len(labels), 4.4), layout="constrained")
    for axes, colour, label in zip(np.atleast_1d(figure.subplots(1, len(labels))), COLOURS, labels):
        rows = table[(table["label"] == label) & table["reference"].notna()]
        axes.plot([0, 1], [0, 1], color="black", linewidth=1)
        axes.plot(rows["reference"], rows["prediction"], ".", color=colour, alpha=0.6)
        axes.set_xlabel(f"true {label}")
        axes.set_ylabel(f"predicted {label}")
        ccc = f"CCC {concordance_cc(rows['prediction'], rows['reference']):.3f}, " if len(rows) > 1 else ""
        axes.set_title(f"{label}: {ccc}{len(rows)} turns", fontsize=12)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(*unit_limits(rows["prediction"]))
        axes.set_aspect("equal")
        axes.grid(alpha=0.3)
    return figure


def plot_error_by_position(table: pd.DataFrame) -> Figure:
    """RMSE by the position of a turn in its conversation, with the number of turns behind each point; of a
    `prediction_table`."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    given = table[table["reference"].notna()]
    squared = given.assign(squared=(given["prediction"] - given["reference"]) ** 2)
    for colour, label in zip(COLOURS, dict.fromkeys(given["label"])):
        error = np.sqrt(squared[squared["label"] == label].groupby("position")["squared"].mean())
        axes.plot(error.index + 1, error, "o-", color=colour, label=f"RMSE of {label}")
    count = given[given["label"] == given["label"].iloc[0]].groupby("position").size()
    counts = axes.twinx()
    counts.bar(count.index + 1, count, color=GREY, alpha=0.25)
    counts.set_ylabel("turns at this position (bars)")
    axes.set_xlabel("position of the turn in its conversation")
    axes.set_ylabel("RMSE on the unit scale")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False)
    return figure


def plot_risk_against_coverage(table: pd.DataFrame) -> Figure:
    """How wrong the predictions are that are kept, over the share of turns that are kept; of
    `risk_against_coverage`."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = {"wrong_side": "share on the wrong side of the middle", "mae": "mean absolute error"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items()):
        for colour, style, (label, rows) in zip(COLOURS, itertools.cycle(STYLES), table.groupby("label", sort=False)):
            axes.plot(rows["kept"], rows[name], f"o{style}", markersize=3, color=colour, label=label)
        axes.set_xlabel("share of turns kept")
        axes.set_ylabel(title)
        axes.set_xlim(1.02, -0.02)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False)
    figure.suptitle("Errors of the turns that are kept, the surest first", fontsize=12)
    return figure
