"""What every benchmark here shares: the machine, its peak, a realistic mix of lengths."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import WavLMConfig

from modeling_mamba_ema import MambaEMAConfig, MambaEMAForRegression, tiny_wavlm
from modeling_mamba_ema.commands.model_options import number_between
from modeling_mamba_ema.comparison.costs import seconds_by_round
from modeling_mamba_ema.configuration_mamba_ema import WAVLM_LARGE
from modeling_mamba_ema.fast_speech_encoder import GROUP_FRAMES
from modeling_mamba_ema.fast_speech_encoder import linear as fused_linear

SAMPLE_RATE = 16_000
# "base" needs nothing: the defaults of WavLMConfig are microsoft/wavlm-base.
SIZES: dict[str, dict[str, Any]] = {"large": WAVLM_LARGE, "base": {}}

COUNT = number_between(1, 10**9, int)  # the type of options such as --rounds
TRUSTED_SPREAD = 0.1  # of repeated rounds, relative to their median


def interleaved(
    functions: dict[str, Callable[[], Any]], rounds: int, warm_up: dict[str, Callable[[], Any]] | None = None
) -> dict[str, float]:
    """Median seconds of each function, run in turn; says so where the rounds differ too much to be trusted.

    Their spread is that of the middle half of the rounds, of all of them where there are fewer than four.
    """
    medians = {}
    for name, values in seconds_by_round(functions, rounds, warm_up).items():
        values, median = sorted(values), statistics.median(values)
        spread = (values[-1 - rounds // 4] - values[rounds // 4]) / median
        if spread > TRUSTED_SPREAD:
            print(f"the machine was too busy to trust this: rounds of {name!r} differed by {spread:.0%}", flush=True)
        medians[name] = median
    return medians


def wavlm_config(size: str, **changes: Any) -> WavLMConfig:
    """The shape of microsoft/wavlm-large or -base; weights stay random, which changes no time."""
    return WavLMConfig(**{**SIZES[size], "layerdrop": 0.0, "apply_spec_augment": False, **changes})


def model_with(size: str) -> MambaEMAForRegression:
    """A model whose encoder has this shape and random weights; "tiny": the encoder that ships with the package."""
    if size == "tiny":
        return MambaEMAForRegression.from_pretrained_speech_encoder(tiny_wavlm.FOLDER).eval()
    return MambaEMAForRegression(MambaEMAConfig(speech_encoder_config=wavlm_config(size).to_dict())).eval()


def write_corpus(folder: Path, turns: int) -> float:
    """Conversations of four turns of noise with labels, of the lengths that speech has; returns their seconds."""
    import soundfile as sf  # not needed by the benchmarks of the encoder, which run where nothing else is installed

    folder.mkdir()
    random, rows, lengths = np.random.default_rng(0), [], lengths_in_seconds(turns)
    for turn, seconds in enumerate(lengths):
        sf.write(folder / f"{turn}.wav", random.normal(0, 0.1, int(SAMPLE_RATE * seconds)), SAMPLE_RATE)
        valence, arousal = random.random(2)
        row = {"file_name": f"{turn}.wav", "conversation_id": turn // 4, "turn": turn % 4}
        rows.append({**row, "valence": valence, "arousal": arousal})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return sum(lengths)


def lengths_in_seconds(count: int) -> list[float]:
    """Lengths of turns as in speech corpora: log-normal, median 4 s, between 1 and 15 s, in shuffled order.

    They are the distribution's quantiles, so that a small batch is as typical as a large one.
    """
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)
    seconds = (4.0 * torch.exp(0.6 * quantiles)).clamp(1.0, 15.0)
    return seconds[torch.randperm(count, generator=torch.Generator().manual_seed(0))].tolist()


def padded_batch(seconds: list[float], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of the given lengths: (batch, samples), right-padded with zeros, and (batch,) samples."""
    lengths = torch.tensor([int(length * SAMPLE_RATE) for length in seconds])
    waveforms = torch.zeros(len(seconds), int(lengths.max()))
    generator = torch.Generator().manual_seed(1)
    for row, length in zip(waveforms, lengths.tolist()):
        row[:length] = torch.randn(length, generator=generator)
    return waveforms.to(dtype), lengths


def matrix_product_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the product that WavLM-large spends most on, by the faster of torch and oneDNN: median of 20."""
    rows, width, wide = GROUP_FRAMES, 1024, 4096
    frames, linear = torch.randn(rows, width).to(dtype), torch.nn.Linear(width, wide).to(dtype)
    with torch.inference_mode():
        seconds = interleaved({"torch": lambda: linear(frames), "oneDNN": lambda: fused_linear(frames, linear)}, 20)
    return 2 * rows * width * wide / min(seconds.values()) / 1e9


def peak_memory(script: str, *arguments: str) -> float:
    """GiB that a new process running `script` took beside what it had, as its last call of [`print_growth`] tells."""
    command = [sys.executable, "-W", "ignore", script, *arguments]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(finished.stdout.rsplit("growth GiB ", 1)[1])


def resident_memory() -> float:
    """GiB of this process now, from where on the peak is counted anew (Linux): building a model takes more than it."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_of_process() -> float:
    """GiB, the most since [`resident_memory`]."""
    return _status("VmHWM")


def print_growth(before: float) -> None:
    print("growth GiB", peak_of_process() - before)


def _status(field: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 2**20


def machine() -> dict[str, Any]:
    """What a reader needs to know to compare figures."""
    processor = platform.processor() or platform.machine()
    flags: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        fields = {name.strip(): value.strip() for name, value in lines}
        processor = fields.get("model name", processor)
        flags = set(fields.get("flags", "").split())
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def argument_parser(
    description: str | None, size: str | None = None, utterances: int | None = None, rounds: int | None = None
) -> argparse.ArgumentParser:
    """The options that every benchmark has, and those of the others that have a default here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=COUNT, help="threads of torch (default: its own choice)")
    if size is not None:
        parser.add_argument("--size", choices=sorted(SIZES), default=size, help="shape of the WavLM (%(default)s)")
    if utterances is not None:
        parser.add_argument("--utterances", type=COUNT, default=utterances, help="in the batch (%(default)s)")
    if rounds is not None:
        parser.add_argument("--rounds", type=COUNT, default=rounds, help="counted rounds (%(default)s)")
    return parser


def parsed(parser: argparse.ArgumentParser, threads: int | None = None) -> argparse.Namespace:
    """The arguments; torch has `--threads` threads from now on, or as many as are given here."""
    arguments = parser.parse_args()
    if count := arguments.threads or threads:
        torch.set_num_threads(count)
    return arguments


def report(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures with the machine's description, where a file was asked for."""
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n", encoding="utf-8")
