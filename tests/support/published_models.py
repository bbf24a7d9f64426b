"""Models as others publish them, with random weights: their files, and their forward pass on one utterance.

Written from the papers and from the names of the weights, without code of this package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel

from tests.support.models import TINY_ENCODER

# The shape of large encoders, narrow.
NARROW: dict[str, Any] = {
    **TINY_ENCODER,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
LABELS = ("arousal", "dominance", "valence")


class OdysseyModel(nn.Module):
    """3loi/SER-Odyssey-Baseline-WavLM-*.

    Args:
        encoder: fields of the WavLM.
        labels: of the outputs.
        layers: `classifier_hidden_layers`.
    """

    mean, std = -8.3e-5, 0.0849  # of the samples of the corpus

    def __init__(self, encoder: dict[str, Any], labels: tuple[str, ...] = LABELS, layers: int = 1):
        super().__init__()
        self.labels, self.layers, self.encoder = labels, layers, encoder
        name = "Multi-Attributes" if len(labels) > 1 else labels[0].capitalize()
        self.published_as = f"3loi/SER-Odyssey-Baseline-WavLM-{name}"
        width = encoder["hidden_size"]
        self.ssl_model = WavLMModel(WavLMConfig(**encoder))
        self.pool_model = nn.Module()
        self.pool_model.sap_linear = nn.Linear(width, width)
        self.pool_model.attention = nn.Parameter(torch.empty(width, 1))
        self.ser_model = nn.Module()
        sizes = [2 * width] + [width] * (layers - 1)
        self.ser_model.fc = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width), nn.ReLU()) for size in sizes
        )
        self.ser_model.out = nn.Sequential(nn.Linear(width, len(labels)))

    def normalise(self, waveform: torch.Tensor) -> torch.Tensor:
        return (waveform - self.mean) / (self.std + 0.000001)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """One normalised utterance, (samples,) -> (labels,), 0 for the rating 1 and 1 for the rating 7"""
        mask = torch.ones(1, len(waveform), dtype=torch.long)
        frames = self.ssl_model(waveform[None], attention_mask=mask).last_hidden_state[0]  # (frames, width)
        scores = torch.tanh(self.pool_model.sap_linear(frames)) @ self.pool_model.attention
        weights = scores.softmax(dim=0)  # (frames, 1)
        mean = (weights * frames).sum(dim=0)
        variance = (weights * frames**2).sum(dim=0) - mean**2
        hidden = torch.cat([mean, torch.clamp(variance, min=1e-5).sqrt()])
        for block in self.ser_model.fc:
            hidden = block(hidden)
        return self.ser_model.out(hidden)

    def files(self) -> dict[str, Any]:
        config = {
            "architectures": ["SERModel"],
            "auto_map": {"AutoConfig": "pipeline_utils.SERConfig"},
            "model_type": "ser",
            "ssl_type": "microsoft/wavlm-large",
            "num_classes": len(self.labels),
            "num_attention_heads": self.encoder["num_attention_heads"],
            "num_hidden_layers": self.encoder["num_hidden_layers"],
            "hidden_size": self.encoder["hidden_size"],
            "classifier_hidden_layers": self.layers,
            "classifier_dropout_prob": 0.5,
            "sampling_rate": 16000,
            "maxlen": 192000,
            "mean": self.mean,
            "std": self.std,
            "id2label": {str(number): label for number, label in enumerate(self.labels)},
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "torch_dtype": "float32",
        }
        return {"config.json": config, "preprocessor_config.json": {"mean": 10}}


class AudeeringModel(nn.Module):
    """audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim.

    Args:
        encoder: fields of the wav2vec 2.0.
    """

    published_as = "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim"
    labels = LABELS

    def __init__(self, encoder: dict[str, Any]):
        super().__init__()
        self.encoder = {"conv_bias": True, **encoder}
        width = encoder["hidden_size"]
        self.wav2vec2 = Wav2Vec2Model(Wav2Vec2Config(**self.encoder))
        self.classifier = nn.Module()
        self.classifier.dense = nn.Linear(width, width)
        self.classifier.out_proj = nn.Linear(width, 3)

    def normalise(self, waveform: torch.Tensor) -> torch.Tensor:
        return (waveform - waveform.mean()) / torch.sqrt(waveform.var(unbiased=False) + 1e-7)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """One normalised utterance, (samples,) -> arousal, dominance and valence, 0 for the rating 1 and 1 for 7"""
        pooled = self.wav2vec2(waveform[None]).last_hidden_state[0].mean(dim=0)
        return self.classifier.out_proj(torch.tanh(self.classifier.dense(pooled)))

    def files(self) -> dict[str, Any]:
        config = {
            **{name: value for name, value in Wav2Vec2Config(**self.encoder).to_dict().items() if name != "dtype"},
            "_name_or_path": "torch",
            "architectures": ["Wav2Vec2ForSpeechClassification"],
            "finetuning_task": "wav2vec2_reg",
            "gradient_checkpointing": False,
            "hidden_dropout_prob": 0.1,
            "feat_extract_dropout": 0.0,
            "id2label": {str(number): label for number, label in enumerate(self.labels)},
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "pooling_mode": "mean",
            "problem_type": "regression",
            "torch_dtype": "float32",
            "transformers_version": "4.17.0.dev0",
            "vocab_size": None,
        }
        preprocessor = {
            "do_normalize": True,
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": 16000,
        }
        return {"config.json": config, "preprocessor_config.json": preprocessor}


def with_random_weights(model: nn.Module, seed: int = 0) -> Any:
    """The model in evaluation mode, its outputs depending strongly on its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = "norm" in name and weight.dim() == 1
            size = 0.3 if weight.dim() == 1 else (2.0 / weight[0].numel()) ** 0.5
            if "pool_model.attention" in name:
                size = 1.0
            weight.copy_(
                (1.0 if is_norm and name.endswith("weight") else 0.0)
                + size * torch.randn(weight.shape, generator=generator)
            )
    return model.eval()


def published_weights(model: nn.Module, old_weight_norm: bool) -> dict[str, torch.Tensor]:
    """The weights by their published names; weight norms as torch names them now, or as it did before 2.0."""
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    if old_weight_norm:
        spelling = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for new, old in spelling.items():
            weights = {name.replace(new, old): weight for name, weight in weights.items()}
    assert any("weight_g" in name for name in weights) == old_weight_norm
    return weights


def publish(
    model: Any,
    folder: Path,
    container: str = "safetensors",
    old_weight_norm: bool = False,
    shards: int = 1,
    **changes: Any,
) -> Path:
    """Write a folder as the publisher has it.

    Args:
        model: one of the above.
        folder: made if need be.
        container: "safetensors" or "bin".
        old_weight_norm: see [`published_weights`].
        shards: files that the weights are cut into.
        changes: fields of config.json to change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model.files().items():
        content = {**content, **changes} if name == "config.json" else content
        (folder / name).write_text(json.dumps(content))
    write_weights(published_weights(model, old_weight_norm), folder, container, shards)
    return folder


def write_weights(weights: dict[str, Any], folder: Path, container: str = "safetensors", shards: int = 1) -> None:
    stem, end = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[container]
    write = save_file if container == "safetensors" else torch.save
    if shards == 1:
        write(weights, folder / f"{stem}.{end}")
        return
    places = {}
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{end}"
        part = dict(list(weights.items())[shard::shards])
        write(part, folder / name)
        places.update(dict.fromkeys(part, name))
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_encoder_config(encoder: dict[str, Any], folder: Path) -> Path:
    """The configuration of a WavLM in a folder of its own, as `ssl_type` names it on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "wavlm", **encoder}))
    return folder
