"""Run the tests behind every promise and print what was seen: `python -m tests.tools.report`.

`--write` puts the table into docs/reliability.md. Figures are the largest differences that the tests' comparisons saw,
by precision, and what tests report on their own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tests.tools.promises import PROMISES, Promise
from tests.tools.watcher import Watcher

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: make reliability -->\n", "<!-- end of table -->\n"


# These run in a second process beside the others, for there are two cores. Together they take about as long as the
# others, and nothing in them is held to a time so short that the others could take it from them.
ASIDE = {
    *("page/test_load.py", "training/test_trainer.py", "tools/test_mutations.py"),
    *("test_hostile_files.py", "test_loading_alone.py"),
}


def run_all(tests: set[str]) -> Watcher:
    """Run tests in two processes, their output line by line as it comes; returns what they saw."""
    parts = [sorted(test for test in tests if (test.split("::")[0] in ASIDE) == aside) for aside in (False, True)]
    watcher = Watcher()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(len(parts))]
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(run_part, parts, files))
        for file in files:
            watcher.add(file)
    return watcher


def run_part(tests: list[str], file: Path) -> None:
    command = [sys.executable, "-m", "tests.tools.watcher", str(file), *(f"tests/{test}" for test in tests)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process a core
    with subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)


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
    began = time.monotonic()
    watcher = run_all({test for promise in PROMISES for test in promise.tests})
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
