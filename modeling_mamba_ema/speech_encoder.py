"""Speech encoder: waveforms of utterances -> WavLM frames -> chosen layers -> one pooled vector an utterance.

WavLM is transformers' `WavLMModel`; its sub-modules are run step by step for two reasons. WavLM-base normalises the
first convolution over the whole padded row, so that the amount of padding changes the answer; here only an utterance's
own frames count. And layers above the highest one that is read are not computed. `wavlm_hidden_states` below is the
plain form; `fast_speech_encoder.py` computes the same without padding and is what runs by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import WavLMConfig, WavLMModel

from .configuration_mamba_ema import MambaEMAConfig
from .fast_speech_encoder import SPEC_AUGMENT_MIN_FRAMES, fast_hidden_states, is_supported
from .pooling import POOLINGS, length_mask, pooling_weights

# Normalised speech of 30 s has a peak of at most sqrt(480000) = 693; a waveform far beyond it overflows inside WavLM,
# whose answer then is that for silence.
MAX_VALUE = 1e4


def num_frames(num_samples: Any, config: WavLMConfig) -> Any:
    """Frames WavLM makes of `num_samples` samples (an int or an integer tensor); 0 or less where it is too short."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride):
        num_samples = (num_samples - kernel) // stride + 1
    return num_samples


def receptive_field(config: WavLMConfig) -> int:
    """Samples that one frame needs: the shortest utterance WavLM can encode (400 samples, 25 ms, for every WavLM)."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride)):
        samples = (samples - 1) * stride + kernel
    return samples


class SpeechEncoder(nn.Module):
    """WavLM, the choice of its layers, and pooling.

    Attributes:
        wavlm: transformers' `WavLMModel`.
        pooling: the pooling's name.
        pooled_size: width of the pooled vector.
        attention: the layer that scores frames, `nn.Linear(D, 1)` for `"attention"`; absent where nothing is learned.
        layer_weights: (layers,) logits of the softmax that sums the layers; absent where one layer is read.
    """

    def __init__(self, config: MambaEMAConfig):
        super().__init__()
        encoder_config = config.speech_encoder_config
        self.wavlm = WavLMModel(encoder_config)
        self.layers = config.encoder_layer_indices
        self.frozen = config.freeze_speech_encoder
        self.pooling = config.speech_encoder_pooling
        pooling = POOLINGS[self.pooling]
        if pooling.build_scorer is not None:
            self.attention = pooling.build_scorer(encoder_config.hidden_size, config.speech_encoder_pooling_heads)
        self.pooled_size = pooling.sizes * encoder_config.hidden_size
        if len(self.layers) > 1:
            self.layer_weights = nn.Parameter(torch.zeros(len(self.layers)))
        self._freeze_unused_parameters()

    @property
    def backbone(self) -> WavLMModel:
        """The transformers model that makes frames."""
        return self.wavlm

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of an utterance of `num_samples` samples (an int or an integer tensor)."""
        return num_frames(num_samples, self.backbone.config)

    def _freeze_unused_parameters(self) -> None:
        """Parameters that no output depends on are no parameters to train: optimizers and DDP would trip over them."""
        encoder, last = self.wavlm.encoder, max(self.layers)
        unused: list[Any] = list(encoder.layers[last:])
        if self.wavlm.config.do_stable_layer_norm and last < len(encoder.layers):
            unused.append(encoder.layer_norm)
        if self.frozen:
            unused = [self.wavlm]
        for module in unused:
            module.requires_grad_(False)
        if not self.wavlm.config.apply_spec_augment and hasattr(self.wavlm, "masked_spec_embed"):
            self.wavlm.masked_spec_embed.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every layer that is read counts the same at first."""
        if len(self.layers) > 1:
            nn.init.zeros_(self.layer_weights)

    def train(self, mode: bool = True) -> SpeechEncoder:
        super().train(mode)
        if self.frozen:
            self.wavlm.eval()
        return self

    def forward(
        self,
        waveforms: torch.Tensor,
        lengths: torch.Tensor,
        output_hidden_states: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor] | None]:
        """Encode and pool a batch of utterances.

        Args:
            waveforms: (batch, samples), right-padded, 16 kHz.
            lengths: (batch,) valid samples of each row, at least [`receptive_field`].
            output_hidden_states: return all hidden states of WavLM as well.

        Returns:
            pooled (batch, pooled_size), attention (batch, heads, frames), and `num_hidden_layers + 1` hidden states,
            each (batch, frames, hidden), or None.
        """
        wanted = range(self.wavlm.config.num_hidden_layers + 1) if output_hidden_states else self.layers
        hidden_states = self.hidden_states(waveforms, lengths, wanted)  # one (batch, frames, hidden) a wanted layer
        chosen = [hidden_states[layer] for layer in self.layers] if output_hidden_states else hidden_states
        frame_mask = length_mask(num_frames(lengths, self.wavlm.config), chosen[0].shape[1])
        pooled, attention = self.pool(torch.stack(chosen, dim=1), frame_mask)
        return pooled, attention, hidden_states if output_hidden_states else None

    def pool(self, layer_frames: torch.Tensor, frame_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the layers and pool the frames, whether they were computed now or read from a cache.

        Args:
            layer_frames: (batch, layers, frames, hidden).
            frame_mask: (batch, frames) bool.

        Returns:
            pooled (batch, pooled_size) and attention (batch, heads, frames).
        """
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
        pooled = POOLINGS[self.pooling].pool(frames, weights, frame_mask)
        return pooled.to(frames.dtype), weights

    def hidden_states(
        self, waveforms: torch.Tensor, lengths: torch.Tensor, layers: Sequence[int]
    ) -> list[torch.Tensor]:
        """The hidden states of WavLM named by `layers`, each (batch, frames, hidden).

        [`fast_hidden_states`] where it can, else the plain [`wavlm_hidden_states`]; their numbers are the same.
        """
        encode = fast_hidden_states if is_supported(self.wavlm) else wavlm_hidden_states
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return encode(self.wavlm, waveforms, lengths, layers)


