"""What the processes of a run do as one: fail together, share a folder, and say which of them was lost.

Without it one process ends with an error and the others wait for it, or, on machines that see other files, each goes on
from what it sees, and the averaged gradients mean nothing.
"""

import atexit
import contextlib
import gc
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from torch.distributed.distributed_c10d import _get_default_store

from ..data.watched_reading import within_seconds

# Keys of the store that torch's processes share: where each is, and whether it has lost another.
_PLACE, _LEFT = "mamba_ema/place/", "mamba_ema/left/"
_TRANSPORT = re.compile(r"\bgloo\b|\bNCCL\b|connectFullMesh")
REPORT_SECONDS = 10.0  # for the others to notice the same


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Let all processes end where one does, each with a `ValueError` of the sentence of the first that failed and where
    that was. What this process raised itself goes on."""
    problem: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        problem = error
    place = f"process {PartialState().process_index} on {socket.gethostname()}"
    if dist.is_initialized():
        _get_default_store().set(f"{_PLACE}{PartialState().process_index}", place)
    message = None if problem is None else f"{place}: {problem}"
    messages = [found for found in gather_object([message]) if found is not None]
    if problem is not None:
        raise problem
    if messages:
        raise ValueError(messages[0])


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Where processes of a run cannot reach each other, or lose one, say which and what to do, by a `ConnectionError`
    in the place of what torch raises for its transport."""
    try:
        yield
    except Exception as error:
        if not is_of_transport(error):
            raise
        reason = re.sub(r"\[/\S+\] *", "", str(error)).strip().splitlines()[0].split(". ")[0]  # without torch's advice
        if not dist.is_initialized():
            raise ConnectionError(
                f"the processes do not reach each other ({reason}). Where several machines train on their CPUs, set "
                "GLOO_SOCKET_IFNAME on each to the network interface that they share, such as eth0 (`ip -brief "
                "address` shows them): without it, the address of the host's own name is taken, often 127.0.0.1"
            ) from error
        atexit.unregister(leave_group)  # it would wait for what the lost process was to send
        lost = _lost_processes()
        if not lost:
            raise
        raise ConnectionError(
            f"{' and '.join(lost)} no longer answers ({reason}). It was killed or stopped (memory ran out most often), "
            "its machine ended, or the network was cut: see what it wrote last. The same command goes on from the "
            "newest checkpoint, also with fewer machines"
        ) from error


def is_of_transport(error: BaseException | None) -> bool:
    """Whether torch's exchange between processes failed, in an error or in what led to it."""
    if error is None:
        return False
    own = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _TRANSPORT.search(str(error)))
    return bool(own) or is_of_transport(error.__cause__ or error.__context__)


def _lost_processes() -> list[str]:
    """The processes, with their machines, that do not report that they miss one, too."""
    state, store = PartialState(), _get_default_store()
    deadline = time.monotonic() + REPORT_SECONDS

    def missing() -> list[str]:
        store.set(f"{_LEFT}{state.process_index}", "")
        while True:
            ranks = [rank for rank in range(state.num_processes) if not store.check([f"{_LEFT}{rank}"])]
            if len(ranks) <= 1 or time.monotonic() > deadline:
                keys = [f"{_PLACE}{rank}" for rank in ranks]
                return [store.get(key).decode() if store.check([key]) else key.rsplit("/")[-1] for key in keys]
            time.sleep(0.1)

    try:
        return within_seconds(2 * REPORT_SECONDS, missing)
    except (RuntimeError, TimeoutError):  # the store is on the first process' machine
        return ["process 0, or its machine,"]


def tell_launcher(message: str) -> None:
    """Give torch's launcher, where there is one, the message for the report with which it ends, see
    https://docs.pytorch.org/docs/stable/elastic/errors.html."""
    if (path := os.environ.get("TORCHELASTIC_ERROR_FILE")) is not None:
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")


def leave_group() -> None:
    """Leave the process group, where there is one, and wait for its threads; for `atexit`.

    A thread of gloo that drops the last reference to a tensor while Python shuts down aborts the process with
    "terminate called without an active exception", see https://github.com/pytorch/pytorch/pull/179291.
    """
    if dist.is_initialized():
        gc.collect()  # the model that Trainer wrapped refers to the group, from cycles
        dist.destroy_process_group()


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
    """Refuse a run whose processes read other rows or other audio: they would train on batches that do not match. The
    `ValueError` names the split, the machines and their numbers of turns."""
    everywhere = gather_object([(socket.gethostname(), manifest["data"])])
    for split, wanted in manifest["data"].items():
        if any(data[split] != wanted for _, data in everywhere):
            turns = [f"process {n} on {host}: {data[split]['turns']}" for n, (host, data) in enumerate(everywhere)]
            raise ValueError(
                f"the processes do not read the same split {split} (turns of {', '.join(turns)}); every machine needs "
                "the same table and the same audio files"
            )


def require_shared_folder(folder: Path) -> None:
    """Raise `OSError` for an output folder that the machines of a run do not share: all load the checkpoints that the
    first writes."""
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
    """Keep other runs out of an output folder until this process ends; the first process of a run calls it. Raises
    `OSError` where another run has the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"another run writes to {folder}; wait for it, or take another training.output_dir") from None
    return lock
