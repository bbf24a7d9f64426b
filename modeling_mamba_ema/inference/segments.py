"""Who speaks when: segments from a file, or windows of equal length."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording.

    Attributes:
        start, end: seconds from the recording's begin.
        speaker: a name, or None.
    """

    start: float
    end: float
    speaker: str | None = None


def read_segments(path: str | Path, recording: str | None = None) -> list[Segment]:
    """Read segments, sorted by their start.

    Args:
        path: a CSV file with columns `start`, `end` and, if known, `speaker` (seconds; other columns are not used); or
            an RTTM file, as speaker diarisation writes it.
        recording: for an RTTM file that holds several recordings, the name whose lines are taken.

    Raises:
        ValueError: the file is missing, holds no segments, or a line is wrong; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.name} does not exist (looked in {path.parent})")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no text; a CSV file with start,end[,speaker] or an RTTM file is") from error
    rttm = path.suffix.lower() == ".rttm"
    segments = _from_rttm(path.name, lines, recording) if rttm else _from_csv(path.name, lines)
    if not segments:
        raise ValueError(f"{path.name} holds no segments")
    return sorted(segments, key=lambda segment: (segment.start, segment.end))


def equal_windows(seconds: float, longest: float) -> list[Segment]:
    """Windows of one length, at most `longest` seconds, that fill a recording of `seconds`."""
    count = max(1, math.ceil(seconds / longest - 1e-9))
    return [Segment(seconds * number / count, seconds * (number + 1) / count) for number in range(count)]


def split_segment(segment: Segment, longest: float) -> list[Segment]:
    """A segment as parts of one length, at most `longest` seconds."""
    parts = equal_windows(segment.end - segment.start, longest)
    return [Segment(segment.start + part.start, segment.start + part.end, segment.speaker) for part in parts]


def _from_csv(name: str, lines: Sequence[str]) -> list[Segment]:
    reader = csv.DictReader(lines)
    if not {"start", "end"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{name} has the columns {reader.fieldnames}; 'start' and 'end' are needed, 'speaker' may be")
    return [
        _segment(row["start"], row["end"], row.get("speaker"), f"line {reader.line_num} of {name}") for row in reader
    ]


def _from_rttm(name: str, lines: Sequence[str], recording: str | None) -> list[Segment]:
    """https://github.com/nryant/dscore#rttm: type file channel onset duration <NA> <NA> speaker <NA> <NA>"""
    rows = [(number, line.split()) for number, line in enumerate(lines, start=1) if line.startswith("SPEAKER ")]
    for number, fields in rows:
        if len(fields) < 8:
            raise ValueError(f"line {number} of {name} has {len(fields)} fields; a SPEAKER line has at least 8")
    files = sorted({fields[1] for _, fields in rows})
    if len(files) > 1:
        if recording not in files:
            raise ValueError(f"{name} holds the recordings {', '.join(files[:5])}; none of them is {recording}")
        rows = [(number, fields) for number, fields in rows if fields[1] == recording]
    segments = []
    for number, (_, _, _, onset, duration, _, _, speaker, *_) in rows:
        place = f"line {number} of {name}"
        segments.append(_segment(onset, str(_seconds(onset, place) + _seconds(duration, place)), speaker, place))
    return segments


def _segment(start: str | None, end: str | None, speaker: str | None, place: str) -> Segment:
    name = (speaker or "").strip()
    segment = Segment(_seconds(start, place), _seconds(end, place), None if name in ("", "<NA>") else name)
    if segment.end <= segment.start:
        raise ValueError(f"{place} runs from {segment.start:g} to {segment.end:g} s; the end must be later")
    return segment


def _seconds(text: str | None, place: str) -> float:
    try:
        seconds = float(text or "")
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{place} has {text!r} where seconds from 0 are needed")
    return seconds


__all__ = ["Segment", "equal_windows", "read_segments"]
