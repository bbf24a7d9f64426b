"""Checks and unpadding at the model's door: padded conversations -> the utterances that are really there.

WavLM counts an empty or too short row of a batch as a full one and answers with plausible numbers, so nothing that is
not a complete utterance may reach it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .ccc_loss import MISSING_LABEL

# Normalised speech of 30 s has a peak of at most sqrt(480000) = 693; a waveform far beyond it overflows inside WavLM,
# whose answer then is that for silence.
MAX_VALUE = 1e4


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
    valid = torch.arange(waveforms.shape[1], device=lengths.device) < lengths.unsqueeze(1)
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


def check_labels(labels: torch.Tensor, expected_shape: tuple[int, ...], names: list[str]) -> None:
    """Labels must have the logits' shape and lie on the unit scale; -100 marks a missing one.

    Raises:
        ValueError: wrong shape, NaN or infinite, or outside [0, 1].
    """
    if tuple(labels.shape) != expected_shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, but must be {expected_shape}: one value for each of {names}"
        )
    given = labels != MISSING_LABEL
    if not bool(torch.isfinite(labels).all()):
        position = (~torch.isfinite(labels)).nonzero()[0].tolist()
        raise ValueError(f"the label at {position} is NaN or infinite; mark a missing label by {MISSING_LABEL:g}")
    outside = given & ((labels < -1e-4) | (labels > 1 + 1e-4))
    if bool(outside.any()):
        position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"the label at {position} is {float(labels[tuple(position)]):g}, but labels are on the unit scale [0, 1]; "
            f"rescale them as (label - low) / (high - low); {MISSING_LABEL:g} marks a missing one"
        )


def _check_mask(name: str, mask: torch.Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if mask is None:
        return
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, but must be {tuple(shape)}: {meaning}")
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{name} must hold 0 and 1 only")
