"""One turn of a conversation: what each pooling, the updater and the EMA add to WavLM's time.

    python benchmarks/bench_turn.py [--size large] [--seconds 4] [--rounds 20] [--json FILE]

Time beside the encoder's own, for one utterance, interleaved in one process; parameters and operations are counted, not
estimated. A turn's cost in a long stream is `bench_updater.py`'s business.
"""

from typing import Any

import torch
from bench_encoder import operations
from measuring import argument_parser, interleaved, machine, parsed, report, wavlm_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_mamba_ema import MambaEMAConfig, MambaEMAForRegression
from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.pooling import POOLINGS

HEADS = 8


def gflop_of(function: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        function()
    return counter.get_total_flops() / 1e9


def model_with(pooling: str, size: str, layers: int = 1) -> MambaEMAForRegression:
    encoder = wavlm_config(size, num_hidden_layers=layers).to_dict()
    config = MambaEMAConfig(
        speech_encoder_config=encoder, speech_encoder_pooling=pooling, speech_encoder_pooling_heads=HEADS
    )
    return MambaEMAForRegression(config).eval()


def main() -> None:
    parser = argument_parser(__doc__, size="large", rounds=20)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the utterance (default 4)")
    arguments = parsed(parser)
    torch.manual_seed(0)

    samples = int(arguments.seconds * 16_000)
    config = wavlm_config(arguments.size)
    whole = model_with("mean", arguments.size, config.num_hidden_layers)
    waveform, lengths = torch.randn(1, samples), torch.tensor([samples])
    encoder = whole.speech_encoder
    with torch.inference_mode():
        frames = encoder.hidden_states(waveform, lengths, encoder.layers)[0].unsqueeze(1)  # (1, 1, frames, hidden)
    mask = torch.ones(1, frames.shape[2], dtype=torch.bool)
    conversations, turn = whole.mamba_ema.conversation_encoder, torch.ones(1, 1, dtype=torch.bool)
    observation = torch.randn(1, 1, whole.config.hidden_size)
    with torch.inference_mode():
        _, state = conversations(observation, turn, None)

    functions: dict[str, Any] = {"WavLM": lambda: encoder.hidden_states(waveform, lengths, encoder.layers)}
    parameters = {"WavLM": sum(parameter.numel() for parameter in encoder.backbone.parameters())}
    for pooling in POOLINGS:
        pooler = model_with(pooling, arguments.size).speech_encoder
        functions[f"pooling: {pooling}"] = lambda pooler=pooler: pooler.pool(frames, mask)
        attention = getattr(pooler, "attention", nn.Identity())
        parameters[f"pooling: {pooling}"] = sum(parameter.numel() for parameter in attention.parameters())
    functions["updater and EMA, one turn"] = lambda: conversations(observation, turn, state)
    parameters["updater and EMA, one turn"] = sum(parameter.numel() for parameter in conversations.parameters())

    gflop = {name: gflop_of(function) for name, function in functions.items() if name != "WavLM"}
    gflop["WavLM"] = operations(config, [samples])
    with torch.inference_mode():
        times = interleaved(functions, arguments.rounds)
    figures = {
        name: {
            "parameters": parameters[name],
            "gflop": gflop[name],
            "milliseconds": 1000 * times[name],
            "of_wavlm": times[name] / times["WavLM"],
            "over_mean": (times[name] - times["pooling: mean"]) / times["WavLM"] if "pooling" in name else None,
        }
        for name in functions
    }
    rows = []
    for name, values in figures.items():
        over = "" if values["over_mean"] is None else f"{values['over_mean']:+.2%}"
        rows.append(
            [
                name,
                f"{values['parameters']:,}",
                f"{values['gflop']:.4f}",
                f"{values['milliseconds']:.2f}",
                f"{values['of_wavlm']:.2%}",
                over,
            ]
        )
    print(f"WavLM-{arguments.size}, one utterance of {arguments.seconds:g} s; {machine()}\n")
    header = ["part", "parameters", "GFLOP", "median ms", "of WavLM's time", "over mean pooling"]
    print(markdown_table(header, rows))
    report(arguments, {"parts": figures})


if __name__ == "__main__":
    main()
