"""WavLM at inference: transformers' `WavLMModel`, padded and one by one, other runtimes, and this package.

    python benchmarks/bench_encoder.py [--size large] [--utterances 8] [--rounds 2] [--runtimes] [--exports]
        [--json FILE]

The variants run in turn in one process on the same noise of realistic lengths (log-normal, median 4 s, 1 to 15 s), with
random weights of the published shape. Reported: seconds of audio per second, the ratios to `WavLMModel` in float32 on
the padded batch and one by one, and the share of this machine's matrix-product peak, measured in the same run, that the
utterances' own operations make. The padded batches, which take several times as long, are timed once, after the others.
Memory is what a fresh process each takes beside the weights, with two of the layers: a layer's memory is free again for
the next.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measuring import (
    argument_parser,
    interleaved,
    lengths_in_seconds,
    machine,
    matrix_product_peak,
    padded_batch,
    parsed,
    peak_memory,
    print_growth,
    report,
    resident_memory,
    wavlm_config,
)
from transformers import WavLMConfig, WavLMModel

from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.fast_speech_encoder import fast_hidden_states, quantize_linear_layers

PADDED = "WavLMModel, padded batch"
ALONE = "WavLMModel, one by one"
OURS = "this package"


def operations(config: WavLMConfig, lengths: list[int]) -> float:
    """GFLOP of the products that `WavLMModel` needs for the utterances alone, two for each multiply-add."""
    width = config.hidden_size
    total = 0
    for steps in lengths:
        channels = 1
        for kernel, stride, wide in zip(config.conv_kernel, config.conv_stride, config.conv_dim):
            steps = (steps - kernel) // stride + 1
            total += 2 * steps * kernel * channels * wide
            channels = wide
        positions = config.num_conv_pos_embeddings * width // config.num_conv_pos_embedding_groups
        total += 2 * steps * width * (channels + positions)
        layer = 2 * width * (4 * width + 2 * config.intermediate_size + 2 * steps) + 2 * 8 * width
        total += config.num_hidden_layers * steps * layer
    return total / 1e9


def variants(model: WavLMModel, waveforms: torch.Tensor, lengths: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The two ways of the shipped model, and ours, for one dtype."""
    dtype = next(model.parameters()).dtype
    waveforms = waveforms.to(dtype)
    mask = (torch.arange(waveforms.shape[1]) < lengths.unsqueeze(1)).long()
    last = [model.config.num_hidden_layers]
    return {
        PADDED: lambda: model(waveforms, attention_mask=mask),
        ALONE: lambda: [model(row[None, :length]) for row, length in zip(waveforms, lengths.tolist())],
        OURS: lambda: fast_hidden_states(model, waveforms, lengths, last),
    }


def run_once(arguments: argparse.Namespace) -> None:
    """One variant on one batch: what the processes that measure memory do. A layer's memory is free for the next."""
    model = WavLMModel(wavlm_config(arguments.size, num_hidden_layers=2)).eval()
    batch = padded_batch(arguments.seconds or lengths_in_seconds(arguments.utterances))
    before = resident_memory()
    with torch.inference_mode():
        variants(model, *batch)[arguments.once]()
    print_growth(before)


def memory(arguments: argparse.Namespace, variant: str, *options: str) -> float:
    return peak_memory(sys.argv[0], "--once", variant, "--size", arguments.size, *options)


def interleaved_variants(
    models: dict[str, WavLMModel],
    runtimes: dict[str, Callable[[Any], Any]],
    waveforms: torch.Tensor,
    lengths: torch.Tensor,
) -> dict[str, Callable[[], Any]]:
    """The variants of a model in each precision, and each runtime one utterance at a time."""
    functions = {
        f"{name}, {precision}": run
        for precision, model in models.items()
        for name, run in variants(model, waveforms, lengths).items()
        if name == OURS or "int8" not in precision
    }
    utterances = [row[None, :length].numpy() for row, length in zip(waveforms, lengths.tolist())]
    for name, encode in runtimes.items():
        functions[name] = lambda encode=encode: [encode(utterance) for utterance in utterances]
    return functions


