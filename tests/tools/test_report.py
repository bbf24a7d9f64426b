"""The report calls a promise kept only if its tests ran and passed, and shows the figures they saw."""

import os

import pytest

from tests.tools.promises import Promise, read_promises
from tests.tools.report import BEGIN, END, Seen, is_kept, run, seen_by, table, write

PROMISE = Promise("X-01", "two tests pass", "exact", ["test_one.py::test_a", "test_two.py::test_b"])


def seen(**outcomes):
    made = Seen()
    for test, name in zip(PROMISE.tests, "ab", strict=True):
        if name in outcomes:
            made.outcomes[test] = outcomes[name]
    return made


@pytest.mark.parametrize(
    ("outcomes", "kept", "words"),
    [
        ({"a": ["passed"], "b": ["passed", "passed"]}, True, "3 of 3"),
        ({"a": ["passed"], "b": ["passed", "skipped"]}, True, "2 of 3"),
        ({"a": ["passed"], "b": ["passed", "failed"]}, False, "2 of 3"),
        ({"a": ["passed"], "b": ["skipped", "skipped"]}, False, "1 of 3"),
        ({"a": ["passed"]}, False, "1 of 1"),
        ({}, False, "0 of 0"),
    ],
)
def test_a_promise_is_kept_only_if_each_of_its_tests_ran_and_none_failed(outcomes, kept, words):
    assert is_kept(PROMISE, seen(**outcomes)) is kept
    assert seen_by(PROMISE, seen(**outcomes)) == words


def test_the_largest_difference_of_each_precision_is_shown_before_the_figures():
    both = seen(a=["passed"], b=["passed"])
    first, second = PROMISE.tests
    both.differences[first] = {"float32": 1e-6, "float64": 1e-15}
    both.differences[second] = {"float32": 2e-6}
    both.figures[second] = ["3 s"]
    assert seen_by(PROMISE, both) == "1.0e-15 float64; 2.0e-06 float32; 3 s"


TESTS = """
import pytest, torch

@pytest.mark.promise("X-01", "what", "1e-3")
@pytest.mark.parametrize("gap", [1e-4, 5e-4])
def test_measured(gap):
    torch.testing.assert_close(torch.tensor(1.0 + gap), torch.tensor(1.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(2.0), torch.tensor(1.0), rtol=2.0, atol=0)  # its size says nothing

@pytest.mark.promise("X-01")
def test_reported(record_property):
    record_property("figure", "3 s")

@pytest.mark.promise("X-02", "what", "0")
def test_broken():
    torch.testing.assert_close(torch.tensor(2.0), torch.tensor(1.0))

def test_without_promise():
    raise AssertionError
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestAssertRewriteWarning")
def test_a_run_keeps_what_the_tests_of_promises_saw_and_runs_no_others(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text(TESTS)
    seen = run(tmp_path, "-c", os.devnull, "--rootdir", str(tmp_path))
    kept, broken = read_promises(tmp_path)
    assert is_kept(kept, seen)
    assert seen_by(kept, seen) == "5.0e-04 float32; 3 s"
    assert not is_kept(broken, seen)
    assert "**BROKEN**" in table([broken], seen)
    assert "test_some.py::test_without_promise" not in seen.outcomes


def test_the_table_takes_the_place_of_the_one_before(tmp_path):
    document = tmp_path / "reliability.md"
    document.write_text(f"before\n{BEGIN}| old |\n{END}after\n")
    write("| new |\n", document)
    assert document.read_text() == f"before\n{BEGIN}| new |\n{END}after\n"
