"""Configuration of Mamba-EMA."""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, HubertConfig, PretrainedConfig, Wav2Vec2Config, WavLMConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .ccc_loss import MIN_SPREAD
from .conversation_encoder import CONTEXTS, SCOPES, check_ema_decay
from .feature_extraction_mamba_ema import validate_normalization
from .mamba2 import check_head_dim
from .pooling import MIN_VARIANCE, POOLINGS, check_num_heads

logger = logging.get_logger(__name__)

DEFAULT_LABELS = ("valence", "arousal")
MAX_LABELS = 64
NEUTRAL = 0.5  # the middle of the unit scale
ACTIVATIONS = ("gelu", "relu", "silu", "tanh")  # of the projection and the head, by their names in transformers
SPEECH_ENCODERS: dict[str, type[PretrainedConfig]] = {
    config.model_type: config for config in (WavLMConfig, Wav2Vec2Config, HubertConfig)
}

# The shape of microsoft/wavlm-large, the encoder most published dimensional results use.
WAVLM_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
# Layer drop leaves layers without a gradient, on which DistributedDataParallel stops; SpecAugment as WavLM ships it
# fails on utterances under 0.205 s and hides most of those under a second. Both stay available, off by default.
SPEECH_ENCODER_DEFAULTS: dict[str, Any] = {"layerdrop": 0.0, "apply_spec_augment": False}

# Upper bounds: a config.json from elsewhere must not make a loader allocate without limit.
_INTEGER_BOUNDS = {
    "hidden_size": (1, 4096),
    "num_hidden_layers": (1, 48),
    "max_speakers": (1, 256),
    "state_size": (1, 1024),
    "conv_kernel": (2, 4),
    "expand": (1, 8),
    "head_dim": (1, 1024),
    "speech_encoder_pooling_heads": (1, 64),
    "head_hidden_layers": (0, 1),
}
_NUMBER_BOUNDS = {
    "speech_encoder_pooling_min_variance": (1e-12, 1.0),
    "ema_decay": (0.0, 1.0),
    "dropout": (0.0, 0.99),
    "pooled_dropout": (0.0, 0.99),
    "loss_mse_weight": (0.0, 1.0),
    "interval_level": (0.0, 1.0),
}
_FLAGS = (
    *("activation_layer_norm", "bounded_predictions", "ema_decay_learnable", "freeze_speech_encoder"),
    *("predict_spread", "scaled_intervals", "speech_encoder_pooling_uniform_start"),
)
_SPEECH_ENCODER_BOUNDS = {
    "hidden_size": (1, 4096),
    "num_hidden_layers": (1, 48),
    "num_attention_heads": (1, 64),
    "intermediate_size": (1, 16384),
    "num_conv_pos_embeddings": (1, 1024),
    "num_conv_pos_embedding_groups": (1, 1024),
    "num_buckets": (1, 4096),
    "max_bucket_distance": (1, 100_000),
}
_SPEECH_ENCODER_NUMBER_BOUNDS = {
    "layer_norm_eps": (1e-12, 0.1),
    "initializer_range": (0.0, 1.0),
    **dict.fromkeys(("layerdrop", "mask_time_prob", "mask_feature_prob"), (0.0, 1.0)),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), (0.0, 0.99)),
}
# Parts that some encoders have and that frames are not read from or through.
_UNREAD_PARTS = ("add_adapter", "adapter_attn_dim", "conv_pos_batch_norm")
# A model is built by these, with its labels and the sizes of its speech encoder.
_ARCHITECTURE = (
    *("speech_encoder_pooling", "speech_encoder_pooling_heads", "speech_encoder_pooling_hidden_size"),
    *("speech_encoder_pooling_min_variance", "speech_encoder_layers", "context", "context_scope", "hidden_size"),
    *("num_hidden_layers", "state_size", "conv_kernel", "expand", "head_dim", "ema_decay", "ema_decay_learnable"),
    *("projection_activation", "head_hidden_layers", "head_activation", "activation_layer_norm", "bounded_predictions"),
    "predict_spread",
)
_LABEL_FIELDS = ("id2label", "label2id", "num_labels")
# Of the convolution front end: (lowest, highest) of each layer's value. Published encoders have 7 layers.
_FRONT_END_BOUNDS = {"conv_dim": (1, 4096), "conv_kernel": (1, 64), "conv_stride": (1, 64)}
_MAX_FRONT_END_LAYERS = 16


