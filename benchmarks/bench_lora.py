"""A training step with LoRA in the encoder, against one that trains all of the encoder.

    python benchmarks/bench_lora.py [--size base] [--layers 12] [--utterances 4] [--rounds 3] [--device cpu]

Forward, CCC loss, backward and AdamW on turns of realistic lengths, in float32, each with and without gradient
checkpointing. The convolution front end is frozen in full fine-tuning too, as usual; LoRA is this package's default.
Beside them `WavLMModel` with the same adapters, by peft, on the padded batch. The steps run in turn in one process.
Memory is what two steps take beside the weights, gradients and the optimizer's moments included. At the end the same
utterances are encoded with the adapters as they are and merged into the weights.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from measuring import (
    COUNT,
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
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import WavLMConfig, WavLMModel

from modeling_mamba_ema import MambaEMAConfig, MambaEMAForRegression
from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.training import add_lora, merge_lora

FULL, LORA, PADDED = "full fine-tuning", "LoRA", "WavLMModel and peft's LoRA, padded batch"
CHECKPOINTED = ", gradient checkpointing"
VARIANTS = [PADDED, *(variant + suffix for suffix in ("", CHECKPOINTED) for variant in (FULL, LORA))]


class PaddedRegression(nn.Module):
    """`WavLMModel` with the adapters of this package's default, and a linear head on the mean of its frames."""

    def __init__(self, config: WavLMConfig):
        super().__init__()
        adapters = LoraConfig(r=16, lora_alpha=32, target_modules=["intermediate_dense", "output_dense"])
        self.wavlm = get_peft_model(WavLMModel(config), adapters)
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, waveforms: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        frames = self.wavlm(waveforms, attention_mask=attention_mask).last_hidden_state
        return SimpleNamespace(loss=(self.head(frames.mean(dim=1)) - labels).square().mean())


def build(variant: str, arguments: argparse.Namespace) -> Any:
    """A new model, ready for training."""
    torch.manual_seed(0)
    config = wavlm_config(arguments.size)
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    with torch.device(arguments.device):  # drawing a large model's weights on the CPU takes longer than its steps
        if variant == PADDED:
            return PaddedRegression(config).train()
        model = MambaEMAForRegression(MambaEMAConfig(speech_encoder_config=config)).train()
    if variant.startswith(LORA):
        add_lora(model, {}, base="random weights", revision="main")
    else:
        model.freeze_feature_encoder()
    if variant.endswith(CHECKPOINTED):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def step_of(variant: str, arguments: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A training step of a new model, and the number of parameters that it trains."""
    model = build(variant, arguments)
    model.to(arguments.device)
    waveforms, lengths = padded_batch(lengths_in_seconds(arguments.utterances))
    mask = (torch.arange(waveforms.shape[1]) < lengths.unsqueeze(1)).long()
    labels = torch.rand(len(lengths), 2)
    waveforms, mask, labels = (tensor.to(arguments.device) for tensor in (waveforms, mask, labels))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        model(waveforms, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if arguments.device == "cuda":
            torch.cuda.synchronize()

    return step, sum(parameter.numel() for parameter in trained)


def merging_ratio(arguments: argparse.Namespace) -> float:
    """Time of encoding with adapters against the same weights merged, without gradients."""
    adapted = build(LORA, arguments).eval().to(arguments.device)
    merged = copy.deepcopy(adapted)
    merge_lora(merged)
    waveforms, lengths = (tensor.to(arguments.device) for tensor in padded_batch(lengths_in_seconds(4)))

    def encode(model: MambaEMAForRegression) -> None:
        model.speech_encoder.hidden_states(waveforms, lengths, model.speech_encoder.layers)
        if arguments.device == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        times = interleaved({LORA: lambda: encode(adapted), "merged": lambda: encode(merged)}, arguments.rounds)
    return times[LORA] / times["merged"]


def memory_of_two_steps(variant: str, arguments: argparse.Namespace) -> float:
    """GiB beside the weights: of a fresh process on a CPU, where freed memory is not always given back."""
    if arguments.device == "cpu":
        return peak_memory(sys.argv[0], "--once", variant, *sys.argv[1:])
    step, _ = step_of(variant, arguments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    parser = argument_parser(__doc__, size="base", utterances=4, rounds=3)
    parser.add_argument("--layers", type=COUNT, help="transformer layers (default: those of the shape)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--once", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parsed(parser)
    if arguments.once:
        step, _ = step_of(arguments.once, arguments)
        before = resident_memory()
        step()
        step()
        print_growth(before)
        return
    memory = {name: memory_of_two_steps(name, arguments) for name in VARIANTS}
    steps, trained = {}, {}
    for name in VARIANTS:
        steps[name], trained[name] = step_of(name, arguments)
    times = interleaved(steps, arguments.rounds)
    figures = {
        name: {
            "trained": trained[name],
            "seconds": times[name],
            "ratio": times[FULL] / times[name],
            "gib": memory[name],
        }
        for name in VARIANTS
    }
    rows = [
        [name, f"{v['trained'] / 1e6:.2f}", f"{v['seconds']:.2f}", f"{v['ratio']:.2f}x", f"{v['gib']:.2f}"]
        for name, v in figures.items()
    ]
    print(f"WavLM-{arguments.size}, {arguments.utterances} utterances, a step of AdamW; {machine()}\n")
    header = [
        "training step",
        "trained parameters, millions",
        "seconds",
        "faster by",
        "peak memory beside the weights, GiB",
    ]
    print(markdown_table(header, rows))
    ratio = merging_ratio(arguments)
    print(f"\nencoding with the adapters takes {ratio:.2f} times as long as with merged weights")
    report(arguments, {"steps": figures, "encoding_against_merged": ratio})


if __name__ == "__main__":
    main()
