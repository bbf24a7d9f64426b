"""From conversations to one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from ..ccc_loss import MISSING_LABEL
from ..conversation_encoder import UNKNOWN_SPEAKER, number_speakers
from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError, MambaEMAFeatureExtractor


class ConversationCollator:
    """Pads conversations in turns and in samples (or frames), and their labels with -100.

    Args:
        extractor: makes `input_values` and masks of the waveforms.

    Returns, when called with items of `ConversationDataset`: `input_values`, `attention_mask` (batch, turns, samples),
    or, from cached frames, `frame_values` (batch, turns, layers, frames, hidden), `frame_mask` (batch, turns, frames);
    `turn_mask` (batch, turns), `speaker_ids` (batch, turns), -1 for unknown, `labels` (batch, turns, labels), and
    `conversation_ids`, a list of names for messages; `context_turns` (batch,) where items begin with turns before their
    window.
    """

    def __init__(self, extractor: MambaEMAFeatureExtractor):
        self.extractor = extractor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        features = pad_frames([item["frames"] for item in items]) if "frames" in items[0] else self._extract(items)
        turns, labels = features["turn_mask"].shape[1], items[0]["labels"].shape[1]
        batch_labels = torch.full((len(items), turns, labels), MISSING_LABEL)
        speaker_ids = torch.full((len(items), turns), UNKNOWN_SPEAKER)
        for row, item in enumerate(items):
            batch_labels[row, : len(item["labels"])] = torch.from_numpy(item["labels"])
            speaker_ids[row, : len(item["speakers"])] = torch.tensor(number_speakers(item["speakers"]))
        batch = {
            **features,
            "speaker_ids": speaker_ids,
            "labels": batch_labels,
            "conversation_ids": [item["conversation_id"] for item in items],
        }
        context = torch.tensor([item.get("context_turns", 0) for item in items])
        return {**batch, "context_turns": context} if bool(context.any()) else batch

    def _extract(self, items: list[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        try:
            return self.extractor(
                [item["waveforms"] for item in items], sampling_rate=SAMPLING_RATE, return_tensors="pt"
            )
        except InvalidAudioError as error:
            names = ", ".join(f"{row}: {item['conversation_id']}" for row, item in enumerate(items))
            raise InvalidAudioError(f"{error} (conversations of the batch: {names})") from error


def pad_frames(conversations: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Frames of conversations' turns -> one batch.

    Args:
        conversations: for each, its turns, (layers, frames, hidden) each.

    Returns:
        `frame_values` (batch, turns, layers, frames, hidden), `frame_mask` (batch, turns, frames), `turn_mask` (batch,
        turns).
    """
    turns = max(map(len, conversations))
    frames = max(turn.shape[1] for conversation in conversations for turn in conversation)
    # A single utterance that is kept in float32 makes the batch so.
    dtype = reduce(torch.promote_types, (turn.dtype for conversation in conversations for turn in conversation))
    layers, _, hidden = conversations[0][0].shape
    values = torch.zeros(len(conversations), turns, layers, frames, hidden, dtype=dtype)
    mask = torch.zeros(len(conversations), turns, frames, dtype=torch.bool)
    for row, conversation in enumerate(conversations):
        for place, turn in enumerate(conversation):
            values[row, place, :, : turn.shape[1]] = turn
            mask[row, place, : turn.shape[1]] = True
    return {"frame_values": values, "frame_mask": mask, "turn_mask": mask.any(dim=-1)}
