"""The updater over a conversation, side by side with transformers' Mamba mixers, on the CPU.

    python benchmarks/bench_updater.py [--turns 256] [--repeats 15]

All variants run in turn (A B C A B C ...) in one process, on one thread; medians, and ratios to the slowest. Width 256,
batch 1, random weights, the whole conversation at once, forward and backward.
"""

import argparse
import logging
import platform
import statistics
import time

import torch
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from modeling_mamba_ema.conversation_encoder import ConversationEncoder
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


def median_times(functions: dict, turns: torch.Tensor, repeats: int, backward: bool) -> dict[str, float]:
    """Median milliseconds of each function, interleaved, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            with torch.set_grad_enabled(backward):
                output = function(turns)
                if backward:
                    output.sum().backward()
            if round_number:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def streaming_times(turns: int) -> tuple[float, float]:
    """Median milliseconds of a turn at the beginning and at the end of a long stream."""
    torch.manual_seed(0)
    encoder = ConversationEncoder(WIDTH, "mamba_ema", 2, 64, 4, 2, 64, 0.8, False, 0.0).eval()
    state, times = None, []
    turn, mask = torch.randn(1, 1, WIDTH), torch.ones(1, 1, dtype=torch.bool)
    with torch.inference_mode():
        for _ in range(turns):
            started = time.perf_counter()
            _, state = encoder(turn, mask, state)
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[10:510]), statistics.median(times[-500:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=256, help="turns of the conversation (default 256)")
    parser.add_argument("--repeats", type=int, default=15, help="counted rounds (default 15)")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # transformers says that its fast kernels are not there, which is the point
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread, {arguments.turns} turns")
    turns = torch.randn(1, arguments.turns, WIDTH, requires_grad=True)
    functions = variants()
    for backward in (False, True):
        medians = median_times(functions, turns, arguments.repeats, backward)
        slowest = max(medians.values())
        print(f"\n{'forward and backward' if backward else 'forward':<34} {'median ms':>10} {'faster by':>10}")
        for name, value in medians.items():
            print(f"{name:<34} {value:>10.2f} {slowest / value:>9.1f}x")
    early, late = streaming_times(10_000)
    print(f"\none turn of a stream (2 blocks and EMA): {early:.2f} ms at its start, {late:.2f} ms at turn 10,000")


if __name__ == "__main__":
    main()
