"""The splits of the tiny corpus, which most tests of training read."""

import pytest

from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from tests.support.tiny_corpus import LABELS


@pytest.fixture(scope="session")
def splits(corpus):
    """The rows of each split."""
    return load_emotion_dataset(corpus, LABELS)


@pytest.fixture(scope="session")
def train_split(splits):
    """The conversations of the training split."""
    return ConversationDataset(splits["train"], LABELS)
