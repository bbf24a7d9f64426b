"""What would ruin a run, found before its first step."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from torch import nn

from ..ccc_loss import MISSING_LABEL
from ..configuration_mamba_ema import MambaEMAConfig
from ..data.dataset import ConversationDataset

# On the unit scale. The loss' epsilon, and a metric rounded to three places, are for labels that vary far more.
MIN_LABEL_SPREAD = 0.01
# SpecAugment as WavLM ships it hides a third of a second of speech, and most of what is shorter.
MIN_SPEC_AUGMENT_SECONDS = 1.0


def check_labels_vary(split: str, dataset: ConversationDataset) -> None:
    """A CCC needs labels that vary.

    Raises:
        ValueError: a label is missing throughout the split, or (nearly) the same in all its turns.
    """
    for label in dataset.labels:
        values = np.asarray(dataset.rows[label], dtype=np.float64)
        values = values[values != MISSING_LABEL]
        if values.size < 2 or values.std() < MIN_LABEL_SPREAD:
            what = "missing" if values.size == 0 else f"{values.mean():.3g} throughout"
            raise ValueError(
                f"{label} is {what} in the split {split} ({values.size} labelled turns): a CCC needs labels that vary. "
                "Check the column and its scale, or leave this label out of model.params.id2label"
            )


def check_speech_encoder(config: MambaEMAConfig, world_size: int, shortest_seconds: float) -> None:
    """Settings of WavLM that stop or spoil training.

    Args:
        config: of the model.
        world_size: number of processes.
        shortest_seconds: of all training utterances.

    Raises:
        ValueError: layer drop with several processes, or SpecAugment with short utterances.
    """
    encoder = config.speech_encoder_config
    if config.freeze_speech_encoder:  # it stays in evaluation mode, where neither is done
        return
    if encoder.layerdrop > 0 and world_size > 1:
        raise ValueError(
            f"speech_encoder_config.layerdrop is {encoder.layerdrop:g} with {world_size} processes: a layer that is "
            "left out has no gradient, for which the other processes wait. Set it to 0"
        )
    if encoder.apply_spec_augment and shortest_seconds < MIN_SPEC_AUGMENT_SECONDS:
        raise ValueError(
            "speech_encoder_config.apply_spec_augment is on and the shortest utterance lasts "
            f"{shortest_seconds:.2f} s; SpecAugment hides most of an utterance under {MIN_SPEC_AUGMENT_SECONDS:g} s. "
            "Set it to false, or leave short utterances out"
        )


def require_free_space(folder: Path, needed: int, what: str) -> None:
    """
    Args:
        folder: where it will be written; may be missing.
        needed: bytes.
        what: is to be written, for the message.

    Raises:
        OSError: less is free.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e9:.3f} GB free, but {what} need {needed / 1e9:.3f} GB. Free some, or choose "
            "another training.output_dir"
        )


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint: the weights, and AdamW's two moments of what is trained."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
