"""Which encoder on which machine: speed on one thread, memory and latency, by encoder and precision.

    python benchmarks/bench_precision.py [--encoders base] [--turns 20] [--json FILE]

Each encoder is a whole model of this package with random weights (the tiny one with its own), as `EmotionTracker` runs
it: one turn of 4 s of noise after the other, with one thread. Reported: seconds of audio a second (the median), the
latency of a turn at the 50th and 95th percentile, and the memory of the weights. The precisions run in turn.
"""

import copy
import functools

import numpy as np
import torch
from measuring import COUNT, SIZES, argument_parser, machine, model_with, parsed, report

from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.comparison.costs import seconds_by_round
from modeling_mamba_ema.configuration_mamba_ema import WAVLM_LARGE
from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.inference import EmotionTracker

SECONDS = 4.0


def build(encoder: str) -> MambaEMAForRegression:
    if encoder != "wav2vec2-12":
        return model_with(encoder)
    # The shape of audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim: large, pruned to 12 layers.
    config = {"model_type": "wav2vec2", **WAVLM_LARGE, "num_hidden_layers": 12, "conv_bias": True}
    return MambaEMAForRegression(MambaEMAConfig(speech_encoder_config=config)).eval()


def in_each_precision(model: MambaEMAForRegression) -> dict[str, MambaEMAForRegression]:
    half = copy.deepcopy(model).bfloat16()
    return {
        "float32": model,
        "bfloat16": half,
        "int8": copy.deepcopy(model).quantize_speech_encoder(),
        "int8 with bfloat16": copy.deepcopy(half).quantize_speech_encoder(),
    }


def megabytes(model: torch.nn.Module) -> float:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def main() -> None:
    names = ["tiny", *sorted(SIZES), "wav2vec2-12"]
    parser = argument_parser(__doc__)
    parser.add_argument("--encoders", nargs="+", choices=names, default=names, help="default: all of them")
    parser.add_argument("--turns", type=COUNT, default=20, help="turns that are timed (default 20)")
    arguments = parsed(parser, threads=1)
    torch.manual_seed(0)
    turn = torch.randn(int(SECONDS * 16_000)).numpy()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    rows = []
    for encoder in arguments.encoders:
        models = in_each_precision(build(encoder))
        trackers = {name: EmotionTracker(model, MambaEMAFeatureExtractor()) for name, model in models.items()}
        functions = {name: functools.partial(tracker.update, turn, 16_000) for name, tracker in trackers.items()}
        times = seconds_by_round(functions, arguments.turns)
        figures[encoder] = {}
        for name, seconds in times.items():
            median, slow = np.percentile(seconds, [50, 95])
            values = {"audio_per_second": SECONDS / median, "p50": median, "p95": slow, "mb": megabytes(models[name])}
            figures[encoder][name] = values
            ratio = np.median(times["float32"]) / median
            numbers = [f"{SECONDS / median:.1f}", f"{ratio:.2f}x", f"{1000 * median:.0f}", f"{1000 * slow:.0f}"]
            rows.append([encoder, name, *numbers, f"{values['mb']:.0f}"])
    print(f"turns of {SECONDS:g} s, {torch.get_num_threads()} thread; {machine()}\n")
    header = ["encoder", "precision", "audio seconds a second", "against float32"]
    print(markdown_table([*header, "p50, ms", "p95, ms", "weights, MB"], rows))
    report(arguments, {"encoders": figures})


if __name__ == "__main__":
    main()
