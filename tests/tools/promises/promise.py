"""What a promise is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """
    Attributes:
        id: its short name.
        what: the promise, in a few words.
        tolerance: largest difference of outputs on the unit scale, or what counts as kept.
        tests: `file::function`, below `tests/`.
    """

    id: str
    what: str
    tolerance: str
    tests: tuple[str, ...]


def promise(id: str, what: str, tolerance: str, *tests: str) -> Promise:
    return Promise(id, what, tolerance, tests)
