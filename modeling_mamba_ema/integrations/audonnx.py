"""audonnx (https://audeering.github.io/audonnx): a folder that `audonnx.load` reads, for utterances by themselves."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..feature_extraction_mamba_ema import DEFAULT_MAX_SECONDS, SAMPLING_RATE
from ..inference.onnx_export import ConversationStepForExport, check_exportable, export_module
from ..modeling_mamba_ema import MambaEMAForRegression


class UtteranceForExport(nn.Module):
    """The first turn of a conversation, from its waveform, in one graph."""

    def __init__(self, model: MambaEMAForRegression):
        super().__init__()
        self.speech_encoder, self.step = model.speech_encoder, ConversationStepForExport(model)
        self.config = model.config
        self.to_label_ranges = model.to_label_ranges

    def forward(self, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, samples) at 16 kHz -> pooled frames (1, pooled_size) and values on the labels' scales (1, num_labels)"""
        config = self.config
        if config.waveform_mean is not None and config.waveform_std is not None:
            signal = (signal - config.waveform_mean) / (config.waveform_std + 1e-6)
        elif config.do_normalize:
            signal = signal - signal.mean()
            signal = signal / torch.sqrt(signal.square().mean() + 1e-7)
        pooled, _, _ = self.speech_encoder(signal)
        logits, *_ = self.step(pooled, self.step.initial_state(1))
        return pooled, self.to_label_ranges(logits)


def export_audonnx(model: MambaEMAForRegression, folder: str | Path) -> list[Path]:
    """Write `model.onnx` and `model.yaml`, and return the files; needs the extra `onnx`.

    The outputs are `hidden_states`, the pooled frames, and `logits`, the labels' values on their own scales, as in the
    models that audEERING publishes. Each utterance is answered as the first turn of a conversation. Unlike the feature
    extractor, the graph checks nothing, and amplifies near silence where the model normalises. Arguments and errors are
    those of `export_onnx`.

    Example:

        import audonnx
        model = audonnx.load("outputs/audonnx")
        model(signal, 16_000)["logits"]
    """
    check_exportable(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    samples = torch.export.Dim("samples", max=round(SAMPLING_RATE * DEFAULT_MAX_SECONDS))
    signal = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    names = ["hidden_states", "logits"]
    module = UtteranceForExport(model).eval()
    export_module(module, {"signal": signal}, folder / "model.onnx", ["signal"], names, {"signal": {1: samples}})
    about: dict[str, Any] = {"path": "model.onnx", "labels": {"logits": model.config.labels}, "transform": None}
    lines = [f"  {name}: {json.dumps(value)}\n" for name, value in about.items()]  # JSON is YAML
    (folder / "model.yaml").write_text("$audonnx.core.model.Model:\n" + "".join(lines), encoding="utf-8")
    return [folder / "model.onnx", folder / "model.yaml"]
