"""Batches of conversations of different lengths."""

import torch

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.training import ConversationCollator


def test_a_batch_is_padded_with_missing_labels(train_split):
    lengths = [len(item) for item in train_split.items]
    pair = [train_split[lengths.index(min(lengths))], train_split[lengths.index(max(lengths))]]
    batch = ConversationCollator(MambaEMAFeatureExtractor())(pair)
    assert batch["turn_mask"].sum(1).tolist() == [min(lengths), max(lengths)]
    assert (batch["labels"][0, min(lengths) :] == -100).all()
    torch.testing.assert_close(batch["labels"][1], torch.from_numpy(pair[1]["labels"]))


def test_speakers_are_numbered_in_each_conversation_and_unknown_ones_are_minus_one(train_split):
    pair = [dict(train_split[index]) for index in (3, 2)]  # of 4 and 3 turns
    pair[0]["speakers"], pair[1]["speakers"] = ["ben", None, "anna ", "anna"], ["anna", " ", "anna"]
    batch = ConversationCollator(MambaEMAFeatureExtractor())(pair)
    assert batch["speaker_ids"].tolist() == [[0, -1, 1, 1], [0, -1, 0, -1]]
