"""The path of emotion over a conversation: over the turns, and on the plane of valence and arousal.

The functions take predictions on the unit scale as arrays and return a matplotlib `Figure`; `write_picture` writes it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from .style import COLOURS, GREY, SPEAKER_MARKERS, as_array, interval_patch, short_name, unit_limits

# Words of the four corners, after the circumplex of Russell 1980: (valence, arousal), word.
CORNERS = (
    ((0.0, 1.04), "angry, afraid"),
    ((1.0, 1.04), "excited, happy"),
    ((0.0, -0.04), "sad, bored"),
    ((1.0, -0.04), "calm, content"),
)


def plot_trajectory(
    predictions: Mapping[str, Any],
    speakers: Sequence[str] | None = None,
    references: Mapping[str, Any] | None = None,
    title: str = "",
    intervals: Mapping[str, Any] | None = None,
) -> Figure:
    """Predicted emotion over the turns of a conversation, one panel a label.

    Args:
        predictions: for each label (turns,) on the unit scale; NaN leaves a gap.
        speakers: one name a turn; each speaker gets a colour, a marker and a line.
        references: true values of some labels, drawn dashed.
        intervals: for some labels (turns, 2), lower and upper ends, drawn as bars.

    Raises:
        ValueError: no labels, or not one value and one speaker a turn.
    """
    if not predictions:
        raise ValueError("predictions holds no labels; give for each label one value a turn")
    rows = {label: as_array(values, label, 1) for label, values in predictions.items()}
    truth = {label: as_array(values, f"reference of {label}", 1) for label, values in (references or {}).items()}
    count = len(next(iter(rows.values())))
    ends = {label: as_array(values, f"interval of {label}", 2) for label, values in (intervals or {}).items()}
    for label, values in [*rows.items(), *truth.items(), *ends.items()]:
        _check_turns(values, count, label)
    names = _speaker_names(speakers, count)

    figure = Figure(figsize=(9, 1.0 + 2.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    turns = np.arange(1, count + 1)
    for axes, (label, values) in zip(panels, rows.items()):
        for colour, marker, name in _looks(names or [""]):
            own = [turn for turn in range(count) if not names or (speakers or [])[turn] == name]
            shown = short_name(name) or "prediction"
            axes.plot(turns[own], values[own], f"-{marker}", color=colour, linewidth=2, markersize=7, label=shown)
            if label in ends:
                axes.vlines(turns[own], *ends[label][own].T, color=colour, linewidth=5, alpha=0.2)
        if label in truth:
            axes.plot(turns, truth[label], "--", color="black", linewidth=1.2, label="label of the corpus")
        axes.set_ylabel(f"{label}\n0 = low, 1 = high")
        axes.set_ylim(*unit_limits(values, truth.get(label, []), ends.get(label, [])))
        axes.grid(alpha=0.3)
    most = max(panels, key=lambda axes: len(axes.get_lines()))  # not every label may have that of the corpus
    handles = [*most.get_legend_handles_labels()[0], *([interval_patch()] if ends else [])]
    if names or truth or ends:
        figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False)
    panels[0].set_title(title, fontsize=12)
    panels[-1].set_xlabel("turn")
    panels[-1].set_xticks(turns[:: 1 + (count - 1) // 20])
    panels[-1].set_xlim(0.5, count + 0.5)
    return figure


def plot_circumplex(valence: Any, arousal: Any, speakers: Sequence[str] | None = None, title: str = "") -> Figure:
    """The path of each speaker on the plane of valence and arousal (the circumplex of Russell 1980).

    Both are (turns,) on the unit scale, 0.5 is neutral, with one speaker a turn; each gets a colour, a marker and a
    path.

    Raises:
        ValueError: not one valence, one arousal and one speaker a turn.
    """
    valence, arousal = as_array(valence, "valence", 1), as_array(arousal, "arousal", 1)
    _check_turns(arousal, len(valence), "arousal")
    names = _speaker_names(speakers, len(valence)) or [""]
    halo = [withStroke(linewidth=2.5, foreground="white")]  # a number stays readable on an arrow
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0.5, color=GREY, linewidth=1)
    axes.axvline(0.5, color=GREY, linewidth=1)
    for (x, y), word in CORNERS:
        axes.text(x, y, word, color="#666666", ha="left" if x < 0.5 else "right", va="center", style="italic")
    for colour, marker, name in _looks(names):
        own = [turn for turn in range(len(valence)) if name == "" or (speakers or [])[turn] == name]
        x, y = valence[own], arousal[own]
        axes.plot(x, y, marker, color=colour, markersize=8, label=short_name(name) or None, zorder=3)
        for start in range(len(own) - 1):
            axes.annotate(
                "",
                xy=(x[start + 1], y[start + 1]),
                xytext=(x[start], y[start]),
                arrowprops={"arrowstyle": "-|>", "color": colour, "alpha": 0.6, "shrinkA": 5, "shrinkB": 6},
            )
        # Numbers only where a reader can still tell them apart.
        if len(valence) <= 30:
            for turn, px, py in zip(own, x, y):
                axes.annotate(
                    str(turn + 1), (px, py), xytext=(6, 5), textcoords="offset points", fontsize=9, path_effects=halo
                )
    axes.set_xlabel("valence: unpleasant to pleasant")
    axes.set_ylabel("arousal: calm to excited")
    axes.set_xlim(*unit_limits(valence, margin=0.08))
    axes.set_ylim(*unit_limits(arousal, margin=0.08))
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=12)
    if names != [""]:
        figure.legend(loc="outside lower center", ncols=min(len(names), 4), fontsize=9, frameon=False)
    return figure


def _check_turns(values: np.ndarray, count: int, name: str) -> None:
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} turns, but {count} are predicted; give one value a turn")


def _speaker_names(speakers: Sequence[str] | None, count: int) -> list[str]:
    """The speakers in the order in which they first speak."""
    if speakers is not None and len(speakers) != count:
        raise ValueError(f"speakers has {len(speakers)} names for {count} turns; give one name a turn")
    return list(dict.fromkeys(speakers or []))


def _looks(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(colour, marker, name) of each speaker."""
    return list(zip(itertools.cycle(COLOURS), itertools.cycle(SPEAKER_MARKERS), names))
