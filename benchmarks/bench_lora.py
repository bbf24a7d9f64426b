"""A training step with LoRA in the encoder, against one that trains all of the encoder.

    python benchmarks/bench_lora.py [--size base] [--layers 12] [--utterances 4] [--rounds 3] [--device cpu]

Forward, CCC loss, backward and AdamW on turns of realistic lengths, in float32, each with and without gradient
checkpointing. The convolution front end is frozen in full fine-tuning too, as usual; LoRA is this package's default.
The steps run in turn in one process. Memory is what a fresh process each takes for two steps beside the weights,
gradients and the optimizer's moments included.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from measuring import (
    SIZES,
    argument_parser,
    interleaved,
    lengths_in_seconds,
    machine,
    padded_batch,
    peak_memory,
    print_growth,
    report,
    resident_memory,
    table,
    wavlm_config,
)

from modeling_mamba_ema import MambaEMAConfig, MambaEMAForRegression
from modeling_mamba_ema.training import add_lora

FULL, LORA = "full fine-tuning", "LoRA"
CHECKPOINTED = ", gradient checkpointing"
VARIANTS = [variant + suffix for suffix in ("", CHECKPOINTED) for variant in (FULL, LORA)]


def step_of(variant: str, arguments: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A training step of a new model, and the number of parameters that it trains."""
    torch.manual_seed(0)
    config = wavlm_config(arguments.size)
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    model = MambaEMAForRegression(MambaEMAConfig(speech_encoder_config=config)).train()
    if variant.startswith(LORA):
        add_lora(model, {}, base="random weights", revision="main")
    else:
        model.freeze_feature_encoder()
    if variant.endswith(CHECKPOINTED):
        model.gradient_checkpointing_enable({"use_reentrant": False})
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


def print_memory_of_two_steps(arguments: argparse.Namespace) -> None:
    step, _ = step_of(arguments.once, arguments)
    if arguments.device == "cpu":
        before = resident_memory()
        step()
        step()
        print_growth(before)
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    step()
    print("growth GiB", (torch.cuda.max_memory_allocated() - before) / 2**30)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="base", help="shape of the WavLM (default base)")
    parser.add_argument("--layers", type=int, help="transformer layers (default: those of the shape)")
    parser.add_argument("--utterances", type=int, default=4, help="utterances in the batch (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--once", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.once:
        print_memory_of_two_steps(arguments)
        return
    memory = {name: peak_memory(sys.argv[0], "--once", name, *sys.argv[1:]) for name in VARIANTS}
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
    print(table(header, rows))
    report(arguments, {"steps": figures})


if __name__ == "__main__":
    main()