def main() -> None:
    parser = argument_parser(__doc__, size="large", utterances=8, rounds=2)
    parser.add_argument("--runtimes", action="store_true", help="onnxruntime and OpenVINO on the exported encoder too")
    parser.add_argument("--exports", action="store_true", help="torch.export compiled ahead of time, and OpenVINO's")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, nargs="+", help=argparse.SUPPRESS)
    arguments = parsed(parser)
    warnings.filterwarnings("ignore")
    if arguments.once:
        run_once(arguments)
        return

    torch.manual_seed(0)
    config = wavlm_config(arguments.size)
    waveforms, lengths = padded_batch(lengths_in_seconds(arguments.utterances))
    seconds = lengths.sum().item() / 16_000
    gflop = operations(config, lengths.tolist())
    model = WavLMModel(config).eval()
    models = {"float32": model, "bfloat16": WavLMModel(config).eval().bfloat16()}
    for precision in list(models):
        name = "int8" if precision == "float32" else f"int8 with {precision}"
        models[name] = copy.deepcopy(models[precision])
        quantize_linear_layers(models[name])
    runtimes = {}
    if arguments.runtimes:
        from other_runtimes import exported

        runtimes = exported(model)
    if arguments.exports:
        from other_runtimes import compiled_ahead_of_time, exported_by_transformers

        runtimes["AOTInductor, one by one, float32"] = compiled_ahead_of_time(model)
        runtimes["transformers' OpenVINO export, one by one, float32"] = exported_by_transformers(model)
    # A second of audio warms up what a whole batch would take minutes for.
    short = padded_batch([1.0, 0.5])
    functions, warm_up = (interleaved_variants(models, runtimes, *batch) for batch in ((waveforms, lengths), short))
    with torch.inference_mode():
        padded = {name: functions.pop(name) for name in list(functions) if name.startswith(PADDED)}
        times = interleaved(functions, arguments.rounds, warm_up) | interleaved(padded, 1, warm_up)
    del functions, padded, warm_up, runtimes, models, model  # the processes that measure memory need the room
    peaks = {str(dtype)[6:]: matrix_product_peak(dtype) for dtype in (torch.float32, torch.bfloat16)}
    batch, alone = times[f"{PADDED}, float32"], times[f"{ALONE}, float32"]
    figures: dict[str, Any] = {"seconds_of_audio": seconds, "gflop": gflop, "peak_gflops": peaks, "variants": {}}
    rows = []
    for name, time in sorted(times.items(), key=lambda item: -item[1]):
        peak = peaks.get(name.rpartition(", ")[2])  # there is none for integers: it is the processor's, not torch's
        figures["variants"][name] = {
            "audio_per_second": seconds / time,
            "ratio": batch / time,
            "ratio_to_one_by_one": alone / time,
            "of_peak": peak and gflop / time / peak,
        }
        share = f"{gflop / time / peak:.0%}" if peak else ""
        rows.append([name, f"{seconds / time:.1f}", f"{batch / time:.2f}x", f"{alone / time:.2f}x", share])
    print(f"WavLM-{arguments.size}, {arguments.utterances} utterances, {seconds:.1f} s of audio; {machine()}")
    print("matrix-product peak: " + ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in peaks.items()) + "\n")
    header = ["inference", "audio seconds a second", "against the padded batch", "against one by one", "of the peak"]
    print(markdown_table(header, rows))
    if not arguments.no_memory:
        cases = {
            "1 utterance of 4 s": ["--seconds", "4"],
            "8 utterances": ["--utterances", "8"],
            "32 utterances": ["--utterances", "32"],
            "1 utterance of 60 s": ["--seconds", "60"],
        }
        used = {
            case: {variant: memory(arguments, variant, *options) for variant in (PADDED, OURS)}
            for case, options in cases.items()
        }
        figures["peak_memory_gib"] = used
        rows = [[case, *(f"{value:.2f}" for value in values.values())] for case, values in used.items()]
        print("\n" + markdown_table(["peak memory beside the weights, GiB, float32", "WavLMModel", OURS], rows))
    report(arguments, figures)


if __name__ == "__main__":
    main()
