"""audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim and the model with all 24 layers.

wav2vec 2.0's last hidden state, its mean over all frames, a linear layer with tanh, and linear outputs,
(rating - 1) / 6. Each waveform is normalised by itself.
"""

from collections.abc import Mapping
from typing import Any

from ..configuration_mamba_ema import SPEECH_ENCODER_DEFAULTS, SPEECH_ENCODERS, MambaEMAConfig
from .conversion import ENCODER, LABELS, MSP_RANGE, Conversion, Publication, check_value, dimensional_labels, required

_CITATION = (
    'J. Wagner et al., "Dawn of the Transformer Era in Speech Emotion Recognition: Closing the Valence Gap", IEEE '
    "Transactions on Pattern Analysis and Machine Intelligence 45(9), 2023, doi:10.1109/TPAMI.2023.3263585"
)
PUBLICATIONS = {
    f"audeering/wav2vec2-large-robust-{layers}-ft-emotion-msp-dim": Publication(
        LABELS, "cc-by-nc-sa-4.0", "MSP-Podcast 1.7", _CITATION
    )
    for layers in (12, 24)
}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this kind."""
    return "Wav2Vec2ForSpeechClassification" in (config.get("architectures") or ())


def convert(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, encoder_config: Mapping[str, Any] | None
) -> Conversion:
    """From config.json, which holds wav2vec 2.0's configuration too, and preprocessor_config.json; another
    encoder_config would not be that of the weights. Raises `ValueError` for a configuration that is not of this
    kind."""
    if encoder_config is not None:
        raise ValueError("config.json holds the configuration of the speech encoder; no other can be given")
    if preprocessor is None:
        raise ValueError("there is no preprocessor_config.json, which says whether waveforms are normalised")
    labels = dimensional_labels(config)
    check_value(config, "model_type", "wav2vec2")
    check_value(config, "pooling_mode", "mean")
    check_value(config, "problem_type", "regression")
    check_value(preprocessor, "sampling_rate", 16_000)
    fields = SPEECH_ENCODERS["wav2vec2"]().to_dict().keys() & config.keys()
    encoder = {name: config[name] for name in fields if config[name] is not None}
    for name in ("id2label", "label2id", "problem_type", "architectures", "transformers_version"):
        encoder.pop(name, None)
    width, dropout = required(config, "hidden_size"), required(config, "final_dropout")
    ours = MambaEMAConfig(
        speech_encoder_config={**encoder, **SPEECH_ENCODER_DEFAULTS},
        speech_encoder_pooling="mean",
        context="none",
        hidden_size=width,
        dropout=dropout,
        pooled_dropout=dropout,
        projection_activation="tanh",
        head_hidden_layers=0,
        bounded_predictions=False,
        do_normalize=required(preprocessor, "do_normalize"),
        id2label=dict(enumerate(labels)),
        label_ranges=dict.fromkeys(labels, MSP_RANGE),
    )
    names = {
        "wav2vec2": f"{ENCODER}.wav2vec2",
        "classifier.dense": "mamba_ema.projection",
        "classifier.out_proj": "head.out_proj",
    }
    return Conversion(ours, names)
