"""Utterances of a split: where each one's audio is, and how long it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..audio_files import audio_seconds

SECONDS = "audio_seconds"  # the column with their lengths, where they are known


@dataclass(frozen=True)
class Utterance:
    """A file, or the stretch of it between two times in seconds, in one of its channels or in their average."""

    file_name: str
    start: float | None = None
    end: float | None = None
    channel: int | None = None

    def __str__(self) -> str:
        name = Path(self.file_name).name
        if self.start is not None or self.end is not None:
            name += f" from {self.start} to {self.end} s"
        return name if self.channel is None else f"{name}, channel {self.channel}"


def utterances_of(rows: Dataset | Mapping[str, list[Any]]) -> list[Utterance]:
    """One for each row of a split, or of some of its rows by column."""
    files, known = rows["file_name"][:], rows.column_names if isinstance(rows, Dataset) else rows
    places = [rows[name][:] if name in known else [None] * len(files) for name in ("start", "end", "channel")]
    return [Utterance(*place) for place in zip(files, *places)]


def seconds_of(rows: Dataset) -> list[float]:
    """The length of each row's utterance; where the split does not know it, from its times or its file's header."""
    if SECONDS in rows.column_names:
        return rows[SECONDS][:]
    return [(audio_seconds(u.file_name) if u.end is None else u.end) - (u.start or 0.0) for u in utterances_of(rows)]
