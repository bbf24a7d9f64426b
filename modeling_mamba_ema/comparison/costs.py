"""What a pooling costs: parameters, operations, time."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_mamba_ema import MambaEMAConfig
from ..feature_extraction_mamba_ema import SAMPLING_RATE
from ..modeling_mamba_ema import MambaEMAForRegression
from ..pooling import POOLINGS
from ..speech_encoder import SpeechEncoder, hidden_states_one_by_one, num_frames


@dataclass(frozen=True)
class Cost:
    """Of one utterance: learned parameters, operations, median time."""

    parameters: int
    flops: int
    milliseconds: float


def pooling_costs(
    config: MambaEMAConfig, poolings: Sequence[str], seconds: float, repeats: int = 50
) -> dict[str, Cost]:
    """Costs of poolings for an utterance, with the projection of their vector, timed in turn on this machine's CPU; the
    configuration gives the widths and the layers that are read."""
    encoder_config = config.speech_encoder_config
    frames = num_frames(round(seconds * SAMPLING_RATE), encoder_config)
    hidden, layers = encoder_config.hidden_size, len(config.encoder_layer_indices)
    values = torch.randn(1, layers, frames, hidden)
    mask = torch.ones(1, frames, dtype=torch.bool)
    encoders = {pooling: _without_wavlm(config, pooling, layers) for pooling in poolings}
    with torch.inference_mode():
        times = interleaved({name: partial(encoder.pool, values, mask) for name, encoder in encoders.items()}, repeats)
    costs = {}
    sizes = (frames, hidden, config.speech_encoder_pooling_heads, config.speech_encoder_pooling_hidden_size)
    for pooling, encoder in encoders.items():
        attention = getattr(encoder, "attention", None)
        projection = 2 * encoder.pooled_size * config.hidden_size
        costs[pooling] = Cost(
            parameters=0 if attention is None else sum(p.numel() for p in attention.parameters()),
            flops=POOLINGS[pooling].flops(*sizes) + projection,
            milliseconds=1000 * times[pooling],
        )
    return costs


def encoder_cost(model: MambaEMAForRegression, seconds: float, repeats: int = 3) -> Cost:
    """Cost of the speech encoder without pooling, where the model is: products, convolutions and attention."""
    encoder: SpeechEncoder = model.speech_encoder
    device = encoder.backbone.device
    samples = torch.randn(1, round(seconds * SAMPLING_RATE), device=device)
    lengths = torch.tensor([samples.shape[1]], device=device)

    was_training = encoder.training
    encoder.eval()
    # Counted in the reference, because torch does not count the fused products of the fast one; and not in inference
    # mode, where counting fails on parameters that require a gradient.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden_states_one_by_one(encoder.backbone, samples, lengths, encoder.layers)
    encode = partial(encoder.hidden_states, samples, lengths, encoder.layers)
    with torch.inference_mode():
        seconds_taken = interleaved({"encoder": encode}, repeats)["encoder"]
    encoder.train(was_training)
    parameters = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    return Cost(parameters, counter.get_total_flops(), 1000 * seconds_taken)


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, see [`seconds_by_round`]."""
    return {name: statistics.median(values) for name, values in seconds_by_round(functions, rounds).items()}


def seconds_by_round(
    functions: dict[str, Callable[[], Any]], rounds: int, warm_up: dict[str, Callable[[], Any]] | None = None
) -> dict[str, list[float]]:
    """Seconds of each function, run in turn (A B C A B C ...), after one round of `warm_up` or of themselves."""
    warm_up = functions if warm_up is None else warm_up
    for name in functions:
        warm_up[name]()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return times


def _without_wavlm(config: MambaEMAConfig, pooling: str, layers: int) -> SpeechEncoder:
    """An encoder that pools frames of the same width and layers, with hardly any of WavLM's weights."""
    small = {**config.speech_encoder_config.to_dict(), "num_hidden_layers": layers, "intermediate_size": 8}
    return SpeechEncoder(
        MambaEMAConfig(
            speech_encoder_config=small,
            speech_encoder_layers=list(range(1, layers + 1)),
            speech_encoder_pooling=pooling,
            speech_encoder_pooling_heads=config.speech_encoder_pooling_heads,
            speech_encoder_pooling_hidden_size=config.speech_encoder_pooling_hidden_size,
        )
    ).eval()
