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
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Let all processes end where one does, each with the sentence of the first that failed and where that was.

    Raises:
        ValueError: another process failed in the block. What this process raised itself goes on.
    """
    problem: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        problem = error
    place = f"process {PartialState().process_index} on {socket.gethostname()}"
    message = None if problem is None else f"{place}: {problem}"
    messages = [found for found in gather_object([message]) if found is not None]
    if problem is not None:
        raise problem
    if messages:
        raise ValueError(messages[0])


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[None]:
    """The first process of each machine runs the block before the others; they go on where it fails, too."""
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def require_same_data(manifest: Mapping[str, Any]) -> None:
    """Refuse a run whose processes read other rows or other audio: they would train on batches that do not match.

    Args:
        manifest: of [`run_manifest`].

    Raises:
        ValueError: the data differ; the message names the split, the machines and their numbers of turns.
    """
    everywhere = gather_object([(socket.gethostname(), manifest["data"])])
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
    (name,) = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])
    state = PartialState()
    if state.is_main_process:
        (folder / name).touch()
    state.wait_for_everyone()
    os.listdir(folder)  # lets network file systems look again
    blind = [host for host, sees in gather_object([(socket.gethostname(), (folder / name).exists())]) if not sees]
    if state.is_main_process:
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
