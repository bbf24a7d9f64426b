"""Run the tests behind every promise and print what was seen: `python -m tests.reliability.report`.

`--write` puts the table into docs/reliability.md. Figures are the largest differences that the tests' comparisons saw,
by precision, and what tests report on their own.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reliability.promises import PROMISES, Promise

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: make reliability -->\n", "<!-- end of table -->\n"


class Watcher:
    """A pytest plugin: which tests passed, and what they saw."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = defaultdict(list)
        self.figures: dict[str, list[str]] = defaultdict(list)
        self.differences: dict[str, dict[str, float]] = defaultdict(dict)
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self._running = name_of(item.nodeid)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.testing, "assert_close", self._watched(torch.testing.assert_close))
            return (yield)

    def _watched(self, compare: Any) -> Any:
        def watched(actual: Any, expected: Any, *args: Any, **options: Any) -> None:
            compare(actual, expected, *args, **options)
            # With a relative tolerance the difference itself says little.
            if not options.get("rtol") and isinstance(actual, torch.Tensor) and actual.is_floating_point():
                gap = torch.as_tensor(actual).double() - torch.as_tensor(expected).double()
                seen = self.differences[self._running]
                precision = str(actual.dtype).removeprefix("torch.")
                seen[precision] = max(seen.get(precision, 0.0), float(gap.nan_to_num(0.0).abs().max()))

        return watched

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = name_of(report.nodeid)
        self.seconds[name] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name].append(report.outcome)
            self.figures[name] += [str(value) for key, value in report.user_properties if key == "figure"]


def name_of(node: str) -> str:
    """`tests/file.py::function[parameters]` -> `file.py::function`"""
    return re.sub(r"\[.*", "", node, flags=re.DOTALL).removeprefix("tests/")


def seen_by(promise: Promise, watcher: Watcher) -> str:
    """The figures of a promise's tests in one line."""
    differences: dict[str, float] = {}
    for test in promise.tests:
        for precision, value in watcher.differences[test].items():
            differences[precision] = max(differences.get(precision, 0.0), value)
    parts = [f"{value:.1e} {precision}" for precision, value in sorted(differences.items(), reverse=True)]
    parts += [figure for test in promise.tests for figure in watcher.figures[test]]
    if not parts:
        outcomes = [outcome for test in promise.tests for outcome in watcher.outcomes[test]]
        parts = [f"{outcomes.count('passed')} of {len(outcomes)}"]
    return "; ".join(parts)


def is_kept(promise: Promise, watcher: Watcher) -> bool:
    """Every test of it ran, and none failed."""
    outcomes = [watcher.outcomes[test] for test in promise.tests]
    return all("passed" in found and "failed" not in found for found in outcomes)


def table(watcher: Watcher) -> str:
    lines = ["| id | promise | tolerance | seen | tests |", "| --- | --- | --- | --- | --- |"]
    for promise in PROMISES:
        tests = "<br>".join(f"`{test}`" for test in promise.tests)
        seen = seen_by(promise, watcher) + ("" if is_kept(promise, watcher) else " **BROKEN**")
        lines.append(f"| {promise.id} | {promise.what} | {promise.tolerance} | {seen} | {tests} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    os.chdir(ROOT)
    watcher, began = Watcher(), time.monotonic()
    nodes = sorted({f"tests/{test}" for promise in PROMISES for test in promise.tests})
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "--disable-warnings", *nodes], plugins=[watcher])
    print()
    for promise in PROMISES:
        kept = "kept  " if is_kept(promise, watcher) else "BROKEN"
        print(f"{promise.id}  {kept}  {promise.what}")
        print(f"{'':14}allowed: {promise.tolerance}; seen: {seen_by(promise, watcher)}")
    broken = [promise.id for promise in PROMISES if not is_kept(promise, watcher)]
    count = sum(len(outcomes) for outcomes in watcher.outcomes.values())
    print(
        f"\n{len(PROMISES) - len(broken)} of {len(PROMISES)} promises kept; {count} tests in "
        f"{time.monotonic() - began:.0f} s; torch {torch.__version__}, numpy {np.__version__}, {os.cpu_count()} cores"
    )
    slowest = sorted(watcher.seconds.items(), key=lambda pair: -pair[1])[:5]
    print("slowest: " + ", ".join(f"{name.split('::')[1]} {seconds:.0f} s" for name, seconds in slowest))
    if options.write:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        DOCUMENT.write_text(before + BEGIN + table(watcher) + END + after, encoding="utf-8")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
