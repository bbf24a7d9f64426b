"""From conversations to one padded batch."""

from __future__ import annotations

from typing import Any

import torch

from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError, MambaEMAFeatureExtractor
from ..model_inputs import MISSING_LABEL


class ConversationCollator:
    """Pads conversations in turns and in samples, and their labels with -100.

    Args:
        extractor: makes `input_values` and masks of the waveforms.

    Returns, when called with items of `ConversationDataset`: `input_values`, `attention_mask` (batch, turns, samples),
    `turn_mask` (batch, turns), `labels` (batch, turns, labels), and `conversation_ids`, a list of names for messages.
    """

    def __init__(self, extractor: MambaEMAFeatureExtractor):
        self.extractor = extractor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            features = self.extractor(
                [item["waveforms"] for item in items], sampling_rate=SAMPLING_RATE, return_tensors="pt"
            )
        except InvalidAudioError as error:
            names = ", ".join(f"{row}: {item['conversation_id']}" for row, item in enumerate(items))
            raise InvalidAudioError(f"{error} (conversations of the batch: {names})") from error
        turns, labels = features["turn_mask"].shape[1], items[0]["labels"].shape[1]
        batch_labels = torch.full((len(items), turns, labels), MISSING_LABEL)
        for row, item in enumerate(items):
            batch_labels[row, : len(item["labels"])] = torch.from_numpy(item["labels"])
        return {**features, "labels": batch_labels, "conversation_ids": [item["conversation_id"] for item in items]}
