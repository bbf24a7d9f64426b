"""Many files looked at in threads: most of the time is waiting for the disk, during which libsndfile lets others run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 8
_TOGETHER = 256  # items a thread takes at once; handing over single ones costs more than reading a header


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`[function(item) for item in items]`; the first exception ends it."""
    parts = [items[begin : begin + _TOGETHER] for begin in range(0, len(items), _TOGETHER)]
    with ThreadPoolExecutor(_THREADS) as threads:
        return [result for part in threads.map(lambda part: [function(item) for item in part], parts) for result in part]
