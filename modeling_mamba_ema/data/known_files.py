"""What was found out about audio files, kept on the disk for as long as they do not change."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from .atomic_write import atomic_write
from .utterances import Utterance

logger = logging.getLogger(__name__)

Value = TypeVar("Value", str, float)
_COLUMNS = ["utterance", "bytes", "changed", "value"]


def known_or_found(
    table: Path, utterances: Sequence[Utterance], find: Callable[[Sequence[Utterance]], Iterable[Value | None]]
) -> list[Value | None]:
    """A value for each utterance: from a table, or found for those that it does not know from an earlier call.

    A value counts as long as its file keeps its path, size and time of change. A table that cannot be read is written
    anew; where none can be written, the next call looks again.

    Args:
        table: a Parquet file, for the values of one such function.
        find: called with those that are not known; None is not kept.
    """
    known = _read(table)
    stamps = {name: _stamp(name) for name in dict.fromkeys(utterance.file_name for utterance in utterances)}
    values: dict[Utterance, Value | None] = {}
    for utterance in utterances:
        stamp, value = known.get(_key(utterance), (None, None))
        if stamp is not None and stamp == stamps[utterance.file_name]:
            values[utterance] = value
    unknown = [utterance for utterance in dict.fromkeys(utterances) if utterance not in values]
    try:
        for utterance, value in zip(unknown, find(unknown)):
            values[utterance], stamp = value, stamps[utterance.file_name]
            if stamp is not None and value is not None:
                known[_key(utterance)] = (stamp, value)
    finally:  # a look that is interrupted goes on from there
        if unknown:
            _write(table, known)
    return [values[utterance] for utterance in utterances]


def _key(utterance: Utterance) -> str:
    return f"{utterance.file_name}|{utterance.start}|{utterance.end}|{utterance.channel}"


def _stamp(name: str) -> tuple[int, int] | None:
    try:
        facts = os.stat(name)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def _read(table: Path) -> dict[str, tuple[tuple[int, int], Any]]:
    try:
        columns = pd.read_parquet(table, columns=_COLUMNS)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s cannot be read (%s) and is written anew", table, error)
        return {}
    key, size, changed, value = (columns[name].tolist() for name in _COLUMNS)
    return dict(zip(key, zip(zip(size, changed), value)))


def _write(table: Path, known: Mapping[str, tuple[tuple[int, int], Any]]) -> None:
    try:
        rows = [(key, *stamp, value) for key, (stamp, value) in known.items()]
        atomic_write(table, pd.DataFrame(rows, columns=_COLUMNS).to_parquet())
        (table.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written (%s); the next start looks at all audio again", table, error)
