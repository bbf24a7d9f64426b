"""Values with their intervals beside each other: of poolings, and of groups and conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from .style import COLOURS, GREY, SPEAKER_MARKERS

if TYPE_CHECKING:
    from ..comparison import PoolingResult


def plot_pooling_comparison(results: Sequence[PoolingResult], quantity: str, title: str = "") -> Figure:
    """CCC of each pooling, a point a seed, and beside it the difference to mean pooling with its interval.

    Args:
        quantity: which CCC: a label's name, or that of the mean.
    """
    settings = list(dict.fromkeys(result.setting for result in results))
    rows = max(sum(result.setting == setting for result in results) for setting in settings)
    figure = Figure(figsize=(10, 1.2 + (0.8 + 0.42 * rows) * len(settings)), layout="constrained")
    panels = figure.subplots(len(settings), 2, sharex="col", squeeze=False)
    figure.suptitle(title, fontsize=12)
    for setting, (values, differences) in zip(settings, panels):
        own = [result for result in results if result.setting == setting]
        heights = np.arange(len(own))[::-1]
        for height, result in zip(heights, own):
            seeds = result.by_seed[quantity]
            values.plot(seeds, [height] * len(seeds), "o", color=GREY, markersize=4, zorder=1)
            values.plot(result.ccc[quantity], height, "D", color=COLOURS[0], markersize=7, zorder=2)
            if result.difference is not None:
                difference = result.difference[quantity]
                colour = COLOURS[1] if difference.excludes_zero else "black"
                differences.plot(
                    [difference.corrected_low, difference.corrected_high], [height] * 2, color=GREY, linewidth=1
                )
                differences.plot([difference.low, difference.high], [height] * 2, color=colour, linewidth=2.5)
                differences.plot(difference.value, height, "D", color=colour, markersize=6)
        values.set_yticks(heights, [result.pooling for result in own])
        values.set_title(f"context {setting.replace('`', '')}", loc="left", fontsize=11)
        differences.set_yticks(heights, [""] * len(own))
        differences.axvline(0, color="black", linestyle=":", linewidth=1)
        for axes in (values, differences):
            axes.set_ylim(-0.6, len(own) - 0.4)
            axes.grid(axis="x", alpha=0.3)
    panels[-1][0].set_xlabel(f"{quantity}: seeds (grey) and their mean")
    panels[-1][1].set_xlabel("difference to mean pooling, 95 % (thin: all comparisons together)")
    return figure


def plot_by_row(rows: Mapping[str, Sequence[Mapping[str, Any]]], quantity: str, title: str, origin: bool) -> Figure:
    """A value with its interval for each row and label.

    Args:
        rows: by the row's name, a mapping for each label with `label`, and `low`, `high` and the quantity where known.
        title: of the axis.
        origin: draw a line at 0.
    """
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [cell["label"] for cell in next(iter(rows.values()))]
    for number, label in enumerate(labels):
        known = [(place, cells[number]) for place, cells in enumerate(rows.values()) if quantity in cells[number]]
        heights = [place + 0.25 * (number - (len(labels) - 1) / 2) for place, _ in known]
        colour, marker = COLOURS[number % len(COLOURS)], SPEAKER_MARKERS[number % len(SPEAKER_MARKERS)]
        axes.hlines(heights, [cell["low"] for _, cell in known], [cell["high"] for _, cell in known], color=colour)
        axes.plot([cell[quantity] for _, cell in known], heights, marker, color=colour, label=label, markersize=5)
    if origin:
        axes.axvline(0, color="black", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{title}, 95 % over conversations")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure
