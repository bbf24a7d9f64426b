"""The process that keeps a core busy while the encoder is measured does not outlive the benchmark."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import bench_busy
with bench_busy.busy_core():
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process keeps the number of a parent that has ended")
def test_the_load_ends_when_the_benchmark_is_killed():
    # Both write to the same pipe, which is at its end when both have ended.
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(BENCHMARKS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(), text=True) as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == -9, errors
