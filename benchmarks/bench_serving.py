"""The service under live calls: turns a second and waiting times, in shared passes of the model or one turn at a time.

    python benchmarks/bench_serving.py [--size base] [--seconds 3] [--period 10] [--calls 1 4 16 64] [--json FILE]

A server in a process of its own, over the loopback address. Each call sends its next turn when the last one is
answered, so that the waiting time with N calls holds the N - 1 turns of the others. Server and callers share the
processor's cores. Calls go on for `--period` seconds, and each is heard once at least. It takes 2 to 3 minutes on two
cores, and is no part of `make bench`.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile as sf
from measuring import COUNT, SAMPLE_RATE, argument_parser, machine, model_with, parsed, report

from modeling_mamba_ema.data.markdown_table import markdown_table

VARIANTS = {"one at a time": 1, "in one pass": 16}  # --max-batch


@contextlib.contextmanager
def serving(model: Path, max_batch: int) -> Iterator[str]:
    """The address of a server."""
    options = ["--port", "0", "--max-rate", "1e6", "--max-batch", str(max_batch)]
    command = [sys.executable, "-m", "modeling_mamba_ema", "serve", "--model", str(model), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        yield process.stderr.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()


def waits_of_a_call(address: str, name: str, turn: bytes, until: float) -> list[float]:
    """Seconds from each turn's sending to its answer."""
    waits: list[float] = []
    with httpx.Client(base_url=address, timeout=600, trust_env=False) as service:
        while not waits or time.perf_counter() < until:
            begin = time.perf_counter()
            service.post(f"/sessions/{name}/turns", content=turn).raise_for_status()
            waits.append(time.perf_counter() - begin)
    return waits


def measure(address: str, calls: int, turn: bytes, period: float) -> dict[str, float]:
    """Of so many calls at once, that begin no turn after so many seconds."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(calls) as pool:
        names = [f"{calls}-calls-{call}" for call in range(calls)]
        found = pool.map(lambda name: waits_of_a_call(address, name, turn, begin + period), names)
        waits = [wait for of_call in found for wait in of_call]
    taken = time.perf_counter() - begin
    percentiles = dict(zip(("p50", "p95", "p99"), np.percentile(waits, (50, 95, 99)).tolist()))
    return {"turns": len(waits), "turns_per_second": len(waits) / taken, **percentiles}


def main() -> None:
    parser = argument_parser(__doc__, size="base")
    parser.add_argument("--model", type=Path, help="a saved model instead of random weights of that shape")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn (default 3)")
    parser.add_argument("--period", type=float, default=10.0, help="seconds that calls go on (default 10)")
    parser.add_argument("--calls", type=COUNT, nargs="+", default=[1, 4, 16, 64], help="live calls (default 1 4 16 64)")
    arguments = parsed(parser)
    noise = np.random.default_rng(0).normal(0, 0.1, round(arguments.seconds * SAMPLE_RATE))
    turn = io.BytesIO()
    sf.write(turn, noise.clip(-1, 1), SAMPLE_RATE, format="WAV")

    figures: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = Path(folder)
            model_with(arguments.size).save_pretrained(model)
        for name, max_batch in VARIANTS.items():
            with serving(model, max_batch) as address:
                measure(address, 1, turn.getvalue(), 1.0)  # the first turns load what later ones find
                figures[name] = {
                    calls: measure(address, calls, turn.getvalue(), arguments.period) for calls in arguments.calls
                }

    shape = arguments.model or f"WavLM-{arguments.size}"
    print(f"{shape}, turns of {arguments.seconds:g} s, sent for {arguments.period:g} s; {machine()}\n")
    header = ["live calls", "turns heard", "turns", "turns/s", "p50 s", "p95 s", "p99 s", "turns/s, ratio"]
    print(markdown_table(header, rows_of(figures)))
    report(arguments, {"variants": figures})


def rows_of(figures: dict[str, dict[int, dict[str, Any]]]) -> list[list[str]]:
    """Of the table: the variants beside each other for each number of calls."""
    rows = []
    for calls, reference in figures["one at a time"].items():
        for name, of_calls in figures.items():
            found = of_calls[calls]
            waits = [f"{found[percentile]:.2f}" for percentile in ("p50", "p95", "p99")]
            ratio = found["turns_per_second"] / reference["turns_per_second"]
            counts = [f"{found['turns']}", f"{found['turns_per_second']:.1f}"]
            rows.append([str(calls), name, *counts, *waits, f"{ratio:.2f}"])
    return rows


if __name__ == "__main__":
    main()
