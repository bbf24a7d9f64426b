"""Export for onnxruntime: an encoder with pooling for utterances of any length, and one step of a conversation.

`encoder.onnx`: `input_values` (batch, samples), normalised utterances of one length -> `pooled` (batch, pooled_size)
and `attention` (batch, heads, frames).

`conversation_step.onnx`: `pooled` and, where the model keeps context, `num_turns` (batch,) int64 and the tensors of the
state by the names of `ConversationState.state_dict`, zeros at the start -> `logits` (batch, num_labels) on the unit
scale, `spread` (the same) of a model that predicts it, and the state after the turn, each name preceded by `next.`.
Names that begin with `speakers.` are of the one speaker of the turn: whoever runs the step keeps them by speaker.

`onnx_config.json` holds labels, their scales, normalisation and the state's shapes; `mamba_ema_onnx.py` runs the three
with numpy and onnxruntime alone.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ccc_loss import MIN_SPREAD
from ..conversation_encoder import SPEAKERS, ConversationEncoder
from ..feature_extraction_mamba_ema import (
    DEFAULT_MAX_SECONDS,
    LOW_LEVEL_DBFS,
    MAX_PEAK,
    MIN_SAMPLES,
    NORMALIZATION,
    SAMPLING_RATE,
)
from ..mamba2 import Mamba2State
from ..modeling_mamba_ema import MambaEMAForRegression

RUNNER = "mamba_ema_onnx.py"


class EncoderForExport(nn.Module):
    """Waveforms without padding -> pooled frames and attention."""

    def __init__(self, model: MambaEMAForRegression):
        super().__init__()
        self.speech_encoder = model.speech_encoder

    def forward(self, input_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, samples) -> (batch, pooled_size), (batch, heads, frames)"""
        pooled, attention, _ = self.speech_encoder(input_values)
        return pooled, attention


class ConversationStepForExport(nn.Module):
    """One turn of each conversation: the context encoders' `forward` for a single valid turn, and the head."""

    def __init__(self, model: MambaEMAForRegression):
        super().__init__()
        base = model.mamba_ema
        self.observe = nn.Sequential(base.projection, base.projection_activation)
        encoders = {"": base.conversation_encoder, SPEAKERS: base.speaker_encoder}
        self.encoders: Any = nn.ModuleList(encoder for encoder in encoders.values() if encoder is not None)
        self.prefixes = [prefix for prefix, encoder in encoders.items() if encoder is not None]
        self.heads: Any = nn.ModuleList(head for head in (model.head, model.spread_head) if head is not None)

    def initial_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Tensors of conversations that have not begun, of a single speaker each; empty without context."""
        where = (torch.device("cpu"), torch.float32)
        return {
            prefix + name: tensor
            for prefix, encoder in zip(self.prefixes, self.encoders)
            for name, tensor in ConversationEncoder.initial_state(encoder, batch_size, *where).state_dict().items()
        }

    def forward(self, pooled: torch.Tensor, state: dict[str, torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """pooled (batch, pooled_size) and the state's tensors -> predictions (batch, num_labels) and the new tensors"""
        observation = self.observe(pooled)  # (batch, hidden_size)
        features, new = [observation], {}
        for prefix, encoder in zip(self.prefixes, self.encoders):
            own = {name.removeprefix(prefix): tensor for name, tensor in (state or {}).items()}
            context, after = _one_turn(encoder, observation, own)
            features.append(context)
            new.update({prefix + name: tensor for name, tensor in after.items()})
        together = torch.cat(features, dim=-1)
        return (*(head(together) for head in self.heads), *(new[name] for name in state or ()))


