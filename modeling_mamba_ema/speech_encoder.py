"""Speech encoder: waveforms of utterances -> frames -> chosen layers -> one pooled vector an utterance.

The frames come from transformers' `WavLMModel`, `Wav2Vec2Model` or `HubertModel`, each utterance getting those it would
get alone, in whatever batch it is. There are three ways to compute them, with the same numbers:

- [`fast_hidden_states`] in `fast_speech_encoder.py` runs by default: no padding, and no layer above the highest read.
- [`hidden_states_one_by_one`] is transformers' own forward for each utterance, the reference. It runs where something
  is attached to the encoder's modules, such as hooks or offloading, because every module is called in the usual way,
  once for each utterance, with a batch of one: a hook is called as often.
- [`padded_hidden_states`] has no loop over utterances. It runs where values cannot be looked at, as while torch
  compiles or exports, and where the weights are spread over processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import HubertModel, PreTrainedModel, Wav2Vec2Model, WavLMModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from .configuration_mamba_ema import MambaEMAConfig
from .fast_speech_encoder import SPEC_AUGMENT_MIN_FRAMES, fast_hidden_states, is_untouched
from .pooling import POOLINGS, length_mask, pooling_weights, values_are_known

BACKBONES: dict[str, type[PreTrainedModel]] = {"wavlm": WavLMModel, "wav2vec2": Wav2Vec2Model, "hubert": HubertModel}

# Normalised speech of 30 s has a peak of at most sqrt(480000) = 693; a waveform far beyond it overflows inside WavLM,
# whose answer then is that for silence.
MAX_VALUE = 1e4


def num_frames(num_samples: Any, config: Any) -> Any:
    """Frames made of `num_samples` samples (an int or an integer tensor); 0 or less where they are too few."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride):
        num_samples = (num_samples - kernel) // stride + 1
    return num_samples


