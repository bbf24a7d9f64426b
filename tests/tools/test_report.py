"""The report calls a promise kept only if its tests ran and passed, and no answer that is none counts as equal."""

import math

import pytest

from tests.tools.compat import largest_difference
from tests.tools.promises.promise import promise
from tests.tools.report import is_kept, seen_by
from tests.tools.watcher import Watcher

PROMISE = promise("X-01", "two tests pass", "exact", "test_one.py::test_a", "test_two.py::test_b")


def watcher_of(**outcomes):
    watcher = Watcher()
    for test, name in zip(PROMISE.tests, "ab", strict=True):
        if name in outcomes:
            watcher.outcomes[test] = outcomes[name]
    return watcher


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ([[[0.5, 0.25]]], 0.0),
        ([[[0.5, 0.75]]], 0.5),
        ([[[0.5, math.nan]]], math.inf),
        ([[[0.5, math.inf]]], math.inf),
        ([[[0.5]]], math.inf),
        ([[]], math.inf),
    ],
)
def test_a_number_that_is_missing_or_is_none_differs_infinitely(other, difference):
    assert largest_difference([[[0.5, 0.25]]], other) == difference
    assert largest_difference(other, [[[0.5, 0.25]]]) == difference


def test_two_answers_without_numbers_are_not_equal():
    assert largest_difference([[]], [[]]) == math.inf
    assert largest_difference([[[math.nan]]], [[[math.nan]]]) == math.inf


@pytest.mark.parametrize(
    ("outcomes", "kept", "seen"),
    [
        ({"a": ["passed"], "b": ["passed", "passed"]}, True, "3 of 3"),
        ({"a": ["passed"], "b": ["passed", "skipped"]}, True, "2 of 3"),
        ({"a": ["passed"], "b": ["passed", "failed"]}, False, "2 of 3"),
        ({"a": ["passed"], "b": ["skipped", "skipped"]}, False, "1 of 3"),
        ({"a": ["passed"]}, False, "1 of 1"),
        ({}, False, "0 of 0"),
    ],
)
def test_a_promise_is_kept_only_if_each_of_its_tests_ran_and_none_failed(outcomes, kept, seen):
    watcher = watcher_of(**outcomes)
    assert is_kept(PROMISE, watcher) is kept
    assert seen_by(PROMISE, watcher) == seen


def test_the_largest_difference_of_each_precision_is_shown_before_the_figures():
    watcher = watcher_of(a=["passed"], b=["passed"])
    first, second = PROMISE.tests
    watcher.differences[first] = {"float32": 1e-6, "float64": 1e-15}
    watcher.differences[second] = {"float32": 2e-6}
    watcher.figures[second] = ["3 s"]
    assert seen_by(PROMISE, watcher) == "1.0e-15 float64; 2.0e-06 float32; 3 s"


def test_what_two_watchers_wrote_is_put_together_and_a_missing_file_counts_as_not_run(tmp_path):
    first, second = PROMISE.tests
    one, two, both = watcher_of(a=["passed"]), watcher_of(b=["passed"]), Watcher()
    one.differences[first], two.figures[second], two.seconds[second] = {"float32": 1e-6}, ["3 s"], 3.0
    one.write(tmp_path / "one.json")
    two.write(tmp_path / "two.json")

    both.add(tmp_path / "one.json")
    both.add(tmp_path / "none.json")
    assert not is_kept(PROMISE, both)
    both.add(tmp_path / "two.json")
    assert is_kept(PROMISE, both)
    assert seen_by(PROMISE, both) == "1.0e-06 float32; 3 s"
    assert both.seconds == {second: 3.0}
