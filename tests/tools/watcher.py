"""Runs tests and keeps what they saw: `python -m tests.tools.watcher FILE TEST...` writes it to a JSON file."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch


class Watcher:
    """A pytest plugin: which tests passed, and what they saw.

    Attributes:
        outcomes: of each test, by name: one for each of its parameters.
        figures: what a test reports on its own with `record_property("figure", ...)`.
        differences: the largest difference that a test's comparisons saw, by precision.
        seconds: that a test took.
    """

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

    def write(self, path: Path) -> None:
        path.write_text(json.dumps([self.outcomes, self.figures, self.differences, self.seconds]), encoding="utf-8")

    def add(self, path: Path) -> None:
        """What another watcher has written, of other tests."""
        if path.is_file():  # a run that was killed leaves nothing, and its tests count as not run
            for own, other in zip(
                (self.outcomes, self.figures, self.differences, self.seconds),
                json.loads(path.read_text(encoding="utf-8")),
            ):
                own.update(other)


def name_of(node: str) -> str:
    """`tests/file.py::function[parameters]` -> `file.py::function`"""
    return re.sub(r"\[.*", "", node, flags=re.DOTALL).removeprefix("tests/")


def main() -> int:
    watcher = Watcher()
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--disable-warnings"]
    code = pytest.main([*options, *sys.argv[2:]], plugins=[watcher])
    watcher.write(Path(sys.argv[1]))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
