"""Emotion over a long recording, segment by segment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator

from .style import COLOURS, GREY, SPEAKER_MARKERS, interval_patch, short_name, unit_limits

STEPS = (30, 60, 120, 300, 600, 1200, 1800, 3600)  # seconds between the marks of the time axis
MAX_PAUSE = 2.0  # seconds in which nobody speaks; over a longer pause no line is drawn


def plot_timeline(segments: Sequence[Mapping[str, Any]], labels: Sequence[str], title: str = "") -> Figure:
    """Values of segments over the time of a recording: a panel a label, a line a speaker; below it who speaks when.

    Where nobody speaks for more than 2 s, the lines have a gap.

    Args:
        segments: one mapping a segment: `start` and `end` in seconds, each label's value on the unit scale (None or
            NaN: not scored), and if known its interval as `<label>_low` and `<label>_high`, `speaker`, and `low_level`,
            True for near silence (drawn pale).

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
    segments = sorted(segments, key=lambda segment: (segment["start"], segment["end"]))
    speakers = [None if segment.get("speaker") is None else str(segment["speaker"]) for segment in segments]
    names = [name for name in dict.fromkeys(speakers) if name is not None]
    end = max(segment["end"] for segment in segments)
    # Segments without a speaker among those that have one get a line of their own, in grey.
    looks: dict[str | None, tuple[str, str]] = {None: (GREY if names else COLOURS[0], "")}
    for number, name in enumerate(names):
        looks[name] = COLOURS[number % len(COLOURS)], SPEAKER_MARKERS[number % len(SPEAKER_MARKERS)]

    figure = Figure(figsize=(11, 0.8 + 2.2 * len(labels) + 0.28 * len(names)), layout="constrained")
    heights = [8.0] * len(labels) + [float(len(names))] * bool(names)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    stretches = _stretches(segments)
    for axes, label in zip(panels, labels):
        for speaker, look in looks.items():
            own = [number for number, other in enumerate(speakers) if other == speaker]
            _draw_values(axes, [segments[number] for number in own], [stretches[number] for number in own], label, look)
        drawn = [segment.get(name) for segment in segments for name in (label, f"{label}_low", f"{label}_high")]
        axes.set_ylim(*unit_limits([np.nan if value is None else value for value in drawn]))
        axes.set_ylabel(f"{label}\n0 = low, 1 = high")
        axes.grid(alpha=0.3)
    panels[0].set_title(title, fontsize=12)
    if names:
        _draw_speakers(panels[-1], segments, speakers, looks)
    handles: list[Any] = [Line2D([], [], color=looks[n][0], marker=looks[n][1], label=short_name(n)) for n in names]
    if any(segment.get(f"{label}_low") is not None for segment in segments for label in labels):
        handles.append(interval_patch())
    if handles:
        panels[0].legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    bottom = panels[-1]
    bottom.set_xlim(0, end)
    if end < 180:
        bottom.set_xlabel("time (s)")
    else:
        bottom.set_xlabel("time (h:mm:ss)" if end >= 3600 else "time (min:s)")
        bottom.xaxis.set_major_locator(MultipleLocator(next((step for step in STEPS if end / step <= 12), end / 8)))
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _clock(seconds, end >= 3600)))
    return figure


def _stretches(segments: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each segment, in the order of their start, the number of its stretch: between stretches nobody speaks."""
    numbers: list[int] = []
    covered = segments[0]["end"]
    for segment in segments:
        pause = segment["start"] > covered + MAX_PAUSE
        numbers.append((numbers[-1] if numbers else 0) + pause)
        covered = max(covered, segment["end"])
    return numbers


def _draw_values(
    axes: Any, segments: Sequence[Mapping[str, Any]], stretches: Sequence[int], label: str, look: tuple[str, str]
) -> None:
    """One speaker's values: a bar a segment, and a line through their middles that ends where a stretch ends."""
    colour, marker = look
    starts, ends = (np.array([segment[name] for segment in segments], dtype=float) for name in ("start", "end"))
    values = np.array([np.nan if segment[label] is None else segment[label] for segment in segments], dtype=float)
    pale = np.array([bool(segment.get("low_level")) for segment in segments], dtype=bool)
    middles = (starts + ends) / 2
    for stretch in dict.fromkeys(stretches):
        at = np.array(stretches) == stretch
        axes.plot(middles[at], values[at], "-", color=colour, linewidth=1.2, alpha=0.6)
    for segment in segments:
        low, high = segment.get(f"{label}_low"), segment.get(f"{label}_high")
        if low is not None and high is not None:
            axes.fill_between([segment["start"], segment["end"]], low, high, color=colour, alpha=0.12, linewidth=0)
    for shown, alpha in ((~pale, 1.0), (pale, 0.3)):
        at = np.flatnonzero(shown & np.isfinite(values))
        axes.hlines(values[at], starts[at], ends[at], color=colour, linewidth=3, alpha=alpha)
        axes.plot(middles[at], values[at], marker=marker, color=colour, markersize=5, alpha=alpha, linestyle="none")


def _draw_speakers(
    axes: Any,
    segments: Sequence[Mapping[str, Any]],
    speakers: Sequence[str | None],
    looks: Mapping[str | None, tuple[str, str]],
) -> None:
    """A lane a speaker, filled while they speak; pale where they are near silence."""
    names = [name for name in looks if name is not None]
    for lane, name in enumerate(names):
        own = [segment for segment, speaker in zip(segments, speakers) if speaker == name]
        for segment in own:
            bar = [(segment["start"], segment["end"] - segment["start"])]
            alpha = 0.3 if segment.get("low_level") else 1.0
            axes.broken_barh(bar, (lane - 0.35, 0.7), facecolors=looks[name][0], alpha=alpha)
    axes.set_yticks(range(len(names)), [short_name(name, 16) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(left=False)


def _clock(seconds: float, hours: bool) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
