"""3loi/SER-Odyssey-Baseline-WavLM-*: the baselines of the Odyssey 2024 speech emotion recognition challenge.

WavLM's last hidden state, attentive statistics with the full scorer of Okabe et al. 2018, a linear layer with layer
norm and ReLU, and linear outputs, (rating - 1) / 6. A waveform is standardised by the mean and deviation of the corpus.
The folder does not hold WavLM's own configuration: it is that of `ssl_type`.
"""

from collections.abc import Mapping
from typing import Any

from ..configuration_mamba_ema import SPEECH_ENCODER_DEFAULTS, MambaEMAConfig
from .conversion import ENCODER, LABELS, MSP_RANGE, Conversion, Publication, check_value, dimensional_labels, required

_NAME = "3loi/SER-Odyssey-Baseline-WavLM-"
_CITATION = (
    'L. Goncalves et al., "Odyssey 2024 - Speech Emotion Recognition Challenge: Dataset, Baseline Framework, and '
    'Results", Odyssey 2024: The Speaker and Language Recognition Workshop'
)
# The model's page heads these numbers "Val Dom Aro"; whose they are is said in the paper.
_RESULTS = {"Test3": {"arousal": 0.577, "valence": 0.577, "dominance": 0.405}}
PUBLICATIONS = {
    f"{_NAME}Multi-Attributes": Publication(LABELS, "mit", "MSP-Podcast 1.11", _CITATION, _RESULTS),
    **{f"{_NAME}{label.capitalize()}": Publication((label,), "mit", "MSP-Podcast 1.11", _CITATION) for label in LABELS},
}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this kind."""
    return "ssl_type" in config


def convert(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, encoder_config: Mapping[str, Any] | None
) -> Conversion:
    """From config.json and the configuration of its `ssl_type`; preprocessor_config.json is useless here. Raises
    `ValueError` for a configuration that is not of this kind."""
    assert encoder_config is not None
    labels = dimensional_labels(config)
    check_value(config, "num_classes", len(labels))
    check_value(config, "sampling_rate", 16_000)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if name in encoder_config:
            check_value(config, name, encoder_config[name])
    layers = required(config, "classifier_hidden_layers")
    if layers not in (1, 2):
        raise ValueError(f"config.json has classifier_hidden_layers {layers!r}; 1 and 2 can be adopted")
    width, dropout = required(config, "hidden_size"), required(config, "classifier_dropout_prob")
    ours = MambaEMAConfig(
        speech_encoder_config={**encoder_config, **SPEECH_ENCODER_DEFAULTS},
        speech_encoder_pooling="attentive_statistics",
        speech_encoder_pooling_hidden_size=width,
        speech_encoder_pooling_min_variance=1e-5,
        context="none",
        hidden_size=width,
        dropout=dropout,
        pooled_dropout=dropout,
        projection_activation="relu",
        head_hidden_layers=layers - 1,
        head_activation="relu",
        activation_layer_norm=True,
        bounded_predictions=False,
        do_normalize=False,
        waveform_mean=required(config, "mean"),
        waveform_std=required(config, "std"),
        id2label=dict(enumerate(labels)),
        label_ranges=dict.fromkeys(labels, MSP_RANGE),
    )
    score = f"{ENCODER}.attention.score"
    names = {
        "ssl_model": f"{ENCODER}.{ours.speech_encoder_config.model_type}",
        "pool_model.sap_linear": f"{ENCODER}.attention.hidden",
        "pool_model.attention": f"{score}.weight",
        "ser_model.fc.0.0": "mamba_ema.projection",
        "ser_model.fc.0.1": "mamba_ema.projection_activation.norm",
        "ser_model.out.0": "head.out_proj",
    }
    if layers == 2:
        names |= {"ser_model.fc.1.0": "head.dense", "ser_model.fc.1.1": "head.activation.norm"}
    return Conversion(ours, names, frozenset({f"{score}.weight"}), frozenset({f"{score}.bias"}))
