"""The Mamba-EMA model: speech encoder -> conversation encoder -> head."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput, logging

from .ccc_loss import MIN_SPREAD, MISSING_LABEL, ccc_loss, check_labels, spread_loss
from .configuration_mamba_ema import SPEECH_ENCODER_DEFAULTS, MambaEMAConfig, check_speech_encoder_fields
from .conversation_encoder import (
    CONTEXTS,
    SCOPES,
    UNKNOWN_SPEAKER,
    ConversationEncoder,
    ConversationState,
    SpeakerEncoder,
    check_state,
)
from .fast_speech_encoder import Int8Linear, quantize_linear_layers
from .feature_extraction_mamba_ema import NORMALIZATION, MambaEMAFeatureExtractor
from .mamba2 import GatedRMSNorm
from .pooling import values_are_known
from .speech_encoder import BACKBONES, SpeechEncoder, UtteranceBatch, check_frames, collect_utterances, receptive_field

if TYPE_CHECKING:
    # For a model in a local folder, transformers before 5.9 copies only the files that an entry file itself names.
    from .audio_containers import Part  # noqa: F401
    from .audio_files import AudioFileError  # noqa: F401

logger = logging.get_logger(__name__)
ModelType = TypeVar("ModelType", bound="MambaEMAPreTrainedModel")

CPU_ALIGNMENT = 64  # bytes; where torch's allocator lets a tensor begin
AUTO_MAP = {
    "AutoConfig": "configuration_mamba_ema.MambaEMAConfig",
    "AutoModel": "modeling_mamba_ema.MambaEMAForRegression",
    "AutoModelForAudioClassification": "modeling_mamba_ema.MambaEMAForRegression",
    "AutoFeatureExtractor": "feature_extraction_mamba_ema.MambaEMAFeatureExtractor",
}


@dataclass
class MambaEMAModelOutput(ModelOutput):
    """
    Output of [`MambaEMAModel`]. For `(batch, samples)` inputs the `turns` dimension is absent throughout.

    Attributes:
        last_hidden_state: (batch, turns, features), the observation z_t and, beside it where there is context, c_t.
        pooled_output: (batch, turns, pooled_size), the speech encoder's frames pooled to one vector a turn.
        pooling_attentions: (batch, turns, heads, frames), weights over time that sum to 1; uniform without attention.
        turn_mask: (batch, turns), 1 at turns that are there.
        conversation_state: what to pass to the next call; only with `use_conversation_state=True`.
        hidden_states: the speech encoder's, `num_hidden_layers + 1` of (batch, turns, frames, hidden); on request. The
            last one is the encoder's `last_hidden_state`, after its final layer norm, in every version of transformers.
    """

    last_hidden_state: torch.Tensor | None = None
    pooled_output: torch.Tensor | None = None
    pooling_attentions: torch.Tensor | None = None
    turn_mask: torch.Tensor | None = None
    conversation_state: ConversationState | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MambaEMARegressionOutput(ModelOutput):
    """
    Output of [`MambaEMAForRegression`]. For `(batch, samples)` inputs the `turns` dimension is absent throughout.

    Attributes:
        loss: scalar, present when labels are given.
        logits: (batch, turns, num_labels) in the order of `config.id2label`, on the unit scale, float32; NaN at turns
            that are not there. Within [0, 1], unless `config.bounded_predictions` is False.
            [`MambaEMAForRegression.to_label_ranges`] gives the labels' own scale.
        pooled_output, pooling_attentions, turn_mask, conversation_state, hidden_states: as in [`MambaEMAModelOutput`].
        intervals: (batch, turns, num_labels, 2), lower and upper end of the interval that holds the label of
            `config.interval_level` of all turns (see `docs/confidence.md`), on the unit scale; None for a model whose
            errors were not measured (`config.interval_radii`).
        spread: (batch, turns, num_labels), predicted standard deviation of the raters on the unit scale, float32; NaN
            likewise. None without `config.predict_spread`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pooled_output: torch.Tensor | None = None
    pooling_attentions: torch.Tensor | None = None
    turn_mask: torch.Tensor | None = None
    conversation_state: ConversationState | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    intervals: torch.Tensor | None = None
    spread: torch.Tensor | None = None


