"""What is promised, read from the marks of the tests themselves.

    @pytest.mark.promise("B-02", "an utterance gets its numbers whatever its batch pads it to", "1e-12 float64")
    def test_...

One test of a promise words it and gives its tolerance; the others name its id alone: `@pytest.mark.promise("B-02")`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parents[1]


@dataclass
class Promise:
    """
    Attributes:
        id: a letter for the part and a number.
        what: what is promised, in a few words.
        tolerance: largest difference of outputs on the unit scale, or what counts as kept.
        tests: `file::function`, below `tests/`.
    """

    id: str
    what: str = ""
    tolerance: str = ""
    tests: list[str] = field(default_factory=list)


def read_promises(folder: Path = TESTS) -> list[Promise]:
    """All promises in the order of their ids, from the source of the tests, of which none is imported.

    Raises:
        ValueError: no test words a promise, or two do.
    """
    promises: dict[str, Promise] = {}
    for path in sorted(folder.rglob("test_*.py")):
        for test, arguments in _marks(path):
            promise = promises.setdefault(arguments[0], Promise(arguments[0]))
            name = f"{path.relative_to(folder).as_posix()}::{test}"
            promise.tests.append(name)
            if len(arguments) > 1:
                if promise.what:
                    raise ValueError(f"{promise.id} is worded twice, the second time by {name}")
                _, promise.what, promise.tolerance = arguments
    for promise in promises.values():
        if not promise.what:
            raise ValueError(f"{promise.id} is worded by none of its tests: {', '.join(promise.tests)}")
    return sorted(promises.values(), key=lambda promise: promise.id)


def _marks(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(test, arguments of a promise mark) of a file"""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.promise":
                yield node.name, [ast.literal_eval(argument) for argument in mark.args]