def wavlm_hidden_states(
    wavlm: WavLMModel, waveforms: torch.Tensor, lengths: torch.Tensor, layers: Sequence[int]
) -> list[torch.Tensor]:
    """Run a `WavLMModel` so that every utterance gets the frames it would get alone.

    Args:
        wavlm: the model; its weights, dropout, layer drop and SpecAugment settings apply.
        waveforms: (batch, samples), right-padded.
        lengths: (batch,) valid samples of each row.
        layers: hidden states to return: 0 is the input of the first layer, `num_hidden_layers` the model's
            `last_hidden_state`. Layers above the highest are not computed.

    Returns:
        One (batch, frames, hidden) tensor for each of `layers`. Frames past an utterance's end are undefined.
    """
    config = wavlm.config
    padded = bool((lengths < waveforms.shape[1]).any())
    # 1. convolution front end: (batch, samples) -> (batch, channels, frames)
    features = waveforms.unsqueeze(1)
    front_end: Any = wavlm.feature_extractor.conv_layers
    for index, layer in enumerate(front_end):
        if index == 0 and padded and config.feat_extract_norm == "group":
            valid = (lengths - config.conv_kernel[0]) // config.conv_stride[0] + 1
            features = layer.activation(_group_norm_over_valid(layer.conv(features), layer.layer_norm, valid))
        else:
            features = layer(features)
    hidden, _ = wavlm.feature_projection(features.transpose(1, 2))  # (batch, frames, hidden)
    # 2. masks: WavLM's layers take None where nothing is padded
    frame_lengths = num_frames(lengths, config)
    frame_mask = length_mask(frame_lengths, hidden.shape[1]) if padded else None
    if wavlm.training and config.apply_spec_augment:
        hidden = _spec_augment(wavlm, hidden, frame_lengths)
    if frame_mask is not None:
        hidden = hidden.masked_fill(~frame_mask.unsqueeze(-1), 0.0)
    # 3. positions, then the transformer layers up to the highest that is read
    encoder = wavlm.encoder
    hidden = hidden + encoder.pos_conv_embed(hidden)
    if not config.do_stable_layer_norm:
        hidden = encoder.layer_norm(hidden)
    hidden = encoder.dropout(hidden)
    states = {0: hidden}
    position_bias = None
    for index, layer in enumerate(encoder.layers[: max(layers)]):
        dropped = wavlm.training and index > 0 and config.layerdrop > 0 and torch.rand([]) < config.layerdrop
        if not dropped:
            hidden, position_bias = layer(hidden, attention_mask=frame_mask, position_bias=position_bias)
        states[index + 1] = hidden
    if config.do_stable_layer_norm and config.num_hidden_layers in states:
        states[config.num_hidden_layers] = encoder.layer_norm(states[config.num_hidden_layers])
    return [states[layer] for layer in layers]


