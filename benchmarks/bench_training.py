"""A training step with the encoder unfrozen: this package against `WavLMModel` on the padded batch.

    python benchmarks/bench_training.py [--size base] [--utterances 4] [--rounds 3] [--json FILE]

Forward, CCC loss on mean-pooled frames, backward; the convolution front end is frozen, as usual in fine-tuning, and
dropout is as WavLM ships it. The two steps run in turn in one process; memory is what a fresh process each takes beside
the weights, gradients included.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from measuring import (
    argument_parser,
    interleaved,
    lengths_in_seconds,
    machine,
    padded_batch,
    parsed,
    peak_memory,
    print_growth,
    report,
    resident_memory,
    wavlm_config,
)
from transformers import WavLMModel

from modeling_mamba_ema.ccc_loss import ccc_loss
from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.fast_speech_encoder import fast_hidden_states

SHIPPED, OURS = "WavLMModel, padded batch", "this package"


def steps(model: WavLMModel, seconds: list[float]) -> dict[str, Callable[[], Any]]:
    """The two steps on utterances of the given lengths."""
    head = torch.nn.Linear(model.config.hidden_size, 2)
    waveforms, lengths = padded_batch(seconds)
    mask = (torch.arange(waveforms.shape[1]) < lengths.unsqueeze(1)).long()
    labels = torch.rand(len(seconds), 2)

    def learn(frames: torch.Tensor) -> None:
        model.zero_grad()
        valid = model._get_feature_vector_attention_mask(frames.shape[1], mask).unsqueeze(-1)
        pooled = (frames * valid).sum(dim=1) / valid.sum(dim=1)
        ccc_loss(head(pooled), labels).backward()

    return {
        SHIPPED: lambda: learn(model(waveforms, attention_mask=mask).last_hidden_state),
        OURS: lambda: learn(fast_hidden_states(model, waveforms, lengths, [model.config.num_hidden_layers])[0]),
    }


def main() -> None:
    parser = argument_parser(__doc__, size="base", utterances=4, rounds=3)
    parser.add_argument("--once", choices=[SHIPPED, OURS], help=argparse.SUPPRESS)
    arguments = parsed(parser)
    torch.manual_seed(0)
    model = WavLMModel(wavlm_config(arguments.size)).train()
    model.feature_extractor.requires_grad_(False)
    functions = steps(model, lengths_in_seconds(arguments.utterances))
    if arguments.once:
        before = resident_memory()
        functions[arguments.once]()
        print_growth(before)
        return
    times = interleaved(functions, arguments.rounds, warm_up=steps(model, [1.0, 0.5]))
    shared = ["--size", arguments.size, "--utterances", str(arguments.utterances)]
    memory = {name: peak_memory(sys.argv[0], "--once", name, *shared) for name in functions}
    figures = {
        name: {"seconds": times[name], "ratio": times[SHIPPED] / times[name], "peak_gib": memory[name]}
        for name in functions
    }
    rows = [
        [name, f"{values['seconds']:.2f}", f"{values['ratio']:.2f}x", f"{values['peak_gib']:.2f}"]
        for name, values in figures.items()
    ]
    print(f"WavLM-{arguments.size}, {arguments.utterances} utterances, forward and backward; {machine()}\n")
    print(markdown_table(["training step", "seconds", "faster by", "peak memory beside the weights, GiB"], rows))
    report(arguments, {"steps": figures})


if __name__ == "__main__":
    main()
