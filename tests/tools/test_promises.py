"""The list of promises names tests that exist, and the document shows all of them."""

import ast
from pathlib import Path

from tests.tools.promises import PROMISES
from tests.tools.report import BEGIN, DOCUMENT, END, table
from tests.tools.watcher import Watcher

ROOT = Path(__file__).parents[2]


def test_every_named_test_is_there():
    functions: dict[str, set[str]] = {}
    for promise in PROMISES:
        for test in promise.tests:
            file, function = test.split("::")
            if file not in functions:
                tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
                functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in functions[file], test


def test_every_promise_has_a_name_of_its_own_and_stands_in_the_document():
    ids = [promise.id for promise in PROMISES]
    assert len(ids) == len(set(ids))
    document = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert without_what_was_seen(document) == without_what_was_seen(table(Watcher()))


def without_what_was_seen(rows: str) -> list[list[str]]:
    """Id, promise, tolerance and tests of each row, all as the document words them."""
    cells = [row.strip("| ").split(" | ") for row in rows.splitlines()]
    return [[*row[:3], row[-1]] for row in cells]
