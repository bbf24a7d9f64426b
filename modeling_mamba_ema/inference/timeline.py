"""Emotion over a long recording: a row a segment, in constant memory."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..audio_files import MIN_SECONDS, Recording
from ..feature_extraction_mamba_ema import MIN_SAMPLES, SAMPLING_RATE
from .segments import Segment, by_channel, check_several_channels, equal_windows, split_segment
from .tracker import EmotionTracker

SUFFIXES = (".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class TimelineRow:
    """What was heard in one segment.

    Attributes:
        start, end: seconds from the recording's begin.
        speaker: of the segment, or None.
        values: label -> value on the unit scale; None for a segment too short (25 ms) to answer for.
        label_values: label -> value on the label's own scale, where that is not the unit scale; None likewise.
        low_level: True below -70 dBFS RMS, where the values say nothing about a voice.
    """

    start: float
    end: float
    speaker: str | None
    values: dict[str, float | None]
    label_values: dict[str, float | None]
    low_level: bool

    def to_dict(self) -> dict[str, Any]:
        """One flat row, as files have it, with the columns of [`timeline_columns`]; values are rounded to 4 digits."""
        values = {**self.values, **{f"{label}_value": value for label, value in self.label_values.items()}}
        return {
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "speaker": self.speaker,
            **{name: None if value is None else round(value, 4) for name, value in values.items()},
            "low_level": self.low_level,
        }


def timeline_columns(tracker: EmotionTracker) -> list[str]:
    """Of flat rows: `valence` on the unit scale, `valence_value` on the label's own scale where that is another."""
    values = [f"{label}_value" for label in tracker.labels_with_own_scale]
    return ["start", "end", "speaker", *tracker.labels, *values, "low_level"]


def emotion_timeline(
    tracker: EmotionTracker,
    recording: Recording,
    segments: Iterable[Segment] | float = 10.0,
    split_channels: bool = False,
) -> Iterator[TimelineRow]:
    """Follow a recording segment by segment; rows come as they are computed.

    The tracker's one state is carried over all segments, whoever speaks: the model was trained on turns in the order
    in which they were spoken, and what one speaker says moves the other. The speaker stands in the row. Segments longer
    than 30 s are split into parts of one length; one shorter than 25 ms has no values and leaves the state as it was.

    Args:
        tracker: where the conversation stands; a new one, or one that continues.
        recording: to read.
        segments: in the order of time, of `read_segments`, `detect_speech` or your own, each of the channel that it
            names; or seconds, for windows of at most that length which fill the recording.
        split_channels: with windows: each channel is a speaker of its own, and each window has a row a channel. Turns
            found in each channel are those of `detect_speech(recording, split_channels=True)`.

    Raises:
        ValueError: segments outside the recording or of channels that it lacks (a list is checked before anything is
            scored), windows not between 1 and 30 s, or `split_channels` with segments or with a single channel.
        AudioFileError: audio that cannot be used; the rows before it have been given.
    """
    allowed = tracker.feature_extractor.max_seconds
    longest = allowed - 0.01  # rounding to samples must not make a part too long
    if isinstance(segments, (int, float)):
        if not 1 <= segments <= allowed:
            raise ValueError(f"windows of {segments:g} s; allowed are 1 to {allowed:g} s")
        segments = equal_windows(recording.seconds, min(segments, longest))
        if split_channels:
            check_several_channels(recording)
            segments = list(by_channel(segments, recording.channels))
    elif split_channels:
        raise ValueError("split_channels is for windows; segments name their channels themselves")
    if isinstance(segments, Sequence):
        _warn_of_one_channel(segments, recording)
    checked = map(partial(_checked, recording=recording), segments)
    return _rows(tracker, recording, list(checked) if isinstance(segments, Sequence) else checked, longest)


def _warn_of_one_channel(segments: Sequence[Segment], recording: Recording) -> None:
    """Programs that tell speakers apart in the average of all channels write channel 1, too."""
    speakers = {segment.speaker for segment in segments}
    if recording.channels > 1 and len(speakers) > 1 and {segment.channel for segment in segments} == {1}:
        warnings.warn(
            f"the segments of all {len(speakers)} speakers name channel 1 of {recording.name}, which has "
            f"{recording.channels}: channel 1 is read. If they were found in the average, write <NA> for the channel",
            stacklevel=1,
        )


def _checked(segment: Segment, recording: Recording) -> Segment:
    """Segments must lie within their recording; those of another one do not, as a rule."""
    recording.checked_channel(segment.channel)
    if not 0 <= segment.start <= segment.end <= recording.seconds + 0.5:
        raise ValueError(
            f"a segment runs from {segment.start:g} to {segment.end:g} s, but {recording.name} lasts "
            f"{recording.seconds:.3f} s; do the segments belong to it?"
        )
    return segment


def _rows(
    tracker: EmotionTracker, recording: Recording, segments: Iterable[Segment], longest: float
) -> Iterator[TimelineRow]:
    own = tracker.labels_with_own_scale
    for whole in segments:
        for segment in split_segment(whole, longest):
            end = max(min(segment.end, recording.seconds), segment.start)
            part = (segment.start, end, segment.speaker)
            waveform = np.empty(0)
            if end - segment.start > MIN_SECONDS / 2:
                waveform = recording.read(segment.start, end, segment.channel)
            if waveform.size < MIN_SAMPLES:
                yield TimelineRow(*part, dict.fromkeys(tracker.labels), dict.fromkeys(own), False)
                continue
            heard = tracker.update(waveform, SAMPLING_RATE, segment.speaker)
            label_values: dict[str, float | None] = {label: heard.label_values[label] for label in own}
            yield TimelineRow(*part, {**heard.values}, label_values, heard.low_level)


class TimelineWriter:
    """Writes rows as they come; the file is complete and valid after every row. A context manager.

    Args:
        path: `.csv`, `.json` (a list of rows) or `.jsonl` (a row a line); an existing file is replaced.
        columns: of the rows, see [`timeline_columns`].

    Raises:
        ValueError: another suffix.
    """

    def __init__(self, path: str | Path, columns: Sequence[str]):
        path = Path(path)
        self._suffix = path.suffix.lower()
        if self._suffix not in SUFFIXES:
            raise ValueError(f"{path.name} ends in {path.suffix!r}; rows are written as {', '.join(SUFFIXES)}")
        self._file = path.open("w", encoding="utf-8", newline="")
        self._csv = csv.DictWriter(self._file, columns)
        self._first = True
        if self._suffix == ".csv":
            self._csv.writeheader()
        elif self._suffix == ".json":
            self._file.write("[]\n")
        self._file.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row, as `TimelineRow.to_dict` gives it."""
        if self._suffix == ".csv":
            self._csv.writerow(row)
        elif self._suffix == ".jsonl":
            self._file.write(json.dumps(row) + "\n")
        else:
            # In one write over the closing bracket, so that a reader finds a whole list at any time.
            self._file.seek(self._file.tell() - len("]\n"))
            self._file.write(("\n" if self._first else ",\n") + json.dumps(row) + "]\n")
        self._first = False
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TimelineWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


__all__ = ["TimelineRow", "TimelineWriter", "emotion_timeline", "timeline_columns"]
