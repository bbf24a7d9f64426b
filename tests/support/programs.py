"""Programs and commands of the repository, run by a test: in this process, in one of their own, or in two."""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """Wait until a function gives something true, which is returned.

    Raises:
        AssertionError: the process that should bring it about has ended, or nothing happens.
    """
    deadline = time.monotonic() + HANGS
    while not (answer := happened()):
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.stderr and process.stderr.read()}")
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.01)
    return answer