class MambaEMAConfig(PretrainedConfig):
    r"""
    Configuration of a [`MambaEMAModel`] or [`MambaEMAForRegression`].

    Args:
        speech_encoder_config (`WavLMConfig`, `Wav2Vec2Config`, `HubertConfig` or `dict`, *optional*):
            What turns a waveform into frames. Default: the shape of `microsoft/wavlm-large`, with layer drop and
            SpecAugment off. A `dict` may name its `model_type` (`"wavlm"`, `"wav2vec2"` or `"hubert"`; default
            `"wavlm"`) and is completed with the defaults of that type, these two excepted.
        speech_encoder_pooling (`str`, *optional*, defaults to `"attention"`):
            How the frames of an utterance become one vector: `"mean"`, `"attention"`, `"multihead_attention"`,
            `"statistics"` or `"attentive_statistics"`.
        speech_encoder_pooling_heads (`int`, *optional*, defaults to 4):
            Heads of `"multihead_attention"`; must divide the width of the speech encoder. Other poolings ignore it.
        speech_encoder_pooling_hidden_size (`int`, *optional*):
            Width of a hidden layer in the scorer of frames (Okabe et al. 2018, equation 3, see `HiddenScorer`). By
            default scores are linear in the frame. Poolings that score no frames ignore it.
        speech_encoder_pooling_min_variance (`float`, *optional*, defaults to 1e-10):
            A variance over the frames of an utterance counts as at least this much. Poolings without a standard
            deviation ignore it.
        speech_encoder_pooling_uniform_start (`bool`, *optional*, defaults to `False`):
            A new model scores every frame 0, so that training begins with the mean over time, whatever the seed. By
            default scores begin at random.
        speech_encoder_layers (`int` or `list[int]`, *optional*, defaults to -1):
            Which of the speech encoder's hidden states are read: -1 or `num_hidden_layers` is the last (after the final
            layer norm where it has one), 0 the input of the first layer. Several are summed with learned softmax
            weights.
        freeze_speech_encoder (`bool`, *optional*, defaults to `False`):
            Build the model with the speech encoder's weights fixed; pooling and everything after it is trained. An
            encoder none of whose weights is trained stays in evaluation mode.
        context (`str`, *optional*, defaults to `"mamba_ema"`):
            What carries emotion over the turns: `"none"`, `"ema"`, `"mamba"` or `"mamba_ema"`.
        context_scope (`str`, *optional*, defaults to `"conversation"`):
            Over whose turns: those of the `"conversation"`, whoever speaks; each `"speaker"`'s own; or `"both"`, side
            by side. Without `speaker_ids` in the input a speaker's turns are those of the conversation.
        max_speakers (`int`, *optional*, defaults to 8): Speakers of a conversation that have a context of their own.
        hidden_size (`int`, *optional*, defaults to 256): Width of the observations, the updater and the EMA state.
        num_hidden_layers (`int`, *optional*, defaults to 2): Mamba-2 blocks of the updater.
        state_size (`int`, *optional*, defaults to 64): State dimension N of Mamba-2.
        conv_kernel (`int`, *optional*, defaults to 4): Width of Mamba-2's causal convolution over turns (2 to 4).
        expand (`int`, *optional*, defaults to 2): Inner width of Mamba-2 in multiples of `hidden_size`.
        head_dim (`int`, *optional*, defaults to 64): Width of a Mamba-2 head; must divide `expand * hidden_size`.
        ema_decay (`float`, *optional*, defaults to 0.8):
            alpha in `c_t = alpha c_{t-1} + (1 - alpha) u_t`, strictly between 0 and 1.
        ema_decay_learnable (`bool`, *optional*, defaults to `False`): Learn alpha per dimension, from `ema_decay` on.
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout in the updater's blocks and before each linear layer of the head.
        pooled_dropout (`float`, *optional*, defaults to 0.0): Dropout before the projection.
        projection_activation (`str`, *optional*):
            Activation after the projection: `"gelu"`, `"relu"`, `"silu"` or `"tanh"`. Default: none, observations are
            linear in the pooled vector.
        head_hidden_layers (`int`, *optional*, defaults to 1):
            Hidden layers of the head, 0 or 1. With 0, predictions are linear in observation and context, and a new
            context changes nothing before it is trained (see `RegressionHead`).
        head_activation (`str`, *optional*, defaults to `"gelu"`): Activation of the head's hidden layer.
        activation_layer_norm (`bool`, *optional*, defaults to `False`):
            A layer norm before each activation of projection and head.
        bounded_predictions (`bool`, *optional*, defaults to `True`):
            Keep predictions on the unit scale by a sigmoid. Without it they may leave it.
        predict_spread (`bool`, *optional*, defaults to `False`):
            Predict beside each value the standard deviation of its raters (`outputs.spread`), learned from the columns
            `valence_sd` and so on of a corpus.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether the speech encoder was trained on waveforms of zero mean and unit variance each (WavLM-large: yes).
            The feature extractor saved with the model has the same value.
        waveform_mean, waveform_std (`float`, *optional*):
            Mean and standard deviation of all samples of the corpus that the model was trained on, if every waveform
            was standardised by them, instead of each by its own; `do_normalize` is `False` then. The feature extractor
            saved with the model has the same values.
        label_ranges (`dict[str, tuple[float, float]]`, *optional*):
            The labels' own scale by label name, for reading results back. A label that is not named has `[0, 1]`.
        loss_label_weights (`dict[str, float]`, *optional*):
            Weight of a label in the loss (1 where not named).
        loss_mse_weight (`float`, *optional*, defaults to 0.0):
            Share of the mean squared error in the loss; the rest is `1 - CCC`.
        interval_radii (`dict[str, dict[str, float]]`, *optional*):
            What was measured after training (see `docs/confidence.md`): by label name, for the share of turns that an
            interval is to hold, such as `"0.9"`, how far it reaches on either side of a prediction on the unit scale.
        scaled_intervals (`bool`, *optional*, defaults to `False`):
            `interval_radii` are multiples of the predicted spread, which counts as at least 0.01.
        interval_level (`float`, *optional*, defaults to 0.9): The share of `outputs.intervals`, one of those measured.

    Other names are kept as attributes, as in every configuration of transformers.

    Raises:
        ValueError: A value is outside its range, named with what is allowed; a name that is almost one of these; or a
            name in `speech_encoder_config` that the speech encoder's configuration does not have.

    Example:

    ```python
    >>> from modeling_mamba_ema import MambaEMAConfig
    >>> labels = {0: "valence", 1: "arousal", 2: "dominance"}
    >>> config = MambaEMAConfig(speech_encoder_pooling="attention", id2label=labels)
    >>> config.label_range("arousal")
    (0.0, 1.0)

    ```
    """

    model_type = "mamba_ema"
    sub_configs: ClassVar[dict[str, type]] = {"speech_encoder_config": AutoConfig}
    # What a Trainer need not gather over an evaluation: predictions are logits, and the spread where there is one.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "pooled_output",
        "pooling_attentions",
        "turn_mask",
        "conversation_state",
        "hidden_states",
        "intervals",
    ]

    def __init__(
        self,
        speech_encoder_config: PretrainedConfig | dict[str, Any] | None = None,
        speech_encoder_pooling: str = "attention",
        speech_encoder_pooling_heads: int = 4,
        speech_encoder_pooling_hidden_size: int | None = None,
        speech_encoder_pooling_min_variance: float = MIN_VARIANCE,
        speech_encoder_pooling_uniform_start: bool = False,
        speech_encoder_layers: int | list[int] = -1,
        freeze_speech_encoder: bool = False,
        context: str = "mamba_ema",
        context_scope: str = "conversation",
        max_speakers: int = 8,
        hidden_size: int = 256,
        num_hidden_layers: int = 2,
        state_size: int = 64,
        conv_kernel: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        ema_decay: float = 0.8,
        ema_decay_learnable: bool = False,
        dropout: float = 0.1,
        pooled_dropout: float = 0.0,
        projection_activation: str | None = None,
        head_hidden_layers: int = 1,
        head_activation: str = "gelu",
        activation_layer_norm: bool = False,
        bounded_predictions: bool = True,
        predict_spread: bool = False,
        do_normalize: bool = True,
        waveform_mean: float | None = None,
        waveform_std: float | None = None,
        label_ranges: dict[str, tuple[float, float]] | None = None,
        loss_label_weights: dict[str, float] | None = None,
        loss_mse_weight: float = 0.0,
        interval_radii: dict[str, dict[str, float]] | None = None,
        scaled_intervals: bool = False,
        interval_level: float = 0.9,
        **kwargs: Any,
    ):
        given = locals()
        for name in _own_fields():
            setattr(self, name, given[name])
        _refuse_remote_attention_kernels(kwargs)
        # A saved configuration says by which version; that of another may have names that this one does not.
        saved = "transformers_version" in kwargs
        if not saved:
            _refuse_misspelt(kwargs)
        self.speech_encoder_config = _as_speech_encoder_config(speech_encoder_config, saved)
        kwargs.update(_as_labels(kwargs.get("id2label"), kwargs.get("label2id"), kwargs.get("num_labels")))
        # Without it, transformers' audio-classification pipeline would put a softmax on the scores.
        if kwargs.get("problem_type") is None:
            kwargs["problem_type"] = "regression"
        super().__init__(**kwargs)
        self.validate()
        if label_ranges is not None:  # as JSON has them
            self.label_ranges: Any = {label: list(scale) for label, scale in label_ranges.items()}

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the model's outputs."""
        names = {int(index): str(name) for index, name in (self.id2label or {}).items()}  # JSON has strings as keys
        return [names[index] for index in sorted(names)]

    @property
    def target_columns(self) -> list[str]:
        """Columns of a corpus that the model learns from: the labels, and for a model that predicts the spread of the
        raters their standard deviations, such as `valence_sd`."""
        return [*self.labels, *(f"{label}_sd" for label in self.labels if self.predict_spread)]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a checkpoint may be given other labels, by any of the names transformers has for them.

        Label ranges and loss weights of the checkpoint's labels that are gone are dropped with a warning.

        Raises:
            ValueError: the checkpoint's own labels in another order, which would give its weights other names.
        """
        given = {name: kwargs.pop(name) for name in _LABEL_FIELDS if kwargs.get(name) is not None}
        if given and given != {"num_labels": len(config_dict.get("id2label") or ())}:
            own = {name: value for name, value in config_dict.items() if name not in (*_LABEL_FIELDS, "interval_radii")}
            names = _as_labels(**given)
            before = _in_order(_as_labels(config_dict.get("id2label")))
            now = _in_order(names)
            if before != now and sorted(before) == sorted(now):
                raise ValueError(
                    f"the labels {now} are those of the checkpoint in another order, {before}; its weights would be "
                    "taken for other labels; load it as it is and call with_changes(id2label=...)"
                )
            config_dict = {**own, **names, **_of_labels(own, names)}
        return super().from_dict(config_dict, **kwargs)

    def with_changes(self, **changes: Any) -> MambaEMAConfig:
        """A copy with other values, without `interval_radii`, which were measured on another model.

        Args:
            changes: arguments of this class. `speech_encoder_config` is a dict of the fields to change. Ranges and loss
                weights of labels that are gone are dropped.

        Raises:
            ValueError: a name that is no argument, or a value outside its range.
        """
        for name in changes:
            _require_choice("a field to change", name, sorted({*_own_fields(), *_LABEL_FIELDS}))
        own = {**self.to_dict(), "interval_radii": None, "scaled_intervals": False}
        labels = {name: changes.pop(name) for name in _LABEL_FIELDS if name in changes}
        if labels and labels != {"num_labels": len(self.labels)}:
            own = {name: value for name, value in own.items() if name not in _LABEL_FIELDS}
            names = _as_labels(**labels)
            own.update(names | _of_labels(own, names))
        encoder = changes.pop("speech_encoder_config", None) or {}
        check_speech_encoder_fields(encoder, type(self.speech_encoder_config))
        own["speech_encoder_config"] = {**self.speech_encoder_config.to_dict(), **encoder}
        return type(self).from_dict({**own, **changes})

    def of_the_architecture(self) -> dict[str, Any]:
        """The fields that a model is built by; those of the loss, of scales and of what is measured are not."""
        encoder = self.speech_encoder_config.to_dict()
        fields = {name: getattr(self, name) for name in _ARCHITECTURE}
        return {
            **fields,
            "num_labels": len(self.labels),
            **{f"speech_encoder_config.{name}": encoder.get(name) for name in (*_SPEECH_ENCODER_BOUNDS, "conv_dim")},
        }

    @property
    def encoder_layer_indices(self) -> list[int]:
        """The speech encoder's hidden states that are read, from 0 (input of layer 1) to `num_hidden_layers`."""
        layers = self.speech_encoder_layers
        last = self.speech_encoder_config.num_hidden_layers
        chosen = [layers] if isinstance(layers, int) else list(layers)
        return [last if layer == -1 else layer for layer in chosen]

    def label_range(self, label: str) -> tuple[float, float]:
        """(low, high) of a label's own scale; the model's output 0 means `low` and 1 means `high`."""
        low, high = (self.label_ranges or {}).get(label, (0.0, 1.0))
        return float(low), float(high)

    def interval_radius(self, label: str) -> float | None:
        """How far the interval of `interval_level` reaches on either side of a prediction, on the unit scale or, with
        `scaled_intervals`, in multiples of the spread; None where it was not measured."""
        return (self.interval_radii or {}).get(label, {}).get(f"{self.interval_level:g}")

    def confidence(self, label: str, value: float, spread: float | None = None) -> float:
        """That a turn's label lies on the same side of 0.5, the middle of the scale, as the prediction on the unit
        scale: the largest level whose interval does not hold 0.5; 0 where there is none. It is wrong in at most 1 -
        level of all turns. A model with `scaled_intervals` needs the spread, too."""
        radii = (self.interval_radii or {}).get(label, {})
        unit = max(spread, MIN_SPREAD) if self.scaled_intervals and spread is not None else 1.0
        reached = abs(value - NEUTRAL) / unit
        return max((float(level) for level, radius in radii.items() if radius < reached), default=0.0)

    def validate(self) -> None:
        """Check every value, as when the configuration was made.

        Called again when a model is built and when a configuration is saved, since fields can be set in between.

        Raises:
            ValueError: a value is outside its range, named with what is allowed.
        """
        if hasattr(super(), "validate"):  # from transformers 5.4 on
            super().validate()  # type: ignore[misc]
        _require_choice("problem_type", self.problem_type, ["regression"])
        _require_choice("speech_encoder_pooling", self.speech_encoder_pooling, POOLINGS)
        _require_choice("context", self.context, CONTEXTS)
        _require_choice("context_scope", self.context_scope, SCOPES)
        for name, (low, high) in _INTEGER_BOUNDS.items():
            _require_integer(name, getattr(self, name), low, high)
        self._validate_speech_encoder()
        for name, (lowest, highest) in _NUMBER_BOUNDS.items():
            _require_number(name, getattr(self, name), lowest, highest)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are True and False")
        _require_choice("head_activation", self.head_activation, ACTIVATIONS)
        if self.projection_activation is not None:
            _require_choice("projection_activation", self.projection_activation, ACTIVATIONS)
        validate_normalization(self.do_normalize, self.waveform_mean, self.waveform_std)
        if CONTEXTS[self.context].mamba:
            check_head_dim(self.hidden_size, self.expand, self.head_dim)
        if CONTEXTS[self.context].ema:
            check_ema_decay(self.ema_decay)
        scorer_hidden_size = self.speech_encoder_pooling_hidden_size
        if scorer_hidden_size is not None:
            _require_integer("speech_encoder_pooling_hidden_size", scorer_hidden_size, 1, 4096)
        if POOLINGS[self.speech_encoder_pooling].headwise:
            for size in (self.speech_encoder_config.hidden_size, scorer_hidden_size):
                if size is not None:
                    check_num_heads(size, self.speech_encoder_pooling_heads)
        self._validate_layers()
        self._validate_labels()
        self._validate_intervals()

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, after a check of every value."""
        self.validate()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _validate_speech_encoder(self) -> None:
        encoder: Any = self.speech_encoder_config
        for name, (low, high) in _SPEECH_ENCODER_BOUNDS.items():
            if hasattr(encoder, name):
                _require_integer(f"speech_encoder_config.{name}", getattr(encoder, name), low, high)
        for name, (lowest, highest) in _SPEECH_ENCODER_NUMBER_BOUNDS.items():
            if hasattr(encoder, name):
                _require_number(f"speech_encoder_config.{name}", getattr(encoder, name), lowest, highest)
        for name, (low, high) in _FRONT_END_BOUNDS.items():
            values = getattr(encoder, name)
            if not isinstance(values, (list, tuple)):
                raise ValueError(f"speech_encoder_config.{name} is {values!r}; allowed are lists of whole numbers")
            if not 1 <= len(values) <= _MAX_FRONT_END_LAYERS:
                raise ValueError(
                    f"speech_encoder_config.{name} has {len(values)} values; allowed are 1 to {_MAX_FRONT_END_LAYERS}"
                )
            for value in values:
                _require_integer(f"each of speech_encoder_config.{name}", value, low, high)
        for name in ("hidden_act", "feat_extract_activation"):
            _require_choice(f"speech_encoder_config.{name}", getattr(encoder, name), ACT2FN)
        for name in _UNREAD_PARTS:
            if getattr(encoder, name, None):
                raise ValueError(
                    f"speech_encoder_config.{name} is {getattr(encoder, name)!r}; Mamba-EMA reads encoders without it"
                )

    def _validate_layers(self) -> None:
        layers = self.speech_encoder_layers
        chosen = [layers] if isinstance(layers, int) and not isinstance(layers, bool) else layers
        last = self.speech_encoder_config.num_hidden_layers
        if not isinstance(chosen, (list, tuple)) or not chosen:
            raise ValueError(f"speech_encoder_layers must be an integer or a list of integers, got {layers!r}")
        for layer in chosen:
            _require_integer("speech_encoder_layers", layer, -1, last)
        resolved = self.encoder_layer_indices
        if len(set(resolved)) != len(resolved):
            raise ValueError(f"speech_encoder_layers {layers} names a layer twice")

    def _validate_labels(self) -> None:
        numbers = sorted(int(index) for index in self.id2label or {})
        if not 1 <= len(numbers) <= MAX_LABELS:
            raise ValueError(f"id2label names {len(numbers)} labels; allowed are 1 to {MAX_LABELS}")
        if numbers != list(range(len(numbers))):
            raise ValueError(f"id2label must number its labels from 0 without gaps, got {numbers}")
        if not all(label.strip() for label in self.labels):
            raise ValueError(f"id2label has a label without a name: {self.labels}")
        if len(set(self.labels)) != len(numbers):
            raise ValueError(f"id2label names a label twice: {self.labels}")
        for name in ("label_ranges", "loss_label_weights", "interval_radii"):
            by_label = getattr(self, name)
            if by_label is not None and not isinstance(by_label, Mapping):
                raise ValueError(f"{name} is {by_label!r}; allowed are None and a dict by the labels' names")
        for label, scale in (self.label_ranges or {}).items():
            _require_choice("a label of label_ranges", label, self.labels, "; id2label names the labels of the model")
            pair = isinstance(scale, (list, tuple)) and len(scale) == 2
            if not pair or not all(map(_is_finite, scale)) or not scale[0] < scale[1]:
                raise ValueError(f"label_ranges[{label!r}] must be [low, high] with low < high, got {scale}")
        for label, weight in (self.loss_label_weights or {}).items():
            _require_choice("a label of loss_label_weights", label, self.labels)
            _require_number(f"loss_label_weights[{label!r}]", weight, 0.0, 1e6)
        if not any((self.loss_label_weights or {}).get(label, 1.0) for label in self.labels):
            raise ValueError(f"loss_label_weights are 0 for every label: {self.loss_label_weights}")

    def _validate_intervals(self) -> None:
        if self.interval_radii is None:
            return
        if self.scaled_intervals and not self.predict_spread:
            raise ValueError("scaled_intervals are multiples of the spread, which needs predict_spread")
        level = f"{self.interval_level:g}"
        for label in self.labels:
            radii = self.interval_radii.get(label, {})
            if not isinstance(radii, Mapping):
                raise ValueError(f"interval_radii[{label!r}] is {radii!r}; allowed is a dict of radii by level")
            if level not in radii:
                raise ValueError(f"interval_radii has no {level!r} (interval_level) of {label}")
        for label, radii in self.interval_radii.items():
            _require_choice("a label of interval_radii", label, self.labels)
            for level, radius in radii.items():
                _require_number(f"interval_radii[{label!r}][{level!r}]", radius, 0.0, math.inf)
                _require_number("a level of interval_radii", float(level), 0.0, 1.0)


def _own_fields() -> list[str]:
    """The arguments of [`MambaEMAConfig`]."""
    return [name for name in inspect.signature(MambaEMAConfig.__init__).parameters if name not in ("self", "kwargs")]


def _refuse_misspelt(names: Iterable[str]) -> None:
    """Raise `ValueError` for a name that transformers does not have and that is almost one of [`MambaEMAConfig`]'s."""
    for name in set(names) - vars(PretrainedConfig()).keys() - {*_LABEL_FIELDS}:
        if close := difflib.get_close_matches(name, (*_own_fields(), *_LABEL_FIELDS), n=1, cutoff=0.8):
            raise ValueError(f"MambaEMAConfig has no field {name!r}; did you mean {close[0]!r}?")