def receptive_field(config: Any) -> int:
    """Samples that one frame needs: the shortest utterance that can be encoded (400 samples, 25 ms, for every published
    encoder)."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride)):
        samples = (samples - 1) * stride + kernel
    return samples


class SpeechEncoder(nn.Module):
    """WavLM, wav2vec 2.0 or HuBERT, the choice of its layers, and pooling.

    Attributes:
        wavlm, wav2vec2 or hubert: the transformers model, also as `backbone`.
        pooling: the pooling's name.
        pooled_size: width of the pooled vector.
        attention: the layer that scores frames, `nn.Linear(D, 1)` for `"attention"`, a `HiddenScorer` where it has a
            hidden layer; absent where nothing is learned.
        layer_weights: (layers,) logits of the softmax that sums the layers; absent where one layer is read.
    """

    def __init__(self, config: MambaEMAConfig):
        super().__init__()
        encoder_config = config.speech_encoder_config
        if encoder_config.model_type == "wavlm":
            encoder_config._attn_implementation = "eager"  # the one name that transformers' WavLM knows
        backbone = BACKBONES[encoder_config.model_type](encoder_config)
        self._backbone_name = backbone.base_model_prefix
        self.add_module(self._backbone_name, backbone)
        for module in backbone.modules():
            if type(module) is WavLMAttention:
                module.__class__ = _WavLMAttention
        self.layers = config.encoder_layer_indices
        self.pooling = config.speech_encoder_pooling
        pooling = POOLINGS[self.pooling]
        scorer = pooling.build_scorer(
            encoder_config.hidden_size,
            config.speech_encoder_pooling_heads,
            config.speech_encoder_pooling_hidden_size,
        )
        if scorer is not None:
            self.attention = scorer
            # read by `_init_weights`; of a scorer with a hidden layer the layer after it
            getattr(scorer, "score", scorer).begins_at_zero = config.speech_encoder_pooling_uniform_start
        self._pool_options: dict[str, float] = {}
        if pooling.deviation:
            self._pool_options["min_variance"] = config.speech_encoder_pooling_min_variance
        self.pooled_size = pooling.sizes * encoder_config.hidden_size
        if len(self.layers) > 1:
            self.layer_weights = nn.Parameter(torch.zeros(len(self.layers)))
        self._starts_frozen = config.freeze_speech_encoder
        self.freeze_as_configured()

    @property
    def backbone(self) -> Any:
        """The transformers model that makes the frames."""
        return getattr(self, self._backbone_name)

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of an utterance of `num_samples` samples (an int or an integer tensor)."""
        return num_frames(num_samples, self.backbone.config)

    def freeze_as_configured(self) -> None:
        """What is not trained: all of it with `freeze_speech_encoder`, and parameters that no output depends on, which
        optimizers and DDP would trip over. Loading replaces the parameters, so that it is done again after it."""
        if self._starts_frozen:
            self.backbone.requires_grad_(False)
        backbone, encoder, last = self.backbone, self.backbone.encoder, max(self.layers)
        unused: list[Any] = list(encoder.layers[last:])
        if backbone.config.do_stable_layer_norm and last < len(encoder.layers):
            unused.append(encoder.layer_norm)
        masks = backbone.config.apply_spec_augment and backbone.config.mask_time_prob > 0
        if not masks and hasattr(backbone, "masked_spec_embed"):
            unused.append(backbone.masked_spec_embed)
        for part in unused:
            part.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every layer that is read counts the same at first."""
        if len(self.layers) > 1:
            nn.init.zeros_(self.layer_weights)

    def train(self, mode: bool = True) -> SpeechEncoder:
        """As in torch, but an encoder none of whose weights is trained stays in evaluation mode."""
        super().train(mode)
        if mode and not self.is_trained():
            self.backbone.eval()
        return self

    def is_trained(self) -> bool:
        """Whether any weight of the backbone is."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def forward(
        self,
        waveforms: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        layer_frames: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        keep: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor] | None]:
        """Encode and pool a batch of utterances, or pool frames that were encoded before.

        Args:
            waveforms: (batch, samples), right-padded, 16 kHz.
            lengths: (batch,) valid samples of each row, at least [`receptive_field`]; None: all of them.
            layer_frames: (batch, layers, frames, hidden) instead of waveforms, with `frame_mask` (batch, frames) bool.
            keep: return all hidden states as well. Called with each, (batch, frames, hidden), it gives what is returned
                for it and what the next layer reads, so that gradients reach the returned ones.

        Returns:
            pooled (batch, pooled_size), attention (batch, heads, frames), and `num_hidden_layers + 1` hidden states or
            None.

        Raises:
            RuntimeError: while `torch.jit.trace` runs.
        """
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace would keep the length of its example; use torch.export or torch.compile"
            )
        if layer_frames is not None:
            assert frame_mask is not None
            return *self.pool(layer_frames, frame_mask), None
        assert waveforms is not None
        wanted = self.layers if keep is None else range(self.backbone.config.num_hidden_layers + 1)
        kept: list[torch.Tensor] = []

        def next_layer_reads(hidden: torch.Tensor) -> torch.Tensor:
            assert keep is not None
            returned, read = keep(hidden)
            kept.append(returned)
            return read

        states = self.hidden_states(waveforms, lengths, wanted, None if keep is None else next_layer_reads)
        chosen = states if keep is None else [states[layer] for layer in self.layers]
        if lengths is None:
            frame_mask = torch.ones(chosen[0].shape[:2], dtype=torch.bool, device=waveforms.device)
        else:
            frame_mask = length_mask(self.num_frames(lengths), chosen[0].shape[1])
        pooled, attention = self.pool(torch.stack(chosen, dim=1), frame_mask)
        return pooled, attention, None if keep is None else kept

    def pool(self, layer_frames: torch.Tensor, frame_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the layers and pool the frames, whether they were computed now or read from a cache."""
        if len(self.layers) > 1:
            weights = self.layer_weights.softmax(dim=0).view(-1, 1, 1)
            frames = (layer_frames * weights).sum(dim=1)  # (batch, frames, hidden)
        else:
            frames = layer_frames.squeeze(1)
        # Frames past an utterance's end may hold anything, NaN included; they must not reach scores or gradients.
        frames = frames.masked_fill(~frame_mask.unsqueeze(-1), 0.0)
        # Without attention all frames score the same, and softmax makes equal scores uniform weights.
        uniform = frames.new_zeros(*frames.shape[:2], 1)
        scores = self.attention(frames) if hasattr(self, "attention") else uniform
        weights = pooling_weights(scores, frame_mask)  # (batch, heads, frames)
        pooled = POOLINGS[self.pooling].pool(frames, weights, frame_mask, **self._pool_options)
        return pooled.to(frames.dtype), weights

    def hidden_states(
        self,
        waveforms: torch.Tensor,
        lengths: torch.Tensor | None,
        layers: Sequence[int],
        next_layer_reads: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """The hidden states named by `layers`, each (batch, frames, hidden); undefined past an utterance's end.

        0 is the input of the first layer, `num_hidden_layers` the backbone's `last_hidden_state`, which is after its
        final layer norm where it has one.

        Args:
            waveforms: (batch, samples), right-padded.
            lengths: (batch,) valid samples of each row; None: all of them.
            layers: hidden states to return.
            next_layer_reads: called with each state that is returned, if given; the next layer reads its result.
        """
        with self._gradients(waveforms):
            known = values_are_known(waveforms) and values_are_known(next(self.backbone.parameters()))
            if not known or _is_sharded(self.backbone):
                return padded_hidden_states(self.backbone, waveforms, lengths, layers, next_layer_reads)
            if lengths is None:
                lengths = torch.full((waveforms.shape[0],), waveforms.shape[1], device=waveforms.device)
            if is_untouched(self.backbone):
                return fast_hidden_states(self.backbone, waveforms, lengths, layers, next_layer_reads)
            states = hidden_states_one_by_one(self.backbone, waveforms, lengths, layers)
            return states if next_layer_reads is None else [next_layer_reads(state) for state in states]

    def _gradients(self, waveforms: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """No graph where no weight of the encoder is trained and nobody asks for the waveform's gradient."""
        if torch.is_grad_enabled() and not waveforms.requires_grad and not self.is_trained():
            return torch.no_grad()
        return contextlib.nullcontext()


class _WavLMAttention(WavLMAttention):
    """WavLM's attention through its linear layers.

    `WavLMAttention` hands their weights to torch, past whatever is attached to the layers: adapters, hooks, quantised
    or offloaded weights.
    """

    def torch_multi_head_self_attention(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        gated_position_bias: torch.Tensor,
        *_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, frames, hidden), (batch, frames) or None, (batch * heads, frames, frames) -> outputs and weights"""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, frames, size)
        scores = query @ key.transpose(-1, -2) * self.scaling
        scores = scores + gated_position_bias.view(scores.shape)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask.bool()[:, None, None], -torch.inf)
        weights = nn.functional.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2)), weights

    def compute_bias(self, query_length: int, key_length: int) -> torch.Tensor:
        """(heads, queries, keys), on the device of the computation: the embedding may be offloaded."""
        device = self.gru_rel_pos_const.device
        distances = torch.arange(key_length, device=device) - torch.arange(query_length, device=device)[:, None]
        return self.rel_attn_embed(self._relative_positions_bucket(distances)).permute(2, 0, 1)


def _is_sharded(backbone: nn.Module) -> bool:
    """Whether the weights are spread over processes, which then must all run the same modules equally often."""
    return any(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in backbone.parameters())


def hidden_states_one_by_one(
    backbone: Any, waveforms: torch.Tensor, lengths: torch.Tensor, layers: Sequence[int]
) -> list[torch.Tensor]:
    """Transformers' own forward for each utterance alone: the reference for the other two.

    Args:
        backbone: a `WavLMModel`, `Wav2Vec2Model` or `HubertModel`.
        waveforms: (batch, samples), right-padded.
        lengths: (batch,) valid samples of each row.
        layers: hidden states to return.

    Returns:
        One (batch, frames, hidden) tensor for each of `layers`, zero past an utterance's end.
    """
    rows: list[list[torch.Tensor]] = [[] for _ in layers]
    for waveform, length in zip(waveforms, lengths.tolist()):
        masked = None
        frames = num_frames(length, backbone.config)
        if backbone.training and backbone.config.apply_spec_augment and frames < SPEC_AUGMENT_MIN_FRAMES:
            masked = torch.zeros(1, frames, dtype=torch.bool, device=waveforms.device)
        outputs = backbone(waveform[None, :length], mask_time_indices=masked, output_hidden_states=True)
        # Of the stable layer norm's last state some versions of transformers return what is before the final norm.
        states = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
        for row, layer in zip(rows, layers):
            row.append(states[layer][0])
    return [nn.utils.rnn.pad_sequence(row, batch_first=True) for row in rows]


def padded_hidden_states(
    backbone: Any,
    waveforms: torch.Tensor,
    lengths: torch.Tensor | None,
    layers: Sequence[int],
    next_layer_reads: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The padded batch through the backbone's modules, so that every utterance gets the frames it would get alone.

    Base-sized encoders normalise the first convolution over the whole padded row, so that the amount of padding changes
    the answer of transformers' own forward; here only an utterance's own frames count.

    Args:
        backbone, waveforms, layers, next_layer_reads: as in [`SpeechEncoder.hidden_states`].
        lengths: (batch,) valid samples of each row; None: all of them.
    """
    config, encoder = backbone.config, backbone.encoder
    # 1. convolution front end: (batch, samples) -> (batch, channels, frames)
    features = waveforms.unsqueeze(1)
    for index, layer in enumerate(backbone.feature_extractor.conv_layers):
        if index == 0 and lengths is not None and config.feat_extract_norm == "group":
            valid = (lengths - config.conv_kernel[0]) // config.conv_stride[0] + 1
            features = layer.activation(_group_norm_over_valid(layer.conv(features), layer.layer_norm, valid))
        else:
            features = layer(features)
    hidden = _first(backbone.feature_projection(features.transpose(1, 2)))  # (batch, frames, hidden)
    # 2. masks: None where nothing is padded
    frame_mask = None
    if lengths is not None:
        frame_lengths = num_frames(lengths, config)
        frame_mask = length_mask(frame_lengths, hidden.shape[1])
    if backbone.training and config.apply_spec_augment:
        hidden = backbone._mask_hidden_states(hidden.clone(), attention_mask=frame_mask)
    if frame_mask is not None:
        hidden = hidden.masked_fill(~frame_mask.unsqueeze(-1), 0.0)
    # 3. positions, then the transformer layers up to the highest that is read
    hidden = hidden + encoder.pos_conv_embed(hidden)
    if not config.do_stable_layer_norm:
        hidden = encoder.layer_norm(hidden)
    hidden = encoder.dropout(hidden)
    read = next_layer_reads or (lambda state: state)
    hidden = read(hidden) if 0 in layers else hidden
    states = {0: hidden}
    run = _WavLMLayers(frame_mask) if config.model_type == "wavlm" else _PlainLayers(frame_mask, hidden)
    for index, layer in enumerate(encoder.layers[: max(layers)], start=1):
        dropped = backbone.training and index > 1 and config.layerdrop > 0 and torch.rand([]) < config.layerdrop
        if not dropped:
            hidden = run(layer, hidden)
        if index == config.num_hidden_layers and config.do_stable_layer_norm:
            hidden = encoder.layer_norm(hidden)
        if index in layers:
            hidden = states[index] = read(hidden)
    return [states[layer] for layer in layers]


class _WavLMLayers:
    """Runs WavLM's layers, which take a mask of frames and hand on the first layer's position bias."""

    def __init__(self, frame_mask: torch.Tensor | None):
        self.frame_mask = frame_mask
        self.position_bias: Any = None

    def __call__(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        hidden, self.position_bias, *_ = layer(hidden, attention_mask=self.frame_mask, position_bias=self.position_bias)
        return hidden


class _PlainLayers:
    """Runs the layers of wav2vec 2.0 and HuBERT, which take a mask to add to the scores."""

    def __init__(self, frame_mask: torch.Tensor | None, hidden: torch.Tensor):
        self.mask = None
        if frame_mask is not None:
            absent = ~frame_mask[:, None, None].expand(-1, 1, frame_mask.shape[1], -1)
            self.mask = torch.zeros_like(absent, dtype=hidden.dtype).masked_fill(absent, torch.finfo(hidden.dtype).min)

    def __call__(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        return _first(layer(hidden, attention_mask=self.mask))


def _first(outputs: Any) -> torch.Tensor:
    """Of what some modules return alone, others in a tuple."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _group_norm_over_valid(features: torch.Tensor, norm: nn.GroupNorm, lengths: torch.Tensor) -> torch.Tensor:
    """A group norm of one channel a group, with moments over each row's valid frames only.

    Args:
        features: (batch, channels, frames).
        lengths: (batch,) valid frames.
    """
    dtype = features.dtype
    features = features.to(torch.promote_types(dtype, torch.float32))
    valid = length_mask(lengths, features.shape[-1]).unsqueeze(1)  # (batch, 1, frames)
    count = lengths.view(-1, 1, 1)
    mean = features.masked_fill(~valid, 0.0).sum(dim=-1, keepdim=True) / count
    centred = (features - mean).masked_fill(~valid, 0.0)
    variance = centred.square().sum(dim=-1, keepdim=True) / count
    normed = centred * torch.rsqrt(variance + norm.eps)
    return (normed * norm.weight.unsqueeze(-1) + norm.bias.unsqueeze(-1)).to(dtype)


# Checks and unpadding of the encoder's input. An encoder counts an empty or too short row of a batch as a full one and
# answers with plausible numbers, so nothing that is not a complete utterance may reach it.


@dataclass
class UtteranceBatch:
    """The utterances of a batch of conversations.

    Attributes:
        waveforms: (utterances, samples) right-padded, row-major over (conversation, turn).
        lengths: (utterances,) valid samples; None: all of them.
        turn_mask: (batch, turns) bool, True where a turn is present.
        every_turn: whether there is an utterance for every turn, absent ones included, whose answer means nothing.
    """

    waveforms: torch.Tensor
    lengths: torch.Tensor | None
    turn_mask: torch.Tensor
    every_turn: bool

    def to_turns(self, values: torch.Tensor) -> torch.Tensor:
        """(utterances, ...) -> (batch, turns, ...), zeros at turns that are not there"""
        if self.every_turn:
            return values.unflatten(0, self.turn_mask.shape)
        scattered = values.new_zeros(*self.turn_mask.shape, *values.shape[1:])
        scattered[self.turn_mask] = values
        return scattered

    def to_utterances(self, values: torch.Tensor) -> torch.Tensor:
        """(batch, turns, ...) -> (utterances, ...)"""
        return values.flatten(0, 1) if self.every_turn else values[self.turn_mask]


def collect_utterances(
    input_values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    turn_mask: torch.Tensor | None,
    min_samples: int,
) -> UtteranceBatch:
    """Check a padded batch and take the utterances out of it.

    Where values cannot be looked at (see [`values_are_known`]), only shapes are checked.

    Args:
        input_values: (batch, samples), each row an utterance, or (batch, turns, samples), each row a conversation.
        attention_mask: same shape, 1 at samples that are there, right-padded; None: all are there.
        turn_mask: (batch, turns), 1 at turns that are there; None: the turns with any valid sample.
        min_samples: shortest utterance the encoder can take.

    Raises:
        ValueError: an input of the wrong shape, a mask that is not 0/1 and right-padded, an utterance that is too
            short or not finite, or a conversation without turns; the message names the row and turn.
    """
    if not torch.is_floating_point(input_values):
        raise ValueError(
            f"input_values are {input_values.dtype}, but must be floating point; "
            "MambaEMAFeatureExtractor converts integers"
        )
    if input_values.dim() not in (2, 3) or 0 in input_values.shape:
        raise ValueError(
            f"input_values have shape {tuple(input_values.shape)}, but must be (batch, samples) or "
            "(batch, turns, samples), not empty"
        )
    known = values_are_known(input_values)
    _check_mask("attention_mask", attention_mask, input_values.shape, "one value for each sample", known)
    if input_values.dim() == 2:
        input_values = input_values.unsqueeze(1)  # (batch, 1, samples): conversations of one turn
        attention_mask = None if attention_mask is None else attention_mask.unsqueeze(1)
    batch, turns, samples = input_values.shape
    _check_mask("turn_mask", turn_mask, (batch, turns), "one value for each turn", known)

    lengths = None  # (batch, turns)
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
        if known and bool((attention_mask[..., 1:] > attention_mask[..., :-1]).any()):
            raise ValueError("attention_mask has a gap or is left-padded; Mamba-EMA allows padding on the right only")
        lengths = attention_mask.sum(dim=-1)
    present = turn_mask.bool() if turn_mask is not None else None if lengths is None else lengths > 0
    if present is None:
        present = torch.ones(batch, turns, dtype=torch.bool, device=input_values.device)
    if not known:
        return _every_turn(input_values, lengths, present, min_samples)
    if lengths is None:
        lengths = torch.full((batch, turns), samples, device=input_values.device)
    return _turns_that_are_there(input_values, lengths, present, min_samples)


def _every_turn(
    input_values: torch.Tensor, lengths: torch.Tensor | None, present: torch.Tensor, min_samples: int
) -> UtteranceBatch:
    waveforms = input_values.flatten(0, 1)  # (batch * turns, samples)
    if lengths is not None:
        # A turn that is not there is encoded as the shortest utterance, so that it holds numbers.
        lengths = lengths.flatten().clamp_min(min_samples)
        waveforms = waveforms.masked_fill(~length_mask(lengths, waveforms.shape[1]), 0.0)
    return UtteranceBatch(waveforms, lengths, present, every_turn=True)


def _turns_that_are_there(
    input_values: torch.Tensor, lengths: torch.Tensor, present: torch.Tensor, min_samples: int
) -> UtteranceBatch:
    _require_turns(present)
    too_short = present & (lengths < min_samples)
    if bool(too_short.any()):
        row, turn = too_short.nonzero()[0].tolist()
        raise ValueError(
            f"turn {turn} of row {row} has {int(lengths[row, turn])} valid samples; at least {min_samples} are needed"
        )
    lengths = lengths[present]  # (utterances,)
    waveforms = input_values[present][:, : int(lengths.max())]  # (utterances, samples)
    # Padding may hold anything, NaN included.
    waveforms = waveforms.masked_fill(~length_mask(lengths, waveforms.shape[1]), 0.0)
    bad = ~(waveforms.abs().amax(dim=1) <= MAX_VALUE)  # true for NaN too
    if bool(bad.any()):
        row, turn = present.nonzero()[int(bad.nonzero()[0])].tolist()
        raise ValueError(
            f"turn {turn} of row {row} of input_values is NaN, infinite or beyond {MAX_VALUE:g}; "
            "MambaEMAFeatureExtractor gives values that can be used, and says what is wrong with others"
        )
    return UtteranceBatch(waveforms, lengths, present, every_turn=bool(present.all()))


def check_frames(
    frame_values: torch.Tensor,
    frame_mask: torch.Tensor | None,
    turn_mask: torch.Tensor | None,
    num_layers: int,
    hidden_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check frames that were computed before.

    Args:
        frame_values: (batch, turns, layers, frames, hidden).
        frame_mask: (batch, turns, frames), 1 at frames that are there.
        turn_mask: (batch, turns), 1 at turns that are there; None: the turns with any frame.
        num_layers, hidden_size: what the model reads.

    Returns:
        frame_mask (batch, turns, frames) and turn_mask (batch, turns), both bool.

    Raises:
        ValueError: no mask, a wrong shape, a turn without frames, or a conversation without turns.
    """
    if frame_mask is None:
        raise ValueError("frame_values need frame_mask, (batch, turns, frames)")
    shape = tuple(frame_values.shape)
    if len(shape) != 5 or 0 in shape or (shape[2], shape[4]) != (num_layers, hidden_size):
        raise ValueError(
            f"frame_values have shape {shape}, but must be (batch, turns, {num_layers}, frames, {hidden_size}): the "
            "layers that this model reads"
        )
    batch, turns, _, frames, _ = shape
    known = values_are_known(frame_values)
    _check_mask("frame_mask", frame_mask, (batch, turns, frames), "one value for each frame", known)
    _check_mask("turn_mask", turn_mask, (batch, turns), "one value for each turn", known)
    frame_mask = frame_mask.bool()
    has_frames = frame_mask.any(dim=-1)
    present = has_frames if turn_mask is None else turn_mask.bool()
    if known and bool((present & ~has_frames).any()):
        row, turn = (present & ~has_frames).nonzero()[0].tolist()
        raise ValueError(f"turn {turn} of row {row} has no frame in frame_mask; take it out of turn_mask too")
    if known:
        _require_turns(present)
    return frame_mask, present


def _require_turns(present: torch.Tensor) -> None:
    empty = ~present.any(dim=1)
    if bool(empty.any()):
        raise ValueError(f"row {int(empty.nonzero()[0])} of the batch has no valid turn; leave it out")


def _check_mask(name: str, mask: torch.Tensor | None, shape: tuple[int, ...], meaning: str, values: bool) -> None:
    if mask is None:
        return
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, but must be {tuple(shape)}: {meaning}")
    if values and mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{name} must hold 0 and 1 only")