def _one_turn(
    encoder: Any, observation: torch.Tensor, state: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """z (batch, hidden_size) and the state's tensors -> c (batch, hidden_size) and the new tensors"""
    hidden = observation.unsqueeze(1)  # (batch, 1, hidden_size)
    lengths = torch.ones_like(state["num_turns"])
    new: dict[str, torch.Tensor] = {"num_turns": state["num_turns"] + 1}
    for block, layer in enumerate(encoder.layers):
        before = Mamba2State(state[f"mamba.{block}.conv"], state[f"mamba.{block}.ssm"])
        hidden, after = layer(hidden, lengths, before)
        new[f"mamba.{block}.conv"], new[f"mamba.{block}.ssm"] = after
    if encoder.norm is not None:
        hidden = encoder.norm(hidden)
    if encoder.ema is not None:
        hidden, new["ema"] = encoder.ema(hidden, lengths, state["ema"], state["num_turns"])
    return hidden.squeeze(1), new


def export_onnx(model: MambaEMAForRegression, folder: str | Path, int8: bool = False) -> list[Path]:
    """Write a model for onnxruntime, and return the files; needs the extra `onnx`.

    Args:
        model: float32, on the CPU, in evaluation mode.
        folder: created if need be; files of an earlier export are replaced.
        int8: the encoder's matrix products in 8 bits, weights by output channel, inputs as they come, all rows of a
            batch by one scale: give it one utterance at a time, as the runner does. A third of the size, and other
            numbers by some thousandths.

    Raises:
        ValueError, ImportError: see [`check_exportable`]; with `int8` onnxruntime is needed, too.
    """
    check_exportable(model)
    if int8:
        _check_quantiser()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config

    batch = torch.export.Dim("batch", max=4096)
    # From two frames on; torch traces the encoder a second time to find that out. A single frame runs all the same.
    samples = torch.export.Dim("samples", min=720, max=round(SAMPLING_RATE * DEFAULT_MAX_SECONDS))
    waveforms = torch.randn(2, 8_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled, _ = EncoderForExport(model)(waveforms)
    export_module(
        EncoderForExport(model).eval(),
        {"input_values": waveforms},
        folder / "encoder.onnx",
        ["input_values"],
        ["pooled", "attention"],
        {"input_values": {0: batch, 1: samples}},
    )
    if int8:
        quantize_products(folder / "encoder.onnx")

    step = ConversationStepForExport(model).eval()
    state = step.initial_state(2)
    export_module(
        step,
        {"pooled": pooled, **({"state": state} if state else {})},
        folder / "conversation_step.onnx",
        ["pooled", *state],
        ["logits", *(["spread"] if config.predict_spread else []), *(f"next.{name}" for name in state)],
        {"pooled": {0: batch}, **({"state": {name: {0: batch} for name in state}} if state else {})},
    )

    about = {
        "labels": config.labels,
        "label_ranges": {label: list(config.label_range(label)) for label in config.labels},
        "sampling_rate": SAMPLING_RATE,
        "min_samples": MIN_SAMPLES,
        "max_seconds": DEFAULT_MAX_SECONDS,
        "max_peak": MAX_PEAK,
        "low_level_dbfs": LOW_LEVEL_DBFS,
        **{name: getattr(config, name) for name in NORMALIZATION},
        "interval_radii": {label: config.interval_radius(label) for label in config.labels},
        "min_spread": MIN_SPREAD if config.scaled_intervals else None,
        "bounded_predictions": config.bounded_predictions,
        "max_speakers": config.max_speakers,
        "state": {name: list(tensor.shape[1:]) for name, tensor in state.items()},
    }
    (folder / "onnx_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name(RUNNER), folder / RUNNER)
    names = ("encoder.onnx", "conversation_step.onnx", "onnx_config.json", RUNNER)
    return [folder / name for name in names]


def check_exportable(model: MambaEMAForRegression) -> None:
    """Raise `ValueError` for a model that is in training mode, not float32, in 8 bits, or not on the CPU, and
    `ImportError` where `onnx` and `onnxscript` are not installed."""
    if model.training or model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(
            f"the model is {model.dtype}, on {model.device}, {'in' if model.training else 'not in'} training mode; "
            "export needs float32 on the CPU: model.float().cpu().eval()"
        )
    model.refuse_8_bits("export the model")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export needs onnx and onnxscript: pip install onnx onnxscript onnxruntime") from error


def _check_quantiser() -> None:
    """Before an export, which may take minutes and replaces the files of an earlier one."""
    try:
        import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        raise ImportError("export in 8 bits needs onnxruntime: pip install onnxruntime") from error


def export_module(
    module: nn.Module, arguments: dict[str, Any], path: Path, inputs: list[str], outputs: list[str], shapes: Any
) -> None:
    """Write a module as ONNX, with the names and dynamic dimensions given."""
    program = torch.onnx.export(
        module,
        kwargs=arguments,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # for a type checker: None comes back only where a file was named
    program.save(path)


def quantize_products(path: Path) -> None:
    """Replace a file by one whose matrix products are of 8-bit integers, by onnxruntime's dynamic quantisation."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rounded = path.with_suffix(".int8.onnx")
    quantize_dynamic(
        path, rounded, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
    )
    rounded.replace(path)
