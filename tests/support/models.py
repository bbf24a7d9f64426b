"""Small models that the tests share, and what goes into them."""

from typing import Any

import torch
from transformers import BatchFeature

from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor, MambaEMAForRegression, tiny_wavlm

# WavLM's real front end (receptive field 400, hop 320) made narrow; kept as small as heads and groups allow.
TINY_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}

NO_DROPOUT = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
# The softmax over time does not see the bias of its scores: its gradient is rounding alone.
NO_GRADIENT = "speech_encoder.attention.bias"

TINY_SIZES: dict[str, Any] = {"hidden_size": 32, "head_dim": 16, "state_size": 16, "dropout": 0.0}


def tiny_config(norm: str = "layer", **fields: Any) -> MambaEMAConfig:
    """A configuration with a tiny WavLM; `norm` is "group" (as WavLM-base) or "layer" (as WavLM-large)."""
    style = {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
    given = fields.pop("speech_encoder_config", {})
    if isinstance(given, dict):
        given = {**TINY_ENCODER, **style, **given}
    return MambaEMAConfig(speech_encoder_config=given, **{**TINY_SIZES, **fields})


def tiny_model(norm: str = "layer", dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any):
    """A tiny model in evaluation mode whose output depends strongly on its input.

    With the usual initialisation all predictions lie near 0.5, and a test on them could hardly fail.
    """
    torch.manual_seed(seed)
    return _sensitive(MambaEMAForRegression(tiny_config(norm, **fields))).to(dtype)


def pretrained_model(dtype: torch.dtype = torch.float32, **fields: Any):
    """As `tiny_model`, on the pretrained WavLM that ships with the package, whose frames tell speech apart."""
    torch.manual_seed(0)
    model = MambaEMAForRegression.from_pretrained_speech_encoder(tiny_wavlm.FOLDER, **{**TINY_SIZES, **fields})
    return _sensitive(model).to(dtype)


def _sensitive(model: MambaEMAForRegression) -> MambaEMAForRegression:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "wavlm" not in name and "conv1d" not in name:
                parameter.normal_(0, 2.0 / parameter.shape[-1] ** 0.5)
            elif name.endswith("encoder.attention.weight"):
                parameter.normal_(0, 1.0)
    return model.eval()


def features(speech: Any) -> BatchFeature:
    """A model's inputs for waveforms at 16 kHz: one, a batch, or a batch of conversations."""
    return MambaEMAFeatureExtractor()(speech, sampling_rate=16_000, return_tensors="pt")


@torch.no_grad()
def predict(model: Any, speech: Any, **options: Any) -> Any:
    """A model's outputs for waveforms at 16 kHz."""
    return model(**features(speech), **options)


def predict_turn_by_turn(model: Any, turns: Any) -> torch.Tensor:
    """(turns, labels) logits of a conversation whose turns are given one after the other."""
    state, logits = None, []
    for turn in turns:
        outputs = predict(model, turn, conversation_state=state, use_conversation_state=True)
        state = outputs.conversation_state
        logits.append(outputs.logits[0])
    return torch.stack(logits)
