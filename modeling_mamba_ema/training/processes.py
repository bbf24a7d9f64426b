"""What the processes of a run do as one before the first step: fail together, share a folder, choose a checkpoint.

Without it one process ends with an error and the others wait for it, or, on machines that see other files, each goes on
from what it sees, and the averaged gradients mean nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from filelock import FileLock, Timeout

Value = TypeVar("Value")


class RunError(ValueError):
    """What a user can mend, found in another process of the run."""


def from_first(value: Value) -> Value:
    """The value that the first process has, in all of them."""
    values = [value]
    if _several():
        dist.broadcast_object_list(values, src=0)
    return values[0]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Let all processes end where one does, each with the sentence of the first that failed and where that was.

    Raises:
        RunError: another process failed in the block. What this process raised itself goes on.
    """
    problem: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        problem = error
    message = None if problem is None else f"process {_rank()} on {socket.gethostname()}: {problem}"
    messages = [found for found in _of_all(message) if found is not None]
    if problem is not None:
        raise problem
    if messages:
        raise RunError(messages[0])


def require_same_data(manifest: Mapping[str, Any]) -> None:
    """Refuse a run whose processes read other rows or other audio: they would train on batches that do not match.

    Args:
        manifest: of [`run_manifest`].

    Raises:
        ValueError: the data differ; the message names the split, the machines and their numbers of turns.
    """
    everywhere = _of_all((socket.gethostname(), manifest["data"]))
    for split, wanted in manifest["data"].items():
        if any(data[split] != wanted for _, data in everywhere):
            turns = [f"process {n} on {host}: {data[split]['turns']}" for n, (host, data) in enumerate(everywhere)]
            raise ValueError(
                f"the processes do not read the same split {split} (turns of {', '.join(turns)}); every machine needs "
                "the same table and the same audio files"
            )


def require_shared_folder(folder: Path) -> None:
    """Refuse an output folder that the machines of a run do not share: all load the checkpoints that the first writes.

    Raises:
        OSError: a process does not see what the first one wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = from_first(f".shared-{uuid.uuid4().hex}")
    if _rank() == 0:
        (folder / name).touch()
    from_first(None)  # after the first one has written
    os.listdir(folder)  # lets network file systems look again
    blind = [host for host, sees in _of_all((socket.gethostname(), (folder / name).exists())) if not sees]
    if _rank() == 0:
        (folder / name).unlink()
    if blind:
        raise OSError(
            f"training.output_dir {folder} is not the same folder on {', '.join(sorted(set(blind)))} as on the first "
            "machine; put it on a disk that all machines share"
        )


def lock_folder(folder: Path) -> FileLock:
    """Keep other runs out of an output folder until this process ends; the first process of a run calls it.

    Raises:
        OSError: another run has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"another run writes to {folder}; wait for it, or take another training.output_dir") from None
    return lock


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _several() else 0


def _of_all(value: Value) -> list[Value]:
    """What each process gives, in all of them."""
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
