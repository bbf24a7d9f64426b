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
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput, logging

from .ccc_loss import ccc_loss, check_labels
from .configuration_mamba_ema import SPEECH_ENCODER_DEFAULTS, MambaEMAConfig
from .conversation_encoder import ConversationEncoder, ConversationState
from .feature_extraction_mamba_ema import MambaEMAFeatureExtractor
from .mamba2 import GatedRMSNorm
from .pooling import values_are_known
from .speech_encoder import (
    BACKBONES,
    SpeechEncoder,
    UtteranceBatch,
    check_frames,
    collect_utterances,
    receptive_field,
)

if TYPE_CHECKING:
    # For a model in a local folder, transformers before 5.9 copies only the files that an entry file itself names.
    from .audio_files import AudioFileError  # noqa: F401
    from .fast_speech_encoder import fast_hidden_states  # noqa: F401

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
        logits: (batch, turns, num_labels) in the order of `config.id2label`, on the unit scale [0, 1], float32; NaN at
            turns that are not there. [`MambaEMAForRegression.to_label_ranges`] gives the labels' own scale.
        pooled_output, pooling_attentions, turn_mask, conversation_state, hidden_states: as in [`MambaEMAModelOutput`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pooled_output: torch.Tensor | None = None
    pooling_attentions: torch.Tensor | None = None
    turn_mask: torch.Tensor | None = None
    conversation_state: ConversationState | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class RegressionHead(nn.Module):
    """Two linear layers and a sigmoid: predictions stay on the unit scale."""

    def __init__(self, input_size: int, hidden_size: int, num_labels: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(input_size, hidden_size)
        self.activation = nn.GELU()
        self.out_proj = nn.Linear(hidden_size, num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., input_size) -> (..., num_labels) in float32: bf16 predictions alone cost a CCC loss 1e-2."""
        hidden = self.dropout(self.activation(self.dense(self.dropout(features))))
        scores = self.out_proj(hidden)
        return torch.sigmoid(scores.to(torch.promote_types(scores.dtype, torch.float32)))


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
        _align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple with output_loading_info=True
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
        if _is_of_this_package(module) and hasattr(module, "reset_parameters"):
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
        projection: pooled vector -> observation z_t.
        conversation_encoder: z_1..z_t -> c_t; None for `context="none"`.
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
        self.projection = nn.Linear(self.speech_encoder.pooled_size, config.hidden_size)
        self.conversation_encoder = None
        if config.context != "none":
            self.conversation_encoder = ConversationEncoder(
                hidden_size=config.hidden_size,
                context=config.context,
                num_hidden_layers=config.num_hidden_layers,
                state_size=config.state_size,
                conv_kernel=config.conv_kernel,
                expand=config.expand,
                head_dim=config.head_dim,
                ema_decay=config.ema_decay,
                ema_decay_learnable=config.ema_decay_learnable,
                dropout=config.dropout,
            )
        self.min_samples = receptive_field(config.speech_encoder_config)
        # Sharding and device maps take these as units; which class an encoder's layers have depends on its norm.
        layers = self.speech_encoder.backbone.encoder.layers
        self._no_split_modules = sorted({type(layer).__name__ for layer in layers} | {"Mamba2Block"})
        self.post_init()

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        turn_mask: torch.Tensor | None = None,
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
            conversation_state: the state an earlier call returned; the turns given now continue its conversations.
                (batch, samples) inputs are then the next turn of each conversation.
            use_conversation_state: return the state after the last turn.
            frame_values: (batch, turns, layers, frames, hidden), frames computed before, instead of `input_values`.
            frame_mask: (batch, turns, frames), 1 at frames that are there; needed with `frame_values`.
            output_hidden_states: return the speech encoder's hidden states; gradients reach them.
            output_attentions: the speech encoder's self-attention is not returned; asking for it logs a hint.
            return_dict: `False` for a plain tuple.

        Raises:
            ValueError: inputs that are no complete utterances (see `collect_utterances`, `check_frames`), or a state
                of another batch or model.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if output_attentions:
            logger.warning_once("self-attention is not returned; pooling_attentions show what the model weighs")
        if (input_values is None) == (frame_values is None):
            raise ValueError("give either input_values or frame_values")
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace would keep the length of its example; use torch.export or torch.compile"
            )
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

        # 3. observations and conversation context: z_t, c_t
        observations = self.projection(pooled)  # (batch, turns, hidden_size)
        features, state = observations, None
        if self.conversation_encoder is not None:
            context, state = self.conversation_encoder(observations, present, conversation_state)
            features = torch.cat([observations, context.to(observations.dtype)], dim=-1)

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
        features = config.hidden_size if config.context == "none" else 2 * config.hidden_size
        self.head = RegressionHead(features, config.hidden_size, len(config.labels), config.dropout)
        self.post_init()

    @property
    def speech_encoder(self) -> SpeechEncoder:
        return self.mamba_ema.speech_encoder

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        turn_mask: torch.Tensor | None = None,
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
                (see `ccc_loss`).
            input_values, attention_mask, turn_mask, conversation_state, use_conversation_state, frame_values,
            frame_mask, output_hidden_states, output_attentions, return_dict: as in [`MambaEMAModel.forward`].

        Raises:
            ValueError: as [`MambaEMAModel.forward`]; labels of the wrong shape or scale, or NaN.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.mamba_ema(
            input_values=input_values,
            attention_mask=attention_mask,
            turn_mask=turn_mask,
            conversation_state=conversation_state,
            use_conversation_state=use_conversation_state,
            frame_values=frame_values,
            frame_mask=frame_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.head(outputs.last_hidden_state)  # (batch, [turns,] num_labels)
        loss = None
        present = outputs.turn_mask.bool()
        if labels is not None:
            if len(self.config.labels) == 1 and labels.dim() == logits.dim() - 1:
                labels = labels.unsqueeze(-1)  # one label may be given without a dimension of its own
            check_labels(labels, tuple(logits.shape), self.config.labels)
            loss = self.loss(logits[present], labels[present].to(logits.dtype))
        output = MambaEMARegressionOutput(
            loss=loss,
            logits=logits.masked_fill(~present.unsqueeze(-1), torch.nan),
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
            predictions, labels: (turns, num_labels) on the unit scale, -100 where a label is missing.
        """
        weights = self.config.loss_label_weights
        return ccc_loss(
            predictions,
            labels,
            label_weights=None if weights is None else [weights.get(name, 1.0) for name in self.config.labels],
            mse_weight=self.config.loss_mse_weight,
        )

    def to_label_ranges(self, logits: torch.Tensor) -> torch.Tensor:
        """Predictions on the unit scale -> the labels' own scale (`config.label_ranges`).

        Args:
            logits: (..., num_labels).
        """
        ranges = [self.config.label_range(name) for name in self.config.labels]
        low, high = logits.new_tensor(ranges).unbind(dim=1)
        return low + logits * (high - low)

    def freeze_feature_encoder(self) -> None:
        """Keep the convolutions of the speech encoder as they are: no gradient is computed for them."""
        self.speech_encoder.backbone.feature_extractor._freeze_parameters()

    def freeze_base_model(self) -> None:
        """Keep the whole speech encoder as it is; pooling and everything after it is trained."""
        self.speech_encoder.backbone.requires_grad_(False)
        self.speech_encoder.train(self.training)

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
            ValueError: the checkpoint is none of these, or lacks weights.
        """
        overrides = {**SPEECH_ENCODER_DEFAULTS, **(config_kwargs.pop("speech_encoder_config", None) or {})}
        backbone = pretrained_backbone(pretrained_model_name_or_path, revision)
        encoder_config = type(backbone.config).from_dict({**backbone.config.to_dict(), **overrides})
        extractor = MambaEMAFeatureExtractor.from_speech_encoder(pretrained_model_name_or_path, revision=revision)
        config_kwargs.setdefault("do_normalize", extractor.do_normalize)
        model = cls(MambaEMAConfig(speech_encoder_config=encoder_config, **config_kwargs))
        model.speech_encoder.backbone.load_state_dict(backbone.state_dict())
        return model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write a folder that works by itself: weights, configuration, feature extractor, code.

        `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads it where only torch and transformers are
        installed. A `preprocessor_config.json` that is there already is kept.

        Raises:
            ValueError: a value of the configuration is outside its range, the feature extractor in the folder
                normalises otherwise than the configuration says, or `push_to_hub=True`, which would upload before all
                files are there; `model.push_to_hub(name)` uploads the whole folder.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained(push_to_hub=True) would leave files out; call model.push_to_hub(name)")
        # Not needed to run the model, so not imported with it; but transformers copies what is named here.
        from .pipeline_mamba_ema import CUSTOM_PIPELINES, MambaEMAPipeline

        self.config.validate()
        extractor = _feature_extractor_for(self.config, Path(save_directory))
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = {task: dict(info) for task, info in CUSTOM_PIPELINES.items()}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            extractor.save_pretrained(save_directory)
            custom_object_save(MambaEMAPipeline, save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Upload the model as a release: with model card, samples for the widget, endpoint handler and checksums.

        A card that the repository already has is kept. Where the package is not installed, as with a model loaded by
        remote code, only what `save_pretrained` writes is uploaded, with transformers' own card.

        Args:
            repo_id: `owner/name` on the Hub; made if it is not there.
            kwargs: as in transformers: commit_message, commit_description, private, token, revision, create_pr,
                max_shard_size.

        Returns:
            The address of the commit.
        """
        try:
            from modeling_mamba_ema.publishing import push_model
        except ImportError:
            logger.warning("without the package modeling-mamba-ema the model is uploaded without its own model card")
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        return push_model(self, repo_id, **kwargs)


def _feature_extractor_for(config: MambaEMAConfig, folder: Path) -> MambaEMAFeatureExtractor:
    """The feature extractor in a folder, or a new one where there is none.

    Raises:
        ValueError: it normalises otherwise than the configuration says.
    """
    if not (folder / "preprocessor_config.json").is_file():
        return MambaEMAFeatureExtractor(do_normalize=config.do_normalize)
    extractor = MambaEMAFeatureExtractor.from_pretrained(folder)
    check_normalization(config, extractor)
    return extractor


def check_normalization(config: MambaEMAConfig, extractor: MambaEMAFeatureExtractor) -> None:
    """
    Raises:
        ValueError: model and feature extractor disagree on `do_normalize`: the numbers would be wrong without a sign.
    """
    if config.do_normalize != extractor.do_normalize:
        raise ValueError(
            f"do_normalize is {config.do_normalize} in config.json and {extractor.do_normalize} in "
            "preprocessor_config.json; both must say what the speech encoder was trained with"
        )


def pretrained_backbone(name: str | os.PathLike[str], revision: str) -> Any:
    """A speech encoder with all of its weights, its own or that of a Mamba-EMA.

    Raises:
        ValueError: the checkpoint is neither, or lacks weights.
    """
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
