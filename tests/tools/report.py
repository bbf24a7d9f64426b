"""Run the tests behind every promise and print what was seen: `python -m tests.tools.report` (`make reliability`).

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

import numpy as np
import pytest
import torch

from tests.tools.promises import TESTS, Promise, read_promises

DOCUMENT = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- table: make reliability -->\n", "<!-- end of table -->\n"


class Seen:
    """A pytest plugin that keeps, by `file::function`, what the tests of a run saw.

    Attributes:
        outcomes: one for each of a test's parameters.
        figures: what a test reports on its own.
        differences: the largest difference that a test's comparisons saw, by precision.
        seconds: that a test took.
    """

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = defaultdict(list)
        self.figures: dict[str, list[str]] = defaultdict(list)
        self.differences: dict[str, dict[str, float]] = defaultdict(dict)
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = re.sub(r"\[.*", "", report.nodeid, flags=re.DOTALL).removeprefix("tests/")
        self.seconds[name] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name].append(report.outcome)
            properties = dict[str, list](figure=[], difference=[])
            for key, value in report.user_properties:
                properties[key].append(value)
            self.figures[name] += map(str, properties["figure"])
            for precision, value in properties["difference"]:
                largest = self.differences[name]
                largest[precision] = max(largest.get(precision, 0.0), value)


def seen_by(promise: Promise, seen: Seen) -> str:
    """The figures of a promise's tests in one line."""
    differences: dict[str, float] = {}
    for test in promise.tests:
        for precision, value in seen.differences[test].items():
            differences[precision] = max(differences.get(precision, 0.0), value)
    parts = [f"{value:.1e} {precision}" for precision, value in sorted(differences.items(), reverse=True)]
    parts += [figure for test in promise.tests for figure in seen.figures[test]]
    if not parts:
        outcomes = [outcome for test in promise.tests for outcome in seen.outcomes[test]]
        parts = [f"{outcomes.count('passed')} of {len(outcomes)}"]
    return "; ".join(parts)


def is_kept(promise: Promise, seen: Seen) -> bool:
    """Every test of it ran, and none failed."""
    outcomes = [seen.outcomes[test] for test in promise.tests]
    return all("passed" in found and "failed" not in found for found in outcomes)


def table(promises: list[Promise], seen: Seen) -> str:
    lines = ["| id | promise | tolerance | seen | tests |", "| --- | --- | --- | --- | --- |"]
    for promise in promises:
        tests = "<br>".join(f"`{test}`" for test in promise.tests)
        figures = seen_by(promise, seen) + ("" if is_kept(promise, seen) else " **BROKEN**")
        lines.append(f"| {promise.id} | {promise.what} | {promise.tolerance} | {figures} | {tests} |")
    return "\n".join(lines) + "\n"


def run(folder: Path = TESTS, *options: str) -> Seen:
    """Run the tests of all promises, those marked slow among them."""
    seen = Seen()
    usual = ["-m", "promise", "-q", "--no-header", "--disable-warnings", "-p", "no:cacheprovider"]
    pytest.main([*usual, "-p", "tests.tools.watcher", *options, str(folder)], plugins=[seen])
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    began, promises = time.monotonic(), read_promises()
    seen = run(TESTS, "-n", "2", "--dist", "loadfile")
    print()
    for promise in promises:
        print(f"{promise.id}  {'kept  ' if is_kept(promise, seen) else 'BROKEN'}  {promise.what}")
        print(f"{'':14}allowed: {promise.tolerance}; seen: {seen_by(promise, seen)}")
    broken = [promise.id for promise in promises if not is_kept(promise, seen)]
    count = sum(len(outcomes) for outcomes in seen.outcomes.values())
    print(
        f"\n{len(promises) - len(broken)} of {len(promises)} promises kept; {count} tests in "
        f"{time.monotonic() - began:.0f} s; torch {torch.__version__}, numpy {np.__version__}, {os.cpu_count()} cores"
    )
    slowest = sorted(seen.seconds.items(), key=lambda pair: -pair[1])[:5]
    print("slowest: " + ", ".join(f"{name.split('::')[1]} {seconds:.0f} s" for name, seconds in slowest))
    if options.write:
        write(table(promises, seen))
    return int(bool(broken))


def write(rows: str, document: Path = DOCUMENT) -> None:
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    document.write_text(before + BEGIN + rows + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
