"""The list of promises names tests that exist, and the document shows all of them."""

import ast
from pathlib import Path

from tests.reliability.promises import PROMISES

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
    document = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for promise in PROMISES:
        assert f"| {promise.id} | {promise.what} |" in document
