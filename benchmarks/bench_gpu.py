"""One CUDA device: WavLM as transformers ships it and as this package runs it, and the updater's steps.

    python benchmarks/bench_gpu.py [--rounds 10] [--compile] [--json FILE]      (or: make bench-gpu)

Utterances of 4 s and 15 s in batches of 1, 8 and 32, and 32 of realistic lengths, in WavLM-large's shape with random
weights. Variants run in turn in one process; times are the wall clock's until the device has finished, medians, after
one round that is not counted. The roofline of a batch is the longer of two times, each with a peak measured in the same
run: its products at the rate of a large product in the same dtype (float32 without TF32, as torch's default is), and
one reading of the weights at the rate of a large copy.

With `--compile`, "layers compiled" is `torch.compile(..., dynamic=True)` around this package's transformer layer. It
compiles anew for every number of utterances and every pattern of equal lengths, which takes minutes, so the package
does not use it; the row shows what is left to gain. Below: a stream's turn in the conversation encoder, eager and as a
CUDA graph, and the scan over the turns of whole conversations, as matrix products and, where mamba-ssm is installed, as
its Triton kernel, whose first call compiles for a minute and a half.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from bench_encoder import operations
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

from modeling_mamba_ema import fast_speech_encoder, mamba2
from modeling_mamba_ema.conversation_encoder import ConversationEncoder, ConversationState
from modeling_mamba_ema.data.markdown_table import markdown_table

DEVICE = "cuda"
PEAK_SIZE = 8192  # rows and columns of the product and of the copy that give the peaks
BATCHES = {f"{count} x {seconds} s": [float(seconds)] * count for seconds in (4, 15) for count in (1, 8, 32)}
BATCHES["32 x 1 to 15 s"] = lengths_in_seconds(32)
SHIPPED, OURS, COMPILED = "WavLMModel", "this package", "this package, layers compiled"
WIDTH, TURNS = 256, 256


def finished(function: Callable[[], Any]) -> Callable[[], None]:
    """The function, and the wait until the device has done what it asked for."""

    def run() -> None:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def times_of(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, interleaved, on a device that has nothing else to do when one starts."""
    return interleaved({name: finished(function) for name, function in functions.items()}, rounds)


def peaks(dtype: torch.dtype) -> tuple[float, float]:
    """Measured operations a second of a large product, and bytes a second read and written by a large copy."""
    left, right, into = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=DEVICE, dtype=dtype) for _ in range(3))
    seconds = times_of({"product": lambda: left @ right, "copy": lambda: into.copy_(left)}, 20)
    return 2 * PEAK_SIZE**3 / seconds["product"], 2 * left.nbytes / seconds["copy"]


def compiled(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function with the transformer layers of this package compiled."""
    torch.compiler.reset()  # there is a limit to how many shapes one function is compiled for
    layer = torch.compile(fast_speech_encoder._layer, dynamic=True)

    def run() -> Any:
        with mock.patch.object(fast_speech_encoder, "_layer", layer):
            return function()

    return run


def encoder_figures(dtype: torch.dtype, rounds: int, with_compiled: bool) -> dict[str, Any]:
    """Seconds of audio a second of each variant and batch, with ratios to WavLMModel and shares of the roofline."""
    config = wavlm_config("large")
    with torch.device(DEVICE):  # drawing the weights on the CPU takes longer than all rounds
        model = WavLMModel(config).eval().to(dtype)
    operations_a_second, bytes_a_second = peaks(dtype)
    reading = sum(weight.nbytes for weight in model.parameters()) / bytes_a_second
    figures: dict[str, Any] = {
        "peak_tflops": operations_a_second / 1e12,
        "peak_gb_a_second": bytes_a_second / 1e9,
        "batches": {},
    }
    for batch, seconds in BATCHES.items():
        waveforms, lengths = (tensor.to(DEVICE) for tensor in padded_batch(seconds, dtype))
        mask = None  # without padding the shipped model needs none, and is faster so
        if len(set(seconds)) > 1:
            mask = (torch.arange(waveforms.shape[1], device=DEVICE) < lengths.unsqueeze(1)).long()

        def ours(waveforms=waveforms, lengths=lengths):
            return fast_speech_encoder.fast_hidden_states(model, waveforms, lengths, [config.num_hidden_layers])

        functions = {
            SHIPPED: lambda waveforms=waveforms, mask=mask: model(waveforms, attention_mask=mask),
            OURS: ours,
        }
        if with_compiled:
            functions[COMPILED] = compiled(ours)
        roofline = max(operations(config, lengths.tolist()) * 1e9 / operations_a_second, reading)
        times = times_of(functions, rounds)
        figures["batches"][batch] = {
            name: {
                "milliseconds": 1000 * time,
                "audio_per_second": sum(seconds) / time,
                "ratio": times[SHIPPED] / time,
                "of_roofline": roofline / time,
            }
            for name, time in times.items()
        }
    return figures


def captured_step(
    encoder: ConversationEncoder, observation: torch.Tensor, mask: torch.Tensor, state: ConversationState
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A turn as a CUDA graph, and the context (batch, 1, hidden) that it writes.

    Every replay reads `observation` (batch, 1, hidden) and puts the state after the turn in the place of `state`, which
    has seen turns of no meaning when this returns: fill both before a replay.
    """

    def step() -> torch.Tensor:
        context, after = encoder(observation, mask, state)
        tensors = state.state_dict()
        for name, tensor in after.state_dict().items():
            tensors[name].copy_(tensor)
        return context

    warming_up = torch.cuda.Stream()
    warming_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warming_up):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warming_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        context = step()
    return graph, context