class Activation(nn.Module):
    """An activation by its name in transformers, after a layer norm of this width if asked for; None: the identity."""

    def __init__(self, name: str | None, size: int, layer_norm: bool):
        super().__init__()
        self.norm = nn.LayerNorm(size) if layer_norm and name is not None else None
        self.function = None if name is None else ACT2FN[name]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)"""
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if self.function is None else self.function(hidden)


class RegressionHead(nn.Module):
    r"""Predictions y_t from the observation z_t and the context c_t (two contexts, side by side, for two scopes).

    With a hidden layer the head reads both side by side: y_t = s(O g(W [z_t; c_t] + w) + o). Without one it is linear,
    and a part of its own reads the context: y_t = s(O z_t + C c_t + o). s is the sigmoid, which keeps predictions on
    the unit scale, or the identity where they are not bounded; g is the activation, after a layer norm if asked for.

    C begins at zero. A context that is added to a trained model thus changes no bit of its predictions before the first
    step, and can be learned all the same: the gradient of C is the context's, and once C is not zero the context gets a
    gradient too (as the second factor of LoRA, Hu et al. 2022, section 4.1).

    Args:
        num_contexts: of width `config.hidden_size` each, which stand behind the observation.
    """

    def __init__(self, config: MambaEMAConfig, num_contexts: int, bounded: bool):
        super().__init__()
        size, num_labels = config.hidden_size, len(config.labels)
        self.observation_size = size
        self.bounded = bounded
        self.dropout = nn.Dropout(config.dropout)
        self.dense = None
        self.context_proj = None
        if config.head_hidden_layers:
            self.dense = nn.Linear((1 + num_contexts) * size, size)
            self.activation = Activation(config.head_activation, size, config.activation_layer_norm)
        elif num_contexts:
            self.context_proj = ContextProjection(num_contexts * size, num_labels, bias=False)
        self.out_proj = nn.Linear(size, num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[z_t; c_t], or z_t without a context, (..., features) -> (..., num_labels) in float32.

        bf16 predictions alone would cost a CCC loss 1e-2.
        """
        features = self.dropout(features)
        if self.dense is not None:
            scores = self.out_proj(self.dropout(self.activation(self.dense(features))))
        else:
            # In memory as without a context, so that the product is rounded alike.
            scores = self.out_proj(features[..., : self.observation_size].contiguous())
            if self.context_proj is not None:
                scores = scores + self.context_proj(features[..., self.observation_size :])
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return torch.sigmoid(scores) if self.bounded else scores