def check_speech_encoder_fields(fields: Any, kind: type[PretrainedConfig]) -> None:
    """Raise `ValueError` where `fields` of `speech_encoder_config` are no dict, or one is none of the configuration
    `kind`."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"speech_encoder_config must be a dict of fields here, not {type(fields).__name__}")
    config = kind()
    for name in fields:
        if not hasattr(config, name) and name not in ("torch_dtype", "attn_implementation"):
            close = difflib.get_close_matches(name, vars(config), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"speech_encoder_config.{name} is no field of {kind.__name__}{hint}")


def _as_speech_encoder_config(given: Any, saved: bool) -> PretrainedConfig:
    """The configuration of the speech encoder from what a caller gives; a dict is completed with defaults."""
    if given is None:
        return WavLMConfig(**SPEECH_ENCODER_DEFAULTS, **WAVLM_LARGE)
    if isinstance(given, dict):
        _refuse_remote_attention_kernels(given)
        kind = given.get("model_type", WavLMConfig.model_type)
        _require_choice("speech_encoder_config.model_type", kind, SPEECH_ENCODERS)
        if not saved and "transformers_version" not in given:
            check_speech_encoder_fields(given, SPEECH_ENCODERS[kind])
        try:
            return SPEECH_ENCODERS[kind](**{**SPEECH_ENCODER_DEFAULTS, **given})
        except Exception as error:  # the errors of transformers' checks have no class in common
            raise ValueError(f"speech_encoder_config: {' '.join(str(error).split())}") from error
    if not isinstance(given, (WavLMConfig, Wav2Vec2Config, HubertConfig)):
        raise ValueError(
            "speech_encoder_config must be a WavLMConfig, Wav2Vec2Config or HubertConfig, a dict of fields or None, "
            f"not {type(given).__name__}"
        )
    return given


def _in_order(names: Mapping[str, Any]) -> list[str]:
    """The labels of [`_as_labels`] by their numbers."""
    return [name for _, name in sorted(names.get("id2label", {}).items())]


def _as_labels(
    id2label: Mapping[Any, Any] | None = None,
    label2id: Mapping[Any, Any] | None = None,
    num_labels: int | None = None,
) -> dict[str, Any]:
    """Both maps between labels and their numbers from any of them; only `num_labels` where no label is named.

    Raises:
        ValueError: no map between names and whole numbers, or the three contradict each other.
    """
    if num_labels is not None:
        _require_integer("num_labels", num_labels, 1, MAX_LABELS)
    if id2label is None and label2id is None and num_labels is not None:
        return {"num_labels": num_labels}
    try:
        # Keys may be strings, as JSON and transformers' example scripts have them.
        maps = [] if id2label is None else [{int(index): str(name) for index, name in id2label.items()}]
        maps += [] if label2id is None else [{int(index): str(name) for name, index in label2id.items()}]
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"id2label is {id2label!r}, label2id is {label2id!r}; allowed are dicts such as {{0: 'valence'}} and "
            "{'valence': 0}"
        ) from None
    names = maps[0] if maps else dict(enumerate(DEFAULT_LABELS))
    if maps[1:] and maps[1] != names:
        raise ValueError(f"id2label is {id2label!r}, but label2id is {label2id!r}; give one of the two")
    if num_labels is not None and num_labels != len(names):
        raise ValueError(f"num_labels is {num_labels}, but {len(names)} labels are named: {', '.join(names.values())}")
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def _of_labels(config_dict: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Label ranges and loss weights of a checkpoint without those of labels that are gone."""
    kept = {}
    for field in ("label_ranges", "loss_label_weights"):
        values = config_dict.get(field) or {}
        gone = [label for label in values if label not in names.get("label2id", ())]
        if gone:
            logger.warning(f"{field} of {', '.join(gone)} are dropped: the model no longer has these labels")
            kept[field] = {label: value for label, value in values.items() if label not in gone} or None
    return kept


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(value)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_choice(name: str, value: object, allowed: Collection[str], hint: str = "") -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}{hint}")


def _require_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed are whole numbers from {low} to {high}")


def _require_number(name: str, value: object, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; allowed are numbers from {low} to {high}")


def _refuse_remote_attention_kernels(fields: dict[str, Any]) -> None:
    """A config.json may not choose code: transformers reads `org/repo` here as a kernel to fetch from the Hub."""
    for name in ("attn_implementation", "_attn_implementation"):
        value = fields.get(name)
        values = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(choice, str) and choice not in ("eager", "sdpa") for choice in values):
            raise ValueError(
                f"{name} is {value!r}; Mamba-EMA allows 'eager' and 'sdpa', no attention kernel from a repository"
            )


__all__ = ["MambaEMAConfig"]
