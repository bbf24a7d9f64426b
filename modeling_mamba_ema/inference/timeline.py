"""Emotion over a long recording: a row a segment, in constant memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..feature_extraction_mamba_ema import MIN_SAMPLES, InvalidAudioError
from .recording import Recording
from .segments import Segment, check_segments, equal_windows, split_segment
from .tracker import EmotionTracker

SUFFIXES = (".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class TimelineRow:
    """What was heard in one segment.

    Attributes:
        start, end: seconds from the recording's begin.
        speaker: of the segment, or None.
        values: label -> value on the unit scale; None for a segment too short (25 ms) to answer for.
        label_values: label -> value on the label's own scale; None likewise.
        low_level: True below -70 dBFS RMS, where the values say nothing about a voice.
    """

    start: float
    end: float
    speaker: str | None
    values: dict[str, float | None]
    label_values: dict[str, float | None]
    low_level: bool

    def to_dict(self) -> dict[str, Any]:
        """One flat row, as files have it: `valence` on the unit scale, `valence_value` on the label's own scale."""
        return {
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "speaker": self.speaker,
            **self.values,
            **{f"{label}_value": value for label, value in self.label_values.items()},
            "low_level": self.low_level,
        }


def emotion_timeline(
    tracker: EmotionTracker, recording: Recording, segments: Iterable[Segment] | float = 10.0
) -> Iterator[TimelineRow]:
    """Follow a recording segment by segment; rows come as they are computed.

    The tracker's one state is carried over all segments, whoever speaks: the model was trained on turns in the order
    in which they were spoken, and what one speaker says moves the other. The speaker stands in the row. Segments longer
    than 30 s are split into parts of one length; one shorter than 25 ms has no values and leaves the state as it was.

    Args:
        tracker: where the conversation stands; a new one, or one that continues.
        recording: to read.
        segments: in the order of time, of `read_segments`, `detect_speech` or your own; or seconds, for windows of at
            most that length which fill the recording.

    Raises:
        ValueError: segments outside the recording (a list is checked before anything is scored), or windows not
            between 1 and 30 s.
        AudioFileError, InvalidAudioError: audio that cannot be used; rows up to there have been given.
    """
    allowed = tracker.feature_extractor.max_seconds
    longest = allowed - 0.01  # rounding to samples must not make a part too long
    if isinstance(segments, (int, float)):
        if not 1 <= segments <= allowed:
            raise ValueError(f"windows of {segments:g} s; allowed are 1 to {allowed:g} s")
        segments = equal_windows(recording.seconds, min(segments, longest))
    if isinstance(segments, Sequence):
        check_segments(segments, recording.seconds, recording.name)
    return _rows(tracker, recording, segments, longest)


def _rows(
    tracker: EmotionTracker, recording: Recording, segments: Iterable[Segment], longest: float
) -> Iterator[TimelineRow]:
    for whole in segments:
        check_segments([whole], recording.seconds, recording.name)
        for segment in split_segment(whole, longest):
            end = min(segment.end, recording.seconds)
            waveform = recording.read(segment.start, end)
            if waveform.size < MIN_SAMPLES:
                nothing: dict[str, float | None] = dict.fromkeys(tracker.labels)
                yield TimelineRow(segment.start, end, segment.speaker, nothing, nothing, False)
                continue
            try:
                heard = tracker.update(waveform, speaker=segment.speaker)
            except InvalidAudioError as error:
                raise InvalidAudioError(f"{recording.name} at {segment.start:.1f} to {end:.1f} s: {error}") from error
            yield TimelineRow(
                segment.start, end, segment.speaker, {**heard.values}, {**heard.label_values}, heard.low_level
            )


class TimelineWriter:
    """Writes rows as they come; the file is complete and valid after every row. A context manager.

    Args:
        path: `.csv`, `.json` (a list of rows) or `.jsonl` (a row a line); a file that is there is replaced.
        labels: of the rows.

    Raises:
        ValueError: another suffix.
    """

    def __init__(self, path: str | Path, labels: Sequence[str]):
        path = Path(path)
        self._suffix = path.suffix.lower()
        if self._suffix not in SUFFIXES:
            raise ValueError(f"{path.name} ends in {path.suffix!r}; rows are written as {', '.join(SUFFIXES)}")
        self._file = path.open("w", encoding="utf-8", newline="")
        columns = ["start", "end", "speaker", *labels, *(f"{label}_value" for label in labels), "low_level"]
        self._csv = csv.DictWriter(self._file, columns)
        self._first = True
        if self._suffix == ".csv":
            self._csv.writeheader()
        elif self._suffix == ".json":
            self._file.write("[]\n")
        self._file.flush()

    def write(self, row: TimelineRow) -> None:
        fields = row.to_dict()
        if self._suffix == ".csv":
            self._csv.writerow(fields)
        elif self._suffix == ".jsonl":
            self._file.write(json.dumps(fields) + "\n")
        else:
            # In one write over the closing bracket, so that a reader finds a whole list at any time.
            self._file.seek(self._file.tell() - len("]\n"))
            self._file.write(("\n" if self._first else ",\n") + json.dumps(fields) + "]\n")
        self._first = False
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TimelineWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


__all__ = ["TimelineRow", "TimelineWriter", "emotion_timeline"]