class ContextProjection(nn.Linear):
    """The part of a head without hidden layer that reads the context; zero at first."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def _align_weights(model: nn.Module) -> None:
    """Move weights that do not begin where torch lets new ones begin.

    A loaded weight lies where its file was read, and on some processors a product is rounded by where its factors
    begin: a loaded model would not give every bit of the saved one's numbers.
    """
    for weight in (*model.parameters(), *model.buffers()):
        if weight.device.type == "cpu" and weight.data_ptr() % CPU_ALIGNMENT:
            weight.data = weight.data.clone()


def _is_of_this_package(module: nn.Module) -> bool:
    return type(module).__module__.rpartition(".")[0] == __name__.rpartition(".")[0]


class MambaEMAPreTrainedModel(PreTrainedModel):
    config_class = MambaEMAConfig
    config: MambaEMAConfig
    base_model_prefix = "mamba_ema"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Trainer multiplies the loss by the accumulation steps for models that take `num_items_in_batch`; a CCC does not
    # add up over batches that way.
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(
        cls: type[ModelType],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        use_safetensors: bool | None = True,
        **kwargs: Any,
    ) -> ModelType:
        """As in transformers, but from safetensors alone: a pickle can run code. `use_safetensors=False` takes one."""
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, use_safetensors=use_safetensors, **kwargs
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        if not getattr(model, "_hf_peft_config_loaded", False):  # adapters have set what is trained
            model.speech_encoder.freeze_as_configured()
        _align_weights(model)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every parameter of ours starts here, so that none stays uninitialised when a checkpoint lacks it."""
        # What a checkpoint has filled is marked, and guarded by transformers in the functions of `torch.nn.init` alone.
        loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        self._init_all_weights(module)
        for parameter, value in loaded:
            parameter.copy_(value)

    def _init_all_weights(self, module: nn.Module) -> None:
        if getattr(module, "begins_at_zero", False):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        elif _is_of_this_package(module) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
        elif isinstance(module, nn.Linear):
            # Keeps the variance from layer to layer. With the smaller weights usual in transformers the predictions of
            # a new model hardly vary, and where nothing varies a CCC has almost no gradient.
            nn.init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            bound = (module.in_channels // module.groups * module.kernel_size[0]) ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, GatedRMSNorm)):
            nn.init.ones_(module.weight)
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)

    def get_input_embeddings(self) -> Any:
        """None, asked for by sharding and adapters: waveforms are not looked up in a table."""

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "re-entrant gradient checkpointing recurses without end in the speech encoder's backward pass; "
                "pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class MambaEMAModel(MambaEMAPreTrainedModel):
    """A speech encoder with pooling, and the Mamba and EMA state over the turns of a conversation, without a head.

    Attributes:
        speech_encoder: WavLM, wav2vec 2.0 or HuBERT, choice of layers, pooling.
        projection, projection_activation: pooled vector h_t -> observation z_t = f(P h_t + p); f is the identity, or
            `config.projection_activation`, after a layer norm if asked for.
        conversation_encoder: z_1..z_t -> c_t, over the turns of the conversation; None where the configuration's
            `context` or `context_scope` has none.
        speaker_encoder: the same over each speaker's own turns; None likewise.
    """

    def __init__(self, config: MambaEMAConfig):
        config.validate()
        if getattr(config, "lora", None) is not None:
            raise ValueError(
                "these are LoRA adapters without the weights they were trained on; `mamba-ema merge FOLDER OUTPUT` "
                "makes a model of them"
            )
        super().__init__(config)
        self.speech_encoder = SpeechEncoder(config)
        self.pooled_dropout = nn.Dropout(config.pooled_dropout)
        self.projection = nn.Linear(self.speech_encoder.pooled_size, config.hidden_size)
        self.projection_activation = Activation(
            config.projection_activation, config.hidden_size, config.activation_layer_norm
        )
        scope, sizes = SCOPES[config.context_scope], _context_sizes(config)
        self.conversation_encoder = ConversationEncoder(**sizes) if sizes and scope.conversation else None
        self.speaker_encoder = SpeakerEncoder(config.max_speakers, **sizes) if sizes and scope.speaker else None
        self.min_samples = receptive_field(config.speech_encoder_config)
        # Sharding and device maps take these as units; which class an encoder's layers have depends on its norm.
        units = {type(layer).__name__ for layer in self.speech_encoder.backbone.encoder.layers}
        self._no_split_modules = sorted(units | ({type(m).__name__ for m in self.modules()} & {"Mamba2Block"}))
        self.post_init()

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        turn_mask: torch.Tensor | None = None,
        speaker_ids: torch.Tensor | None = None,
        conversation_state: ConversationState | None = None,
        use_conversation_state: bool = False,
        frame_values: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> MambaEMAModelOutput | tuple[Any, ...]:
        """
        Args:
            input_values: (batch, samples): a batch of single utterances; or (batch, turns, samples): conversations,
                right-padded in samples and in turns.
            attention_mask: same shape, 1 at samples that are there.
            turn_mask: (batch, turns), 1 at turns that are there. A turn that is left out in the middle changes nothing:
                the state stays as it was.
            speaker_ids: (batch, turns), who speaks in each turn: whole numbers from 0 to `config.max_speakers` - 1, -1
                for unknown; (batch,) for single turns. They matter where `config.context_scope` is not
                `"conversation"`; a conversation's numbering may be any, but must be kept over its calls.
            conversation_state: the state an earlier call returned; the turns given now continue its conversations.
                (batch, samples) inputs are then the next turn of each conversation.
            use_conversation_state: return the state after the last turn.
            frame_values: (batch, turns, layers, frames, hidden), frames computed before, instead of `input_values`.
            frame_mask: (batch, turns, frames), 1 at frames that are there; needed with `frame_values`.
            output_hidden_states: return the speech encoder's hidden states; gradients reach them.
            output_attentions: the speech encoder's self-attention is not returned; asking for it logs a hint.
            return_dict: `False` for a plain tuple.

        Raises:
            ValueError: inputs that are no complete utterances (see `collect_utterances`, `check_frames`), speakers
                out of range, or a state of another batch or model.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if output_attentions:
            logger.warning_once("self-attention is not returned; pooling_attentions show what the model weighs")
        if (input_values is None) == (frame_values is None):
            raise ValueError("give either input_values or frame_values")
        single_turn = input_values is not None and input_values.dim() == 2

        # 1. speech encoder, over the utterances that are there: (utterances, pooled_size)
        hidden_states = None
        if input_values is not None:
            utterances = collect_utterances(
                input_values.to(self.dtype) if input_values.is_floating_point() else input_values,
                attention_mask,
                turn_mask,
                self.min_samples,
            )
            keep = partial(_keep_hidden_state, utterances, single_turn) if output_hidden_states else None
            pooled, attention, hidden_states = self.speech_encoder(utterances.waveforms, utterances.lengths, keep=keep)
        else:
            assert frame_values is not None
            layers, width = len(self.speech_encoder.layers), self.config.speech_encoder_config.hidden_size
            frame_mask, present = check_frames(frame_values, frame_mask, turn_mask, layers, width)
            every_turn = not values_are_known(frame_values)
            utterances = UtteranceBatch(frame_values, None, present, every_turn)
            if every_turn:  # a turn that is not there has a frame of zeros, so that it holds numbers
                frame_mask = frame_mask | ~present.unsqueeze(-1)
            pooled, attention, _ = self.speech_encoder(
                layer_frames=utterances.to_utterances(frame_values).to(self.dtype),
                frame_mask=utterances.to_utterances(frame_mask),
            )

        # 2. back to conversations: (batch, turns, ...), zeros at turns that are not there
        present = utterances.turn_mask
        pooled, attention = utterances.to_turns(pooled), utterances.to_turns(attention)

        # 3. observations and context: z_t, c_t
        observations = self.observe(pooled)  # (batch, turns, hidden_size)
        speaker_ids = self._checked_speakers(speaker_ids, present)
        contexts, state = self._contexts(observations, present, speaker_ids, conversation_state)
        features = torch.cat([observations, *contexts], dim=-1)

        if single_turn:
            features, pooled, attention = features.squeeze(1), pooled.squeeze(1), attention.squeeze(1)
            present = present.squeeze(1)
        output = MambaEMAModelOutput(
            last_hidden_state=features,
            pooled_output=pooled,
            pooling_attentions=attention,
            turn_mask=present.long(),
            conversation_state=state if use_conversation_state else None,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )
        return output if return_dict else output.to_tuple()

    @property
    def contexts(self) -> list[str]:
        """Whose turns the contexts are of, in the order in which they stand behind the observation."""
        encoders = {"conversation": self.conversation_encoder, "speaker": self.speaker_encoder}
        return [scope for scope, encoder in encoders.items() if encoder is not None]

    def observe(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled vectors h_t, (..., pooled_size) -> observations z_t, (..., hidden_size)"""
        return self.projection_activation(self.projection(self.pooled_dropout(pooled)))

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ConversationState | None:
        """The state of conversations that have not begun, of the weights' device and type where no others are given;
        None for a model without context."""
        if self.conversation_encoder is None and self.speaker_encoder is None:
            return None
        where = (self.device if device is None else device, self.dtype if dtype is None else dtype)
        state = ConversationState(torch.zeros(batch_size, dtype=torch.int64, device=where[0]))
        if self.conversation_encoder is not None:
            state = self.conversation_encoder.initial_state(batch_size, *where)
        if self.speaker_encoder is not None:
            state.speakers = self.speaker_encoder.initial_state(batch_size, *where)
        return state

    def _contexts(
        self,
        observations: torch.Tensor,
        present: torch.Tensor,
        speaker_ids: torch.Tensor | None,
        state: ConversationState | None,
    ) -> tuple[list[torch.Tensor], ConversationState | None]:
        """Contexts by the configured scope, (batch, turns, hidden_size) each, and the state after the last turn."""
        before = self.initial_state(observations.shape[0], observations.device, observations.dtype)
        if before is None:
            return [], None
        if state is None:
            state = before
        check_state(state, before, observations.device)
        contexts = []
        after = ConversationState(state.num_turns + present.sum(dim=1))
        if self.conversation_encoder is not None:
            own = ConversationState(state.num_turns, state.mamba, state.ema)
            context, after = self.conversation_encoder(observations, present, own)
            contexts.append(context)
        if self.speaker_encoder is not None:
            context, after.speakers = self.speaker_encoder(observations, present, state.speakers, speaker_ids)
            contexts.append(context)
        return contexts, after

    def _checked_speakers(self, speaker_ids: torch.Tensor | None, present: torch.Tensor) -> torch.Tensor | None:
        """Ids as (batch, turns); None where no context is a speaker's. Raises `ValueError` where they are not an
        integer for each turn, or outside -1 to `max_speakers` - 1."""
        if speaker_ids is None:
            return None
        batch, turns = present.shape
        if turns == 1 and speaker_ids.dim() == 1:
            speaker_ids = speaker_ids.unsqueeze(1)
        if speaker_ids.shape != present.shape or speaker_ids.is_floating_point() or speaker_ids.dtype == torch.bool:
            raise ValueError(
                f"speaker_ids are {speaker_ids.dtype} of shape {tuple(speaker_ids.shape)}, but must be whole numbers, "
                f"one for each turn: ({batch}, {turns})"
            )
        if self.speaker_encoder is None:
            return None
        speaker_ids = speaker_ids.long()
        wrong = present & ((speaker_ids < UNKNOWN_SPEAKER) | (speaker_ids >= self.config.max_speakers))
        if values_are_known(speaker_ids) and bool(wrong.any()):
            row, turn = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"the speaker of turn {turn} of row {row} has the id {int(speaker_ids[row, turn])}; allowed are 0 to "
                f"{self.config.max_speakers - 1} (max_speakers of the configuration), and {UNKNOWN_SPEAKER} for unknown"
            )
        # Turns that are not there may have any id.
        return speaker_ids.masked_fill(~present, UNKNOWN_SPEAKER)


