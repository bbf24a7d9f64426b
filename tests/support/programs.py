"""Programs and commands of the repository, run by a test: in this process, in one of their own, or in two."""

import atexit
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers

from modeling_mamba_ema.__main__ import main

ROOT = Path(__file__).parents[2]
# Nothing is as slow as that: what takes longer hangs.
HANGS = 600.0  # seconds


def environment(**variables: str) -> dict[str, str]:
    """That of this process, with the package on the path, one thread and no GPU."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def run_program(*arguments: Any, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in a process of its own, in the repository's folder."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    if check and result.returncode != 0:
        raise AssertionError(f"{arguments} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def start_program(*arguments: Any, **variables: str) -> subprocess.Popen[str]:
    """As [`run_program`], without waiting; standard error is read by the caller."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


# What training and serving import takes seconds; a process that has imported it gives each program a copy of itself.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["modeling_mamba_ema.training", "modeling_mamba_ema.serving", "modeling_mamba_ema.inference", __name__]
)


class Forked:
    """A program in a process of its own, with the methods of [`subprocess.Popen`] that tests need.

    Args:
        arguments: those of Python: a file, or `-m` or `-c` and what follows, with the program's own.
        variables: of its environment.
    """

    def __init__(self, *arguments: Any, **variables: str):
        self._printed = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 (a pipe could fill up)
        words = [str(argument) for argument in arguments]
        self._process = _FORKS.Process(target=_run_forked, args=(words, variables, self._printed.name))
        with patch.dict(os.environ, environment()):  # the first one starts the process of which all are copies
            self._process.start()
        atexit.register(self.kill)  # multiprocessing waits at its end for all that still run
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def printed(self) -> str:
        """Its standard output and standard error so far."""
        self._printed.seek(0)
        return self._printed.read()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = HANGS) -> int:
        self._process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired(self.printed[-2_000:], timeout)
        return code


def _run_forked(words: list[str], variables: dict[str, str], printed: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), stream.fileno())
    os.chdir(ROOT)
    os.environ.update(environment(**variables))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_warning()
    kind, sys.argv = words[0], words[1:] if words[0] in ("-m", "-c") else words
    if kind == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


def fork_two(*arguments: Any) -> list[Forked]:
    """A program in two processes that find each other as those of `torchrun` do."""
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Forked(*arguments, RANK=rank, LOCAL_RANK=rank, **where) for rank in "01"]


# Runs several programs one after the other in the processes of one launch, which take longer to start than to run.
_ONE_AFTER_THE_OTHER = """
import atexit, contextlib, json, os, runpy, sys
from accelerate import PartialState

@atexit.register  # called after what the programs register
def no_thread_of_gloo_is_left():
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            if open(f"/proc/self/task/{thread}/comm").read() == "pt_gloo_runloop\\n":
                print("a thread of gloo is left, which may abort the process", file=sys.stderr, flush=True)
                os._exit(1)

for path, *arguments in json.loads(sys.argv[1]):
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
PartialState().wait_for_everyone()
"""


def launch_two_processes(folder: Path, *programs: list[str]) -> None:
    """Run programs one after the other in two processes, started as people start them: by `accelerate launch`."""
    script = folder / "one_after_the_other.py"
    script.write_text(_ONE_AFTER_THE_OTHER)
    command = ["-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/cpu_two_processes.yaml"]
    run_program(*command, "--main_process_port", free_port(), script, json.dumps(programs))


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run all at once; the results in order."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [result.result(HANGS) for result in [pool.submit(job) for job in jobs]]


def resident_memory(process: int) -> float:
    """MB that a process holds; skips the test where there is no /proc."""
    status = Path(f"/proc/{process}/status")
    if not status.is_file():
        pytest.skip("needs Linux's /proc")
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text()).group(1)) / 1024


@contextmanager
def allocating_below(limit: float) -> Iterator[None]:
    """What runs may take that many bytes of Python's and numpy's memory at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def call_program(path: str, *arguments: Any) -> int:
    """A program of examples/ with its arguments, in this process, which saves the seconds that importing takes."""
    verbosity, argv = transformers.utils.logging.get_verbosity(), sys.argv
    sys.argv = [path, *map(str, arguments)]
    try:
        with warnings.catch_warnings():
            runpy.run_path(str(ROOT / path), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):  # as Python itself would end
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
        transformers.utils.logging.set_verbosity(verbosity)
    return 0


def call_command(*arguments: Any) -> int:
    """A command of `mamba-ema` in this process."""
    verbosity = transformers.utils.logging.get_verbosity()
    try:
        with warnings.catch_warnings():
            return main([str(argument) for argument in arguments])
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[str] | Forked | None = None) -> Any:
    """Wait until a function gives something true, which is returned.

    Raises:
        AssertionError: the process that should bring it about has ended, or nothing happens.
    """
    deadline = time.monotonic() + HANGS
    while not (answer := happened()):
        if process is not None and process.poll() is not None:
            printed = process.printed if isinstance(process, Forked) else process.stderr and process.stderr.read()
            raise AssertionError(f"ended with {process.returncode}: {printed}")
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.01)
    return answer
