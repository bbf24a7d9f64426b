"""`mamba-ema score` with one process and with two, and what going on with a finished folder costs.

    python benchmarks/bench_scoring.py [--size tiny] [--turns 480] [--rounds 2] [--json FILE]

The variants take turns; medians are shown. "tiny" is the encoder that ships with the package, as in the demo, "base"
the shape of WavLM-base (give fewer --turns then: 96). One process has a thread for each core, two have half of them
each. Turns a second count from when each process has finished a part, without the start, which stands beside. It
takes about 2 minutes on two cores, and is no part of `make bench`.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import COUNT, argument_parser, machine, model_with, parsed, report, write_corpus

from modeling_mamba_ema.data.markdown_table import markdown_table

PARTS = 32


def score(folder: Path, output: Path, workers: int, turns: int) -> dict[str, float]:
    """Seconds of the whole command, and turns a second without its start."""
    command = [sys.executable, "-W", "ignore", "-m", "modeling_mamba_ema", "score", "--model", str(folder / "model")]
    options = ["--workers", str(workers), "--rows-per-part", str(max(4, turns // PARTS)), "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    begin = time.perf_counter()
    subprocess.run([*command, str(folder / "corpus"), *options], check=True, capture_output=True, env=environment)
    seconds = time.perf_counter() - begin
    finished = sorted(path.stat().st_mtime for path in output.glob("part-*.parquet"))
    share = (len(finished) - workers) / len(finished)  # of the turns, after each process has finished a part
    return {"seconds": seconds, "turns_per_second": share * turns / (finished[-1] - finished[workers - 1])}


def main() -> None:
    parser = argument_parser(__doc__, rounds=2)
    parser.add_argument("--size", choices=["tiny", "base", "large"], default="tiny", help="of the encoder (tiny)")
    parser.add_argument("--turns", type=COUNT, default=480, help="of the corpus (480)")
    arguments = parsed(parser)
    found: dict[str, list[dict[str, float]]] = {"1 process": [], "2 processes": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_with(arguments.size).save_pretrained(folder / "model")
        write_corpus(folder / "corpus", arguments.turns)
        for number in range(arguments.rounds):
            for workers, runs in enumerate(found.values(), start=1):
                runs.append(score(folder, folder / f"{number}-{workers}", workers, arguments.turns))
        again = score(folder, folder / "0-1", 1, arguments.turns)["seconds"]
    figures: dict[str, Any] = {
        variant: {what: statistics.median(run[what] for run in runs) for what in runs[0]}
        for variant, runs in found.items()
    }
    reference = figures["1 process"]["turns_per_second"]
    rows = [
        [variant, f"{of['turns_per_second']:.1f}", f"{of['turns_per_second'] / reference:.2f}", f"{of['seconds']:.1f}"]
        for variant, of in figures.items()
    ]
    print(f"encoder: {arguments.size}, {arguments.turns} turns, medians of {arguments.rounds} rounds; {machine()}\n")
    print(markdown_table(["score", "turns/s", "ratio", "s of the whole command"], rows))
    ratio = figures["2 processes"]["turns_per_second"] / reference
    print(f"\n1 -> 2 processes: {ratio:.2f} times the turns a second")
    print(f"The same command on a folder that is complete: {again:.1f} s")
    report(arguments, {"variants": figures, "seconds_again": again})


if __name__ == "__main__":
    main()
