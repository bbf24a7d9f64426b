"""What the numbers say in words, and silence where they do not say it.

A value is put into words where its interval (`outputs.intervals`) does not hold 0.5, the middle of the scale; valence
and arousal make the quadrants of the circumplex (Russell 1980). A trend is the slope of a least-squares line over a
speaker's last turns, put into words where its 99 % interval (Student's t) does not hold 0. A change point is where the
mean of a speaker's values shifts: the best split into two, again in each part (binary segmentation, Scott & Knott
1974), kept where a permutation test finds a split as good in fewer than 1 % of 999 orders of the turns (as Matteson &
James 2014 do). Neighbouring turns are alike, so that these last two speak somewhat too readily: they show where to
listen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..configuration_mamba_ema import NEUTRAL
from ..publishing.model_card import ENDS_OF_SCALE

if TYPE_CHECKING:
    from .tracker import TurnEmotion

TREND_TURNS = 8  # of the same speaker
# Student's t for 99 %, two-sided, by degrees of freedom: turns minus 2.
_T99 = {3: 5.841, 4: 4.604, 5: 4.032, 6: 3.707}
MIN_SEGMENT = 3  # turns on either side of a change point
PERMUTATIONS, SIGNIFICANCE = 999, 0.01
MAX_PERMUTED = 100_000  # values in memory at once: a recording of hours has thousands of turns

STRINGS = {
    "and": " and ",
    "quadrant": "{words}, {distance:.2f} from neutral",
    "rising": "{label} rising by {slope:.3f} a turn ({low:.3f} to {high:.3f})",
    "falling": "{label} falling by {slope:.3f} a turn ({low:.3f} to {high:.3f})",
    "speaker": "{name} ({turns} turn{plural}, {seconds:.0f} s): {means} on average",
    "nobody": "Speakers without a name",
    "mean": "{label} {value:.2f}",
    "sure": "surely {word} in {count}",
    "rose": "{label} rose from {before:.2f} to {after:.2f} at {place}",
    "fell": "{label} fell from {before:.2f} to {after:.2f} at {place}",
    "nothing": "There are no values to sum up.",
    "silence": "All of it is near silence, where the values say nothing about a voice.",
}


def read_turn(
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None,
    recent: Sequence[Mapping[str, float]] = (),
) -> str:
    """A turn in words; empty where nothing can be said.

    Args:
        values: label -> value on the unit scale.
        intervals: label -> lower and upper end; None for a model without.
        recent: values of the speaker's last turns, this one at the end.
    """
    sides = {label: _side(label, ends) for label, ends in (intervals or {}).items()}
    sure = {label: word for label, word in sides.items() if word is not None}
    parts = []
    if sure:
        distance = float(np.linalg.norm([values[label] - NEUTRAL for label in sure]))
        parts.append(STRINGS["quadrant"].format(words=STRINGS["and"].join(sure.values()), distance=distance))
    for label in values:
        found = trend([turn[label] for turn in recent])
        if found is not None and found[1] * found[2] > 0:
            low, slope, high = sorted(map(abs, found))
            words = STRINGS["rising" if found[0] > 0 else "falling"]
            parts.append(words.format(label=label, slope=slope, low=low, high=high))
    return "; ".join(parts)


def trend(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Slope a turn of the last values, and the ends of its 99 % interval; None for fewer than five values."""
    y = np.asarray(values[-TREND_TURNS:], dtype=np.float64)
    if len(y) - 2 not in _T99:
        return None
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x))
    residual = y - y.mean() - slope * x
    reach = _T99[len(y) - 2] * float(np.sqrt(residual @ residual / (len(y) - 2) / (x @ x)))
    return slope, slope - reach, slope + reach


def change_points(values: Sequence[float]) -> list[int]:
    """The turns, from 0, at which the mean of the values shifts."""
    return sorted(_splits(np.asarray(values, dtype=np.float64), 0))


