"""The updater over a conversation, side by side with transformers' Mamba mixers, on the CPU.

    python benchmarks/bench_updater.py [--turns 256] [--rounds 15] [--json FILE]

All variants run in turn (A B C A B C ...) in one process, on one thread; medians, and ratios to the slowest. Width 256,
batch 1, random weights, the whole conversation at once, forward and backward.
"""

import logging
import statistics
import time

import torch
from measuring import COUNT, argument_parser, interleaved, machine, parsed, report, resident_memory
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from modeling_mamba_ema.conversation_encoder import ConversationEncoder
from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.mamba2 import Mamba2

WIDTH = 256


def variants() -> dict:
    """Name -> function of (1, turns, width) that returns a tensor of the same shape."""
    torch.manual_seed(0)
    ours = Mamba2(d_model=WIDTH, d_state=64, d_conv=4, expand=2, headdim=64)
    mamba1 = MambaMixer(MambaConfig(hidden_size=WIDTH, state_size=16, conv_kernel=4, expand=2), layer_idx=0)
    mamba2_config = Mamba2Config(hidden_size=WIDTH, state_size=64, conv_kernel=4, expand=2, head_dim=64, num_heads=8)
    mamba2 = Mamba2Mixer(mamba2_config, layer_idx=0)
    return {
        "transformers MambaMixer (loop)": mamba1,
        "transformers Mamba2Mixer": mamba2,
        "ours, Mamba-2": lambda turns: ours(turns, torch.tensor([turns.shape[1]]))[0],
    }


def median_times(functions: dict, turns: torch.Tensor, rounds: int, backward: bool) -> dict[str, float]:
    """Median milliseconds of each function, interleaved."""

    def run(function):
        with torch.set_grad_enabled(backward):
            output = function(turns)
            if backward:
                output.sum().backward()

    calls = {name: lambda function=function: run(function) for name, function in functions.items()}
    return {name: 1000 * seconds for name, seconds in interleaved(calls, rounds).items()}


def streaming_costs(turns: int) -> tuple[float, float, float]:
    """Median milliseconds of a turn at the beginning and at the end of a long stream, and MiB of growth between."""
    torch.manual_seed(0)
    encoder = ConversationEncoder(WIDTH, "mamba_ema", 2, 64, 4, 2, 64, 0.8, False, 0.0).eval()
    state, times = None, []
    turn, mask = torch.randn(1, 1, WIDTH), torch.ones(1, 1, dtype=torch.bool)
    with torch.inference_mode():
        for number in range(turns):
            if number == 500:
                before = resident_memory()
            started = time.perf_counter()
            _, state = encoder(turn, mask, state)
            times.append(1000 * (time.perf_counter() - started))
    grown = 1024 * (resident_memory() - before)
    return statistics.median(times[10:510]), statistics.median(times[-500:]), grown


def main() -> None:
    parser = argument_parser(__doc__, rounds=15)
    parser.add_argument("--turns", type=COUNT, default=256, help="turns of the conversation (default 256)")
    arguments = parsed(parser, threads=1)
    logging.disable(logging.WARNING)  # transformers says that its fast kernels are not there, which is the point
    print(f"{arguments.turns} turns; {machine()}")
    turns = torch.randn(1, arguments.turns, WIDTH, requires_grad=True)
    functions = variants()
    figures = {}
    for name, backward in (("forward", False), ("forward and backward", True)):
        medians = median_times(functions, turns, arguments.rounds, backward)
        slowest = max(medians.values())
        figures[name] = {variant: {"milliseconds": ms, "ratio": slowest / ms} for variant, ms in medians.items()}
        rows = [[variant, f"{ms:.2f}", f"{slowest / ms:.1f}x"] for variant, ms in medians.items()]
        print("\n" + markdown_table([name, "median ms", "faster by"], rows))
    early, late, grown = streaming_costs(10_000)
    print(f"\none turn of a stream (2 blocks and EMA): {early:.2f} ms at its start, {late:.2f} ms at turn 10,000;")
    print(f"memory grew by {grown:.1f} MiB from turn 500 to turn 10,000")
    stream = {"milliseconds": {"start": early, "turn 10,000": late}, "memory_grown_mib": grown}
    report(arguments, {"updater": figures, "stream": stream})


if __name__ == "__main__":
    main()