def _group_norm_over_valid(features: torch.Tensor, norm: nn.GroupNorm, lengths: torch.Tensor) -> torch.Tensor:
    """WavLM-base's group norm (one group a channel) with moments over each row's valid frames only.

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


def _spec_augment(wavlm: WavLMModel, hidden: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor:
    """SpecAugment on the utterances that are long enough for it."""
    long = frame_lengths >= SPEC_AUGMENT_MIN_FRAMES
    if not long.any():
        return hidden
    mask = length_mask(frame_lengths, hidden.shape[1])
    hidden = hidden.clone()
    hidden[long] = wavlm._mask_hidden_states(hidden[long], attention_mask=mask[long])  # type: ignore[arg-type]
    return hidden


# Checks and unpadding of the encoder's input. WavLM counts an empty or too short row of a batch as a full one and
# answers with plausible numbers, so nothing that is not a complete utterance may reach it.


@dataclass
class UtteranceBatch:
    """The valid utterances of a batch of conversations.

    Attributes:
        waveforms: (utterances, samples) right-padded, row-major over (conversation, turn).
        lengths: (utterances,) valid samples.
        turn_mask: (batch, turns) bool, True where a turn is present.
    """

    waveforms: torch.Tensor
    lengths: torch.Tensor
    turn_mask: torch.Tensor


def collect_utterances(
    input_values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    turn_mask: torch.Tensor | None,
    min_samples: int,
) -> UtteranceBatch:
    """Check a padded batch and take the utterances out of it.

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
    _check_mask("attention_mask", attention_mask, input_values.shape, "one value for each sample of input_values")
    if input_values.dim() == 2:
        input_values = input_values.unsqueeze(1)  # (batch, 1, samples): conversations of one turn
        attention_mask = None if attention_mask is None else attention_mask.unsqueeze(1)
    batch, turns, samples = input_values.shape
    _check_mask("turn_mask", turn_mask, (batch, turns), "one value for each turn")

    if attention_mask is None:
        lengths = torch.full((batch, turns), samples, device=input_values.device)
    else:
        attention_mask = attention_mask.bool()
        if bool((attention_mask[..., 1:] > attention_mask[..., :-1]).any()):
            raise ValueError("attention_mask has a gap or is left-padded; Mamba-EMA allows padding on the right only")
        lengths = attention_mask.sum(dim=-1)  # (batch, turns)
    present = lengths > 0 if turn_mask is None else turn_mask.bool()
    _require_turns(present)
    too_short = present & (lengths < min_samples)
    if bool(too_short.any()):
        row, turn = too_short.nonzero()[0].tolist()
        raise ValueError(
            f"turn {turn} of row {row} has {int(lengths[row, turn])} valid samples; at least {min_samples} are needed"
        )
    lengths = lengths[present]  # (utterances,)
    waveforms = input_values[present][:, : int(lengths.max())]  # (utterances, samples)
    valid = length_mask(lengths, waveforms.shape[1])
    waveforms = waveforms.masked_fill(~valid, 0.0)  # padding may hold anything, NaN included
    bad = ~(waveforms.abs().amax(dim=1) <= MAX_VALUE)  # true for NaN too
    if bool(bad.any()):
        row, turn = present.nonzero()[int(bad.nonzero()[0])].tolist()
        raise ValueError(
            f"turn {turn} of row {row} of input_values is NaN, infinite or beyond {MAX_VALUE:g}; "
            "MambaEMAFeatureExtractor gives values that can be used, and says what is wrong with others"
        )
    return UtteranceBatch(waveforms, lengths, present)


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
    _check_mask("frame_mask", frame_mask, (batch, turns, frames), "one value for each frame")
    _check_mask("turn_mask", turn_mask, (batch, turns), "one value for each turn")
    frame_mask = frame_mask.bool()
    has_frames = frame_mask.any(dim=-1)
    present = has_frames if turn_mask is None else turn_mask.bool()
    if bool((present & ~has_frames).any()):
        row, turn = (present & ~has_frames).nonzero()[0].tolist()
        raise ValueError(f"turn {turn} of row {row} has no frame in frame_mask; take it out of turn_mask too")
    _require_turns(present)
    return frame_mask, present


def _require_turns(present: torch.Tensor) -> None:
    empty = ~present.any(dim=1)
    if bool(empty.any()):
        raise ValueError(f"row {int(empty.nonzero()[0])} of the batch has no valid turn; leave it out")


def _check_mask(name: str, mask: torch.Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if mask is None:
        return
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, but must be {tuple(shape)}: {meaning}")
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{name} must hold 0 and 1 only")