def _context_sizes(config: MambaEMAConfig) -> dict[str, Any]:
    """Arguments of a `ConversationEncoder`; empty for a model without context."""
    parts = CONTEXTS[config.context]
    if not (parts.mamba or parts.ema):
        return {}
    names = [
        *("hidden_size", "context", "num_hidden_layers", "state_size", "conv_kernel", "expand", "head_dim"),
        *("ema_decay", "ema_decay_learnable", "dropout"),
    ]
    return {name: getattr(config, name) for name in names}


def _keep_hidden_state(
    utterances: UtteranceBatch, single_turn: bool, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A hidden state as it is returned, (batch, [turns,] frames, hidden), and from it what the encoder goes on with."""
    if single_turn:
        return hidden, hidden
    returned = utterances.to_turns(hidden)
    return returned, utterances.to_utterances(returned)


class MambaEMAForRegression(MambaEMAPreTrainedModel):
    """Mamba-EMA with a head that predicts valence, arousal and whatever else `config.id2label` names.

    Example:

    ```python
    >>> from modeling_mamba_ema import MambaEMAConfig, MambaEMAForRegression
    >>> import torch
    >>> tiny = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    ...             conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    >>> model = MambaEMAForRegression(MambaEMAConfig(speech_encoder_config=tiny, hidden_size=32, head_dim=16)).eval()
    >>> model(torch.randn(2, 3, 16_000)).logits.shape   # 2 conversations of 3 turns of 1 s
    torch.Size([2, 3, 2])

    ```
    """

    _auto_class = "AutoModelForAudioClassification"

    def __init__(self, config: MambaEMAConfig):
        super().__init__(config)
        self.mamba_ema = MambaEMAModel(config)
        contexts = len(self.mamba_ema.contexts)
        self.head = RegressionHead(config, contexts, config.bounded_predictions)
        self.spread_head = RegressionHead(config, contexts, bounded=True) if config.predict_spread else None
        self._built_by = config.of_the_architecture()
        self.post_init()

    @property
    def speech_encoder(self) -> SpeechEncoder:
        return self.mamba_ema.speech_encoder

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        turn_mask: torch.Tensor | None = None,
        speaker_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        conversation_state: ConversationState | None = None,
        use_conversation_state: bool = False,
        frame_values: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> MambaEMARegressionOutput | tuple[Any, ...]:
        """
        Args:
            labels: (batch, num_labels) or (batch, turns, num_labels) on the unit scale, -100 where missing; a single
                label may go without the last dimension. The loss is `1 - mean CCC` over all turns of the global batch
                (see `ccc_loss`). With `config.predict_spread`, 2 num_labels: the raters' standard deviations on the
                unit scale follow the values, and their loss (see `spread_loss`) is added.
            input_values, attention_mask, turn_mask, speaker_ids, conversation_state, use_conversation_state,
            frame_values, frame_mask, output_hidden_states, output_attentions, return_dict: as in
                [`MambaEMAModel.forward`].

        Raises:
            ValueError: as [`MambaEMAModel.forward`]; labels of the wrong shape or scale, or NaN.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.mamba_ema(
            input_values=input_values,
            attention_mask=attention_mask,
            turn_mask=turn_mask,
            speaker_ids=speaker_ids,
            conversation_state=conversation_state,
            use_conversation_state=use_conversation_state,
            frame_values=frame_values,
            frame_mask=frame_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        predictions = [self.head(outputs.last_hidden_state)]  # (batch, [turns,] num_labels) each
        if self.spread_head is not None:
            predictions.append(self.spread_head(outputs.last_hidden_state))
        loss, present = None, outputs.turn_mask.bool()
        if labels is not None:
            side_by_side = torch.cat(predictions, dim=-1)
            loss = self.loss(side_by_side[present], self.checked_targets(labels, side_by_side)[present])
        logits, *spread = (part.masked_fill(~present.unsqueeze(-1), torch.nan) for part in predictions)
        output = MambaEMARegressionOutput(
            loss=loss,
            logits=logits,
            intervals=self.intervals(logits, *spread),
            spread=spread[0] if spread else None,
            pooled_output=outputs.pooled_output,
            pooling_attentions=outputs.pooling_attentions,
            turn_mask=outputs.turn_mask,
            conversation_state=outputs.conversation_state,
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict else output.to_tuple()

    def loss(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The configuration's loss, see `ccc_loss`.

        Args:
            predictions, labels: (turns, num_labels) on the unit scale, -100 where a label is missing; with
                `config.predict_spread` (turns, 2 num_labels), the spreads behind the values.
        """
        weights, num_labels = self.config.loss_label_weights, len(self.config.labels)
        loss = ccc_loss(
            predictions[:, :num_labels],
            labels[:, :num_labels],
            label_weights=None if weights is None else [weights.get(name, 1.0) for name in self.config.labels],
            mse_weight=self.config.loss_mse_weight,
        )
        if self.config.predict_spread:
            loss = loss + spread_loss(predictions[:, num_labels:], labels[:, num_labels:])
        return loss

    def checked_targets(self, labels: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
        """Labels as [`MambaEMAForRegression.forward`] takes them -> as `loss` does, in the shape of predictions;
        `ValueError` as of `check_labels`."""
        names = self.config.labels
        if len(names) == 1 and labels.dim() == predictions.dim() - 1:
            labels = labels.unsqueeze(-1)  # one label may be given without a dimension of its own
        if self.config.predict_spread and labels.shape[-1] == len(names):
            labels = torch.cat([labels, torch.full_like(labels, MISSING_LABEL)], dim=-1)
        check_labels(labels, tuple(predictions.shape), self.config.target_columns)
        return labels.to(predictions.dtype)

    def intervals(self, logits: torch.Tensor, spread: torch.Tensor | None = None) -> torch.Tensor | None:
        """Predictions (..., num_labels) on the unit scale, and the spread of a model with `config.scaled_intervals`, ->
        (..., num_labels, 2), see [`MambaEMARegressionOutput`]."""
        radii: list[Any] = [self.config.interval_radius(label) for label in self.config.labels]
        if None in radii:
            return None
        reach = torch.stack([logits.new_full((), radius) for radius in radii])  # (num_labels,), filled on the device
        if self.config.scaled_intervals:
            if spread is None:
                raise ValueError("the intervals of this model are multiples of its spread: give outputs.spread, too")
            reach = reach * spread.clamp_min(MIN_SPREAD)
        ends = torch.stack([logits - reach, logits + reach], dim=-1)
        return ends.clamp(0.0, 1.0) if self.config.bounded_predictions else ends

    def to_label_ranges(self, logits: torch.Tensor, differences: bool = False) -> torch.Tensor:
        """Predictions (..., num_labels) on the unit scale -> the labels' own scale (`config.label_ranges`). With
        `differences`, they are distances between values, such as `outputs.spread`."""
        ranges = [self.config.label_range(name) for name in self.config.labels]
        low, high = logits.new_tensor(ranges).unbind(dim=1)
        return logits * (high - low) if differences else low + logits * (high - low)

    def with_changes(self, **config_changes: Any) -> MambaEMAForRegression:
        """A new model with another configuration that starts from this model's weights.

        Every weight that fits is kept: those of the same name and shape, those of labels that both models have, and
        those that read what both models have. What reads a new context or a new statistic begins at zero, so that it
        changes no prediction before the first step. Other new weights begin as those of a new model. What is new and
        what was dropped is logged. What was frozen of the speech encoder stays so, unless `freeze_speech_encoder` is
        given.

        Args:
            config_changes: fields of [`MambaEMAConfig`], e.g. `context="mamba_ema"` for a model that was trained on
                single utterances, or `id2label` with another label; `speech_encoder_config` is a dict of single fields.

        Raises:
            ImportError: this package is not installed, as where the model was loaded by remote code.
            ValueError: a name that is no field, a value outside its range, or a model with adapters or in 8 bits.

        Example:

        ```python
        >>> from modeling_mamba_ema import MambaEMAConfig, MambaEMAForRegression
        >>> tiny = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...             conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
        >>> config = MambaEMAConfig(speech_encoder_config=tiny, hidden_size=32, head_dim=16, context="none")
        >>> MambaEMAForRegression(config).with_changes(context="mamba_ema").config.context
        'mamba_ema'

        ```
        """
        try:
            from modeling_mamba_ema.adoption.changes import keep_what_fits
        except ImportError as error:
            raise ImportError(
                "with_changes needs more than the files of a model: pip install modeling-mamba-ema"
            ) from error
        if has_adapters(self):
            raise ValueError("with_changes keeps weights by their names, which adapters change; merge them first")
        self.refuse_8_bits("change the model")
        model: Any = type(self)(self.config.with_changes(**config_changes))
        model.to(device=self.device, dtype=self.dtype)
        keep_what_fits(self, model)
        if "freeze_speech_encoder" not in config_changes:
            if not self.speech_encoder.is_trained():
                model.freeze_base_model()
            elif not any(p.requires_grad for p in self.speech_encoder.backbone.feature_extractor.parameters()):
                model.freeze_feature_encoder()
        return model.train(self.training)

    def freeze_feature_encoder(self) -> None:
        """Keep the convolutions of the speech encoder as they are: no gradient is computed for them."""
        self.speech_encoder.backbone.feature_extractor._freeze_parameters()

    def freeze_base_model(self) -> None:
        """Keep the whole speech encoder as it is; pooling and everything after it is trained."""
        self.speech_encoder.backbone.requires_grad_(False)
        self.speech_encoder.train(self.training)

    def quantize_speech_encoder(self) -> MambaEMAForRegression:
        """Keep the speech encoder's linear layers in 8 bits, a quarter of their memory, for inference on a CPU; returns
        the model itself.

        Everything else (convolutions, norms, pooling, updater, head) stays as it is. The result cannot be saved or
        trained further; the saved model is quantised after loading.

        Raises:
            ValueError: a linear layer of the speech encoder has an adapter, is quantised already, or is not on a CPU.
        """
        quantize_linear_layers(self.speech_encoder.backbone)
        self.freeze_base_model()
        return self.eval()

    def train(self, mode: bool = True) -> MambaEMAForRegression:
        """As in torch.

        Raises:
            ValueError: the speech encoder is in 8 bits; what was trained could not be saved.
        """
        if mode:
            self.refuse_8_bits("train the model")
        return super().train(mode)

    def refuse_8_bits(self, action: str) -> None:
        """Raise `ValueError` where the speech encoder is in 8 bits, before which `action` must come."""
        if any(isinstance(module, Int8Linear) for module in self.modules()):
            raise ValueError(f"the speech encoder is in 8 bits; {action} before quantize_speech_encoder()")

    @classmethod
    def from_pretrained_speech_encoder(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str = "main",
        **config_kwargs: Any,
    ) -> MambaEMAForRegression:
        """Start from a pretrained speech encoder; pooling, updater and head are new.

        Args:
            pretrained_model_name_or_path: a folder or Hub name of a WavLM, wav2vec 2.0 or HuBERT, e.g.
                `"microsoft/wavlm-large"`, or of a Mamba-EMA, whose encoder is taken.
            revision: commit, tag or branch on the Hub.
            config_kwargs: fields of [`MambaEMAConfig`]; `speech_encoder_config`, a dict, overrides single fields of
                the pretrained encoder's configuration, such as its dropout.

        Raises:
            ValueError: the checkpoint is none of these, lacks weights, or does not fit `speech_encoder_config`.
        """
        fields = config_kwargs.pop("speech_encoder_config", None) or {}
        backbone = pretrained_backbone(pretrained_model_name_or_path, revision)
        check_speech_encoder_fields(fields, type(backbone.config))
        encoder_config = {**backbone.config.to_dict(), **SPEECH_ENCODER_DEFAULTS, **fields}
        extractor = MambaEMAFeatureExtractor.from_speech_encoder(pretrained_model_name_or_path, revision=revision)
        if not config_kwargs.keys() & set(NORMALIZATION):
            config_kwargs.update({name: getattr(extractor, name) for name in NORMALIZATION})
        model = cls(MambaEMAConfig(speech_encoder_config=encoder_config, **config_kwargs))
        try:
            model.speech_encoder.backbone.load_state_dict(backbone.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"speech_encoder_config has {', '.join(fields)}, with which the pretrained weights do not fit: {error}"
            ) from error
        return model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write a folder that works by itself: weights, configuration, feature extractor, code.

        `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads it where only torch and transformers are
        installed. A `preprocessor_config.json` that is there already is kept.

        Raises:
            ValueError: the speech encoder is in 8 bits, a value of the configuration is outside its range or no longer
                that of the weights, the feature extractor in the folder normalises otherwise, or `push_to_hub=True`,
                which would upload before all files are there; `model.push_to_hub(name)` uploads the whole folder.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained(push_to_hub=True) would leave files out; call model.push_to_hub(name)")
        # Not needed to run the model, so not imported with it; but transformers copies what is named here.
        from .pipeline_mamba_ema import CUSTOM_PIPELINES, MambaEMAPipeline

        self.refuse_8_bits("save the model")
        self.config.validate()
        for name, value in self.config.of_the_architecture().items():
            if value != self._built_by[name]:
                raise ValueError(
                    f"{name} of the configuration was {self._built_by[name]!r} when the model was built, is {value!r} "
                    f"now, which changes no weight; model.with_changes(...) gives a model with another {name}"
                )
        extractor = MambaEMAFeatureExtractor.in_folder(Path(save_directory), self.config)
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = {task: dict(info) for task, info in CUSTOM_PIPELINES.items()}
        # FSDP 2 gives a model a class of torch's, whose code would be saved in the place of this one's.
        sharded = type(self)
        self.__class__ = next(kind for kind in sharded.__mro__ if not kind.__module__.startswith("torch."))
        try:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.__class__ = sharded
        if is_main_process:
            extractor.save_pretrained(save_directory)
            custom_object_save(MambaEMAPipeline, save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Upload the model as a release: with model card, samples for the widget, endpoint handler and checksums.

        A card that the repository already has is kept. Where the package is not installed, as with a model loaded by
        remote code, only what `save_pretrained` writes is uploaded, with transformers' own card. Arguments are those of
        transformers: commit_message, commit_description, private, token, revision, create_pr, max_shard_size. Returns
        the address of the commit.
        """
        try:
            from modeling_mamba_ema.publishing import push_model
        except ImportError:
            logger.warning("without the package modeling-mamba-ema the model is uploaded without its own model card")
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        return push_model(self, repo_id, **kwargs)


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put modules into a model, by whatever function, that are not merged yet."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def pretrained_backbone(name: str | os.PathLike[str], revision: str) -> Any:
    """A speech encoder with all of its weights, its own or that of a Mamba-EMA; `ValueError` where the checkpoint is
    neither, or lacks weights."""
    config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    kinds: dict[Any, Any] = {**BACKBONES, MambaEMAConfig.model_type: MambaEMAForRegression}
    if config.get("model_type") not in kinds:
        raise ValueError(f"{name} is of type {config.get('model_type')!r}; allowed are {', '.join(map(repr, kinds))}")
    model, loading = kinds[config["model_type"]].from_pretrained(
        name, revision=revision, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(key for key in loading["missing_keys"] if not key.endswith("masked_spec_embed"))
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights of its speech encoder, first {missing[0]}")
    return model.speech_encoder.backbone if isinstance(model, MambaEMAForRegression) else model


__all__ = ["MambaEMAForRegression", "MambaEMAModel", "MambaEMAPreTrainedModel"]
