"""Who speaks when: segments from a file, or windows of equal length."""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.text_files import delimiter_of, read_text, seconds_of

# https://github.com/nryant/dscore#rttm: type file channel onset duration <NA> <NA> speaker <NA> [<NA>]
_RTTM_FIELDS = (9, 10)
_RTTM_TYPES = {
    *("SEGMENT", "NOSCORE", "NO_RT_METADATA", "LEXEME", "NON-LEX", "NON-SPEECH", "FILLER", "EDIT", "IP", "SU", "CB"),
    *("A/P", "SPEAKER", "SPKR-INFO"),
}
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.IGNORECASE)
_NO_CHANNEL = ("", "0", "<NA>")  # Kaldi writes 0
_CHANNELS_BY_LETTER = {"A": "1", "B": "2"}  # of telephone calls


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording.

    Attributes:
        start, end: seconds from the recording's begin.
        channel: of the recording, counted from 1; None: the one that is read of the whole recording.
    """

    start: float
    end: float
    speaker: str | None = None
    channel: int | None = None


def read_segments(path: str | Path, recording: str | None = None) -> list[Segment]:
    """Read segments, sorted by their start.

    Args:
        path: a CSV file with columns `start`, `end` and, if known, `speaker` and `channel`, separated by commas,
            semicolons or tabs (other columns are not used); or an RTTM file, as speaker diarisation writes it. Times
            are seconds, or texts such as `0 days 00:00:01.5`.
        recording: for an RTTM file that holds several recordings, the name whose lines are taken.

    Raises:
        ValueError: the file is missing, holds no segments, or a line is wrong; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        why = "is a folder" if path.is_dir() else f"does not exist (looked in {path.parent})"
        raise ValueError(f"{path.name} {why}; segments come from a CSV or RTTM file")
    text = read_text(path)
    rttm = path.suffix.lower() == ".rttm"
    try:
        segments = _from_rttm(path.name, text, recording) if rttm else _from_csv(path.name, text)
    except csv.Error as error:  # a quotation mark that nothing closes would take all that follows for a name
        raise ValueError(f"{path.name} cannot be read as CSV: {error}") from error
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
    return [replace(segment, start=segment.start + part.start, end=segment.start + part.end) for part in parts]


def by_channel(segments: Iterable[Segment], channels: Sequence[int]) -> Iterator[Segment]:
    """Each segment in each channel, whose number becomes its speaker."""
    for segment in segments:
        for channel in channels:
            yield replace(segment, speaker=channel_speaker(channel), channel=channel)


def channel_speaker(channel: int) -> str:
    """The name of a speaker of whom nothing is known but the channel, counted from 1."""
    return f"channel {channel}"


def _from_csv(name: str, text: str) -> list[Segment]:
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter_of(text), strict=True)
    if not {"start", "end"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{name} has the columns {reader.fieldnames}; 'start' and 'end' are needed, 'speaker' may be")
    twice = [column for column in reader.fieldnames or () if (reader.fieldnames or []).count(column) > 1]
    if twice:
        raise ValueError(f"{name} has the column {twice[0]!r} twice")
    segments = []
    for row in reader:
        place = f"line {reader.line_num} of {name}"
        if None in row:
            raise ValueError(
                f"{place} has more fields than there are columns; decimal commas need ';' or tabs between the fields"
            )
        start, end = _seconds(row["start"], place), _seconds(row["end"], place)
        segments.append(_segment(start, end, row.get("speaker"), row.get("channel"), place))
    return segments


def _from_rttm(name: str, text: str, recording: str | None) -> list[Segment]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        place = f"line {number} of {name}"
        fields = line.strip().split("\t") if line.count("\t") + 1 in _RTTM_FIELDS else line.split()
        if not fields or not fields[0] or fields[0].startswith(";;"):
            continue
        if fields[0] not in _RTTM_TYPES:
            raise ValueError(f"{place} begins with {fields[0]!r}, no type of RTTM such as SPEAKER")
        if fields[0] == "SPEAKER":
            # A name with a space pushes what follows it into the fields behind, a duration or a part of the speaker.
            confidence = all(field == "<NA>" or _NUMBER.fullmatch(field) for field in fields[8:])
            shifted = len(fields) in _RTTM_FIELDS and (_NUMBER.fullmatch(fields[5]) or not confidence)
            if len(fields) not in _RTTM_FIELDS or shifted:
                raise ValueError(
                    f"{place} has {len(fields)} fields; a SPEAKER line has 9 or 10, and its names hold no space unless "
                    "tabs are between the fields"
                )
            rows.append((place, fields))
    files = sorted({fields[1] for _, fields in rows})
    if len(files) > 1:
        if recording not in files:
            raise ValueError(f"{name} holds the recordings {', '.join(files[:5])}; none of them is {recording}")
        rows = [(place, fields) for place, fields in rows if fields[1] == recording]
    segments = []
    for place, (_, _, channel, onset, duration, _, _, speaker, *_) in rows:
        start = _seconds(onset, place)
        segments.append(_segment(start, start + _seconds(duration, place), speaker, channel, place))
    return segments


def _segment(start: float, end: float, speaker: str | None, channel: str | None, place: str) -> Segment:
    """A segment without length is one: it has no sound to score, and is no reason to refuse the others."""
    if end < start:
        raise ValueError(f"{place} runs from {start:g} to {end:g} s; the end must not be earlier")
    name, chosen = (speaker or "").strip(), (channel or "").strip()
    chosen = _CHANNELS_BY_LETTER.get(chosen, chosen)
    number = None if chosen in _NO_CHANNEL else seconds_of(chosen)
    if chosen not in _NO_CHANNEL and (number is None or number < 1 or number != int(number)):
        raise ValueError(f"{place} has the channel {chosen!r}; a number from 1 is needed, or nothing")
    return Segment(start, end, None if name in ("", "<NA>") else name, None if number is None else int(number))


def _seconds(text: str | None, place: str) -> float:
    seconds = seconds_of(text)
    if seconds is None:
        raise ValueError(f"{place} has {text!r} where seconds from 0 are needed")
    return seconds
