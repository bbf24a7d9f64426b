"""The encoder while another process keeps one core busy, which is how servers are.

    python benchmarks/bench_busy.py [--size base] [--utterances 8] [--rounds 3] [--runtimes] [--json FILE]

The other process multiplies matrices with one thread, from before the first round to after the last one, and ends with
this one, however that ends. Everything runs in turn in one process, in float32, with as many threads as there are
cores; this package also with one, to show what the second one is worth.
"""

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_encoder import ALONE, OURS, variants
from measuring import (
    argument_parser,
    interleaved,
    lengths_in_seconds,
    machine,
    padded_batch,
    parsed,
    report,
    wavlm_config,
)
from transformers import WavLMModel

from modeling_mamba_ema.data.markdown_table import markdown_table

LOAD = """
import os, sys, torch
torch.set_num_threads(1)
matrix = torch.randn(512, 512)
print("busy", flush=True)
while os.getppid() == int(sys.argv[1]):
    matrix @ matrix
"""


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", LOAD, str(os.getpid())], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        if process.poll() is not None:
            raise RuntimeError("the process that keeps a core busy has ended early: the figures are of an idle machine")
    finally:
        process.kill()
        process.wait()


def with_one_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return call


def main() -> None:
    parser = argument_parser(__doc__, size="base", utterances=8, rounds=3)
    parser.add_argument("--runtimes", action="store_true", help="onnxruntime and OpenVINO on the exported encoder too")
    arguments = parsed(parser, os.cpu_count())
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = WavLMModel(wavlm_config(arguments.size)).eval()
    waveforms, lengths = padded_batch(lengths_in_seconds(arguments.utterances))
    shipped = variants(model, waveforms, lengths)
    functions = {
        ALONE: shipped[ALONE],
        OURS: shipped[OURS],
        f"{OURS}, one thread": with_one_thread(shipped[OURS]),
    }
    if arguments.runtimes:
        from other_runtimes import exported

        utterances = [row[None, :length].numpy() for row, length in zip(waveforms, lengths.tolist())]
        for name, encode in exported(model).items():
            if name.endswith("float32"):
                functions[name] = lambda encode=encode: [encode(utterance) for utterance in utterances]
    seconds = lengths.sum().item() / 16_000
    with torch.inference_mode():
        idle = interleaved(functions, arguments.rounds)
        with busy_core():
            busy = interleaved(functions, arguments.rounds)
    figures = {
        name: {"idle": seconds / idle[name], "busy": seconds / busy[name], "against_ours": busy[name] / busy[OURS]}
        for name in functions
    }
    print(f"WavLM-{arguments.size}, {arguments.utterances} utterances, {seconds:.1f} s of audio, float32; {machine()}")
    print("audio seconds a second, idle and beside one busy process\n")
    rows = [
        [name, f"{values['idle']:.1f}", f"{values['busy']:.1f}", f"{1 / values['against_ours']:.2f}x"]
        for name, values in figures.items()
    ]
    print(markdown_table(["encoder", "idle", "one core busy", "busy, against this package"], rows))
    report(arguments, {"audio_per_second": figures})


if __name__ == "__main__":
    main()
