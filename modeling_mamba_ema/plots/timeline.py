"""Emotion over a long recording, segment by segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from .style import COLOURS, GREY, STYLES

STEPS = (30, 60, 120, 300, 600, 1200, 1800, 3600)  # seconds between the marks of the time axis


def plot_timeline(segments: Sequence[Mapping[str, Any]], labels: Sequence[str], title: str = "") -> Figure:
    """Values of segments over the time of a recording; who speaks when stands below.

    Args:
        segments: one mapping a segment: `start` and `end` in seconds, each label's value on the unit scale (None or
            NaN: not scored), and if known `speaker`, and `low_level`, True for near silence (drawn pale).
        labels: names of the values to draw.
        title: above the picture.

    Raises:
        ValueError: no segments, an end that is not after its start, or a segment without one of the labels.
    """
    if not segments:
        raise ValueError("segments is empty; at least one segment is needed")
    for number, segment in enumerate(segments):
        missing = [name for name in ("start", "end", *labels) if name not in segment]
        if missing:
            raise ValueError(f"segment {number} lacks {missing}; it has {sorted(segment)}")
        if not segment["end"] > segment["start"] >= 0:
            raise ValueError(
                f"segment {number} runs from {segment['start']} s to {segment['end']} s; end must be later"
            )
    names = list(dict.fromkeys(str(segment["speaker"]) for segment in segments if segment.get("speaker") is not None))
    end = max(segment["end"] for segment in segments)

    figure = Figure(figsize=(11, 3.8 + 0.28 * len(names)), layout="constrained")
    rows = figure.subplots(
        1 + bool(names), 1, sharex=True, squeeze=False, height_ratios=[8, len(names)][: 1 + bool(names)]
    )
    axes = rows[0, 0]
    starts, ends = (np.array([segment[name] for segment in segments], dtype=float) for name in ("start", "end"))
    pale = np.array([bool(segment.get("low_level")) for segment in segments])
    order = np.argsort(starts, kind="stable")
    for index, label in enumerate(labels):
        colour = COLOURS[index % len(COLOURS)]
        values = np.array([np.nan if segment[label] is None else segment[label] for segment in segments], dtype=float)
        middles = (starts + ends)[order] / 2
        axes.plot(middles, values[order], STYLES[index % 3], color=colour, linewidth=1.2, alpha=0.7, label=label)
        for rows_drawn, alpha in ((~pale, 1.0), (pale, 0.3)):
            at = np.flatnonzero(rows_drawn & np.isfinite(values))
            axes.hlines(values[at], starts[at], ends[at], color=colour, linewidth=3, alpha=alpha)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("0 = low, 1 = high")
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=12)
    if names:
        _draw_speakers(rows[1, 0], segments, names)
    bottom = rows[-1, 0]
    bottom.set_xlim(0, end)
    if end < 180:
        bottom.set_xlabel("time (s)")
    else:
        bottom.set_xlabel("time (h:mm:ss)" if end >= 3600 else "time (min:s)")
        bottom.xaxis.set_major_locator(MultipleLocator(next((step for step in STEPS if end / step <= 12), end / 8)))
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _clock(seconds, end >= 3600)))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    return figure


def _draw_speakers(axes: Any, segments: Sequence[Mapping[str, Any]], names: list[str]) -> None:
    """A lane a speaker, filled while they speak; pale where they are near silence."""
    for lane, name in enumerate(names):
        own = [segment for segment in segments if str(segment.get("speaker")) == name]
        bars = [(segment["start"], segment["end"] - segment["start"]) for segment in own]
        colours = [GREY if segment.get("low_level") else "#333333" for segment in own]
        axes.broken_barh(bars, (lane - 0.35, 0.7), facecolors=colours)
    axes.set_yticks(range(len(names)), [name if len(name) <= 16 else f"{name[:15]}…" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(left=False)


def _clock(seconds: float, hours: bool) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
