"""Audio that cannot be used, found before training begins."""

import contextlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset
from tqdm import tqdm

from ..audio_files import AudioFileError, check_audio
from .atomic_write import atomic_write
from .known_files import known_or_found
from .utterances import Utterance, utterances_of

_ENUMERATED = 10  # in a message; the file has all
_MANY, _WORKERS = 20_000, 8  # fewer utterances are checked before other processes have started


@dataclass(frozen=True)
class BadAudio:
    """An utterance whose audio cannot be used, and why."""

    split: str
    conversation_id: str
    turn: int
    file_name: str
    reason: str


def scan_audio(
    splits: Mapping[str, Dataset], max_seconds: float, known: Path
) -> tuple[list[BadAudio], dict[str, list[float | None]]]:
    """Check the audio of every utterance, see [`check_audio`]: about 0.1 ms for a wav file of integers on a local disk,
    while other formats are decoded. What passed once is not opened again until it changes; the table `known` has it,
    see [`known_or_found`].

    Returns:
        What cannot be used, in the order of the splits' rows, empty when all is well; and for each split the seconds of
        its utterances, None for those that cannot be used.
    """
    reasons: dict[Utterance, str] = {}

    def seconds_if_good(unknown: Sequence[Utterance]) -> Iterator[float | None]:
        for utterance, found in zip(unknown, _check_all(unknown, max_seconds)):
            if isinstance(found, str):
                reasons[utterance] = found
            yield None if isinstance(found, str) else found

    bad, seconds = [], {}
    utterances = {split: utterances_of(rows) for split, rows in splits.items()}
    everything = [utterance for part in utterances.values() for utterance in part]
    found = iter(known_or_found(known, everything, seconds_if_good))
    for split, rows in splits.items():
        # What passed when longer ones were allowed is checked again.
        seconds[split] = [
            next(seconds_if_good([u])) if length is not None and length > max_seconds else length
            for u, length in zip(utterances[split], found)
        ]
        names = zip(rows["conversation_id"][:], rows["turn"][:], utterances[split], seconds[split])
        for conversation, turn, utterance, length in names:
            if length is None:
                bad.append(BadAudio(split, str(conversation), int(turn), utterance.file_name, reasons[utterance]))
    return bad, seconds


def _check_all(utterances: Sequence[Utterance], max_seconds: float) -> Iterator[float | str]:
    """Seconds of each utterance, or why it cannot be used; many are looked at by a process a core."""
    check = partial(_check, max_seconds=max_seconds)
    with contextlib.ExitStack() as stack:
        found: Iterator[float | str] = map(check, utterances)
        if len(utterances) >= _MANY and (workers := min(os.cpu_count() or 1, _WORKERS)) > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("fork")))
            found = pool.map(check, utterances, chunksize=256)
        yield from tqdm(found, "checking audio", len(utterances), unit=" utterances", leave=False, disable=None)


def _check(utterance: Utterance, max_seconds: float) -> float | str:
    try:
        return check_audio(utterance.file_name, utterance.start, utterance.end, utterance.channel, max_seconds)
    except AudioFileError as error:
        return str(error)


def describe_bad_audio(bad: list[BadAudio], splits: Mapping[str, Dataset]) -> str:
    """What is wrong, file by file, and what can be done; one line each."""
    lines = [f"{len(bad)} of {sum(len(rows) for rows in splits.values())} utterances cannot be used:"]
    lines += [f"  {item.split}  {item.conversation_id}  turn {item.turn}: {item.reason}" for item in bad[:_ENUMERATED]]
    if len(bad) > _ENUMERATED:
        lines.append(f"  and {len(bad) - _ENUMERATED} more")
    if bad and not any(Path(item.file_name).exists() for item in bad):
        lines.append("file_name is a path from the table's folder, with the extension and with / between folders")
    return "\n".join(lines)


def save_bad_audio(bad: list[BadAudio], path: Path) -> None:
    """Write as JSONL, one utterance a line; several processes may do so at once."""
    atomic_write(path, "".join(json.dumps(asdict(item)) + "\n" for item in bad))
