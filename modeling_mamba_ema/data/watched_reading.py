"""Reading with a time limit, whose place is known when the process that reads dies."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from ..audio_files import AudioFileError

Result = TypeVar("Result")
# A file that takes longer to read hangs.
READ_SECONDS = 20.0
# Waited for in parts: a process that was stopped and goes on has lost one part, not its whole time.
_LOOKS = 20
_MAX_READERS = 256


class WatchedReading:
    """Notes, in memory shared with worker processes, which of some numbered things each process is reading."""

    def __init__(self) -> None:
        # (readers, 2): process id and number, -1 for none
        self._notes = torch.full((_MAX_READERS, 2), -1, dtype=torch.int64).share_memory_()

    def read(self, number: int, path: str, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call a function that reads the file at a path; `AudioFileError` where it gives no answer within
        `READ_SECONDS`."""
        worker = torch.utils.data.get_worker_info()
        note = self._notes[0 if worker is None else (1 + worker.id) % _MAX_READERS]
        note[0], note[1] = os.getpid(), number
        try:
            return within_seconds(READ_SECONDS, function, *args, **kwargs)
        except TimeoutError as error:
            raise AudioFileError(
                f"{Path(path).name} could not be read within {READ_SECONDS:g} s; is its disk connected?"
            ) from error
        finally:
            note[1] = -1

    def readers(self) -> dict[int, int | None]:
        """For each process that has read, by its id, the number it is at; None between two."""
        return {pid: number if number >= 0 else None for pid, number in self._notes.tolist() if pid > 0}


def within_seconds(limit: float, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a function in the thread that reads for this process; `TimeoutError` where it gives no answer within `limit`
    seconds.

    A decoder that hangs inside a C library can be neither interrupted nor asked. Its thread is left behind, which ends
    with the process, and the next call gets a new one.
    """
    answer: Future[Result] = Future()
    _reading_thread(os.getpid()).put((answer, partial(function, *args, **kwargs)))
    for _ in range(_LOOKS):
        wait([answer], limit / _LOOKS)
        if answer.done():
            return answer.result()
    _reading_thread.cache_clear()
    raise TimeoutError(f"no answer within {limit:g} s")


@cache
def _reading_thread(process_id: int) -> SimpleQueue[tuple[Future[Any], Callable[[], Any]]]:
    """Where calls for the thread of a process are put; a forked process has none of the threads before it."""
    calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()

    def answer_calls() -> None:
        while True:
            answer, call = calls.get()
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)

    threading.Thread(target=answer_calls, daemon=True).start()
    return calls
