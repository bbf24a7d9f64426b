"""How a model behaves: a value for each label, by group or by condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .style import COLOURS, SPEAKER_MARKERS


def plot_by_row(rows: Mapping[str, Sequence[Mapping[str, Any]]], quantity: str, title: str, origin: bool) -> Figure:
    """A value with its interval for each row and label.

    Args:
        rows: by the row's name, a mapping for each label with `label`, and `low`, `high` and the quantity where known.
        quantity: name of the value.
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
    axes.legend(fontsize=9)
    return figure