def stream_functions() -> dict[str, Callable[[], Any]]:
    """One turn of one stream, 2 blocks and EMA."""
    encoder = ConversationEncoder(WIDTH, "mamba_ema", 2, 64, 4, 2, 64, 0.8, False, 0.0).to(DEVICE).eval()
    observation = torch.randn(1, 1, WIDTH, device=DEVICE)
    mask = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    _, state = encoder(observation, mask)
    functions: dict[str, Callable[[], Any]] = {"eager": lambda: encoder(observation, mask, state)}
    if DEVICE == "cuda":
        carried = state.copy()
        graph, _ = captured_step(encoder, observation, mask, carried)

        def replay(carried=carried) -> None:  # the graph writes into its tensors, which must stay
            graph.replay()

        functions["CUDA graph"] = replay
    return functions


def scan_functions() -> dict[str, Callable[[], Any]]:
    """The scan over 8 conversations, forward and backward, in float32."""
    heads, headdim, d_state = 8, 64, 64
    shapes = [(8, TURNS, heads, headdim), (8, TURNS, 1, d_state), (8, TURNS, 1, d_state), (8, heads, headdim, d_state)]
    x, B, C, state = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes)
    dt = torch.rand(8, TURNS, heads, device=DEVICE, requires_grad=True)
    A = -torch.rand(heads, device=DEVICE)

    def run(scan: Callable[..., Any]) -> None:
        y, last = scan(x, dt, A, B, C, 64, initial_states=state, return_final_states=True)
        torch.autograd.grad(y.sum() + last.sum(), [x, dt, B, C, state])

    functions: dict[str, Callable[[], Any]] = {"chunks as matrix products": lambda: run(mamba2.chunk_scan)}
    if DEVICE == "cuda":
        with contextlib.suppress(ImportError):
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

            functions["mamba-ssm's Triton kernel"] = lambda: run(mamba_chunk_scan_combined)
    return functions


def step_figures(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    times = times_of(functions, rounds)
    slowest = max(times.values())
    return {name: {"milliseconds": 1000 * time, "ratio": slowest / time} for name, time in times.items()}


def main() -> None:
    parser = argument_parser(__doc__, rounds=10)
    parser.add_argument("--compile", action="store_true", help="measure compiled layers, too")
    arguments = parsed(parser)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu.py measures a CUDA device, and torch finds none here")
    torch.manual_seed(0)
    print(f"WavLM-large's shape, random weights; {machine()}")
    figures: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype)[6:]
        with torch.inference_mode():
            encoders = figures[name] = encoder_figures(dtype, arguments.rounds, arguments.compile)
        print(f"\n{name}: {encoders['peak_tflops']:.0f} TFLOP/s, {encoders['peak_gb_a_second']:.0f} GB/s\n")
        rows = [
            [
                batch,
                variant,
                f"{values['milliseconds']:.2f}",
                f"{values['audio_per_second']:.0f}",
                f"{values['ratio']:.2f}x",
                f"{values['of_roofline']:.0%}",
            ]
            for batch, variants in encoders["batches"].items()
            for variant, values in variants.items()
        ]
        header = ["batch", name, "median ms", "audio seconds a second", "against WavLMModel", "of the roofline"]
        print(markdown_table(header, rows))
    with torch.inference_mode():
        figures["stream"] = step_figures(stream_functions(), 20 * arguments.rounds)
    figures["scan"] = step_figures(scan_functions(), arguments.rounds)
    titles = {"stream": "a turn of a stream", "scan": f"8 x {TURNS} turns, forward and backward"}
    for part, title in titles.items():
        rows = [
            [name, f"{values['milliseconds']:.3f}", f"{values['ratio']:.1f}x"] for name, values in figures[part].items()
        ]
        print("\n" + markdown_table([title, "median ms", "faster by"], rows))
    report(arguments, figures)


if __name__ == "__main__":
    main()