def summarise(turns: Sequence[TurnEmotion], places: Sequence[str]) -> str:
    """A call in a paragraph: each speaker's mean values, how many turns are surely on a side, and change points.

    Near silence is left out, and so are labels that a turn has no value of. Places are such as "2:31" or "turn 5".
    """
    spoken = [(turn, place) for turn, place in zip(turns, places) if turn.values and not turn.low_level]
    sentences = []
    for name in dict.fromkeys((turn.speaker or "").strip() for turn, _ in spoken):
        own = [(turn, place) for turn, place in spoken if (turn.speaker or "").strip() == name]
        sentences += [f"{sentence}." for sentence in _about_speaker(name, own)]
    near_silence = bool(turns) and all(turn.low_level for turn in turns)
    return " ".join(sentences) or STRINGS["silence" if near_silence else "nothing"]


def _about_speaker(name: str, turns: Sequence[tuple[TurnEmotion, str]]) -> Iterator[str]:
    known = [(label, value, place) for turn, place in turns for label, value in turn.values.items()]
    series = {label: [value for name, value, _ in known if name == label] for label, *_ in known}
    places = {label: [place for name, _, place in known if name == label] for label in series}
    means = [STRINGS["mean"].format(label=label, value=np.mean(values)) for label, values in series.items()]
    sides = [_side(label, ends) for turn, _ in turns for label, ends in (turn.intervals or {}).items()]
    counts = {word: sides.count(word) for word in dict.fromkeys(sides) if word is not None}
    yield "; ".join(
        [
            STRINGS["speaker"].format(
                name=name or STRINGS["nobody"],
                turns=len(turns),
                plural="s" * (len(turns) > 1),
                seconds=sum(turn.seconds for turn, _ in turns),
                means=", ".join(means),
            ),
            *(STRINGS["sure"].format(word=word, count=count) for word, count in counts.items()),
        ]
    )
    for label, values in series.items():
        bounds = [0, *change_points(values), len(values)]
        levels = [float(np.mean(values[start:end])) for start, end in itertools.pairwise(bounds)]
        for start, before, after in zip(bounds[1:], levels, levels[1:]):
            words = STRINGS["rose" if after > before else "fell"]
            yield words.format(label=label.capitalize(), before=before, after=after, place=places[label][start])


def clock(seconds: float) -> str:
    """151 -> "2:31"."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def _side(label: str, ends: tuple[float, float]) -> str | None:
    """The word for the side of the middle on which the whole interval lies."""
    low_word, high_word = ENDS_OF_SCALE.get(label, (None, None))
    return high_word if ends[0] > NEUTRAL else low_word if ends[1] < NEUTRAL else None


def _splits(values: np.ndarray, offset: int) -> Iterator[int]:
    if len(values) < 2 * MIN_SEGMENT:
        return
    best, strength = _best_split(values[None])
    random = np.random.default_rng(len(values))  # the same call gets the same words
    rows, as_good = max(1, MAX_PERMUTED // len(values)), 1
    for first in range(0, PERMUTATIONS, rows):
        orders = np.tile(values, (min(rows, PERMUTATIONS - first), 1))
        as_good += int(np.sum(_best_split(random.permuted(orders, axis=1))[1] >= strength))
        if as_good >= SIGNIFICANCE * (1 + PERMUTATIONS):
            return
    at = int(best[0])
    yield from _splits(values[:at], offset)
    yield offset + at
    yield from _splits(values[at:], offset + at)


def _best_split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of (rows, turns) the split with the largest sum of squares between its parts, and that sum."""
    count = values.shape[1]
    sizes = np.arange(MIN_SEGMENT, count - MIN_SEGMENT + 1)
    sums = np.cumsum(values - values.mean(axis=1, keepdims=True), axis=1)[:, sizes - 1]
    between = sums**2 * count / (sizes * (count - sizes))
    return sizes[between.argmax(axis=1)], between.max(axis=1)
