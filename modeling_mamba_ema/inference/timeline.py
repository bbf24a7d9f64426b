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
from .segments import Segment, by_channel, equal_windows, split_segment
from .tracker import EmotionTracker, TurnEmotion

SUFFIXES = (".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class TimelineRow:
    """What was heard in one segment; times are seconds from the recording's begin.

    Attributes:
        heard: what the tracker says; None for a segment too short (25 ms) to answer for.
        fields: of a file's row, see `EmotionTracker.row`.
    """

    start: float
    end: float
    speaker: str | None
    heard: TurnEmotion | None
    fields: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """One flat row, as files have it, with the columns of [`timeline_columns`]."""
        return {"start": round(self.start, 3), "end": round(self.end, 3), "speaker": self.speaker, **self.fields}


def timeline_columns(tracker: EmotionTracker) -> list[str]:
    """Of flat rows."""
    return ["start", "end", "speaker", *tracker.columns]


def emotion_timeline(
    tracker: EmotionTracker,
    recording: Recording,
    segments: Iterable[Segment] | float = 10.0,
    split_channels: bool = False,
) -> Iterator[TimelineRow]:
    """Follow a recording segment by segment; rows come as they are computed.

    The tracker's state, of a new conversation or of one that continues, is carried over all segments; a segment's
    speaker is the speaker of its turn, see [`EmotionTracker`]. Segments longer than 30 s are split into parts of one
    length; one shorter than 25 ms has no values and leaves the state as it was.

    Args:
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
            segments = list(by_channel(segments, recording.several_channels()))
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
    for whole in segments:
        for segment in split_segment(whole, longest):
            end = max(min(segment.end, recording.seconds), segment.start)
            waveform, heard = np.empty(0), None
            if end - segment.start > MIN_SECONDS / 2:
                waveform = recording.read(segment.start, end, segment.channel)
            if waveform.size >= MIN_SAMPLES:
                heard = tracker.update(waveform, SAMPLING_RATE, segment.speaker)
            yield TimelineRow(segment.start, end, segment.speaker, heard, tracker.row(heard))


class TimelineWriter:
    """Writes rows as they come; the file is complete and valid after every row. A context manager.

    Args:
        path: `.csv`, `.json` (a list of rows) or `.jsonl` (a row a line), else `ValueError`; an existing file is
            replaced.
        columns: of the rows, see [`timeline_columns`].
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

    def __enter__(self) -> TimelineWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
