"""Training audio that is a little different in each epoch: noise, and faster or slower speech."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import soxr
import torch

from ..data.dataset import ConversationDataset
from ..feature_extraction_mamba_ema import MIN_SAMPLES, SAMPLING_RATE


class AugmentedDataset(torch.utils.data.Dataset):
    """A training split whose waveforms are changed anew in every epoch; lengths in seconds are told as they were.

    What is drawn depends on the seed, the epoch and the item alone, so that workers, processes and a resume change
    nothing. All turns of an item get the same speed; noise is of its own strength in each turn.

    Args:
        dataset: the training split, with audio.
        seed: of what is drawn.
        noise_snr_db: (lowest, highest) ratio of speech to added white noise, in dB; None: no noise.
        speed_factors: speeds to draw from, such as (0.9, 1.0, 1.1) of Ko et al. 2015, "Audio augmentation for speech
            recognition"; pitch moves with speed. None: speech as it is.
        max_seconds: what would become longer than this, or too short for the model, keeps its speed.

    Raises:
        ValueError: values that cannot be meant, or a dataset of cached frames, which no longer have a waveform.
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        seed: int,
        noise_snr_db: Sequence[float] | None = None,
        speed_factors: Sequence[float] | None = None,
        max_seconds: float = 30.0,
    ):
        if noise_snr_db is not None and (len(noise_snr_db) != 2 or not -20 <= noise_snr_db[0] <= noise_snr_db[1] <= 80):
            raise ValueError(
                f"data.noise_snr_db is {noise_snr_db}, but must be [lowest, highest] in dB, from -20 to 80"
            )
        if speed_factors is not None and not (speed_factors and all(0.5 <= factor <= 2.0 for factor in speed_factors)):
            raise ValueError(f"data.speed_factors is {speed_factors}, but must be a list of factors from 0.5 to 2")
        if dataset.frame_cache is not None:
            raise ValueError(
                "noise and speed change waveforms, but data.cache_features trains from frames; leave out one"
            )
        self.dataset = dataset
        self.rows, self.items, self.labels = dataset.rows, dataset.items, dataset.labels
        self.being_read = dataset.being_read
        self.seed, self.epoch = seed, 0
        self.noise_snr_db, self.speed_factors, self.max_seconds = noise_snr_db, speed_factors, max_seconds

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        random = np.random.default_rng([self.seed, self.epoch, index])
        waveforms = item["waveforms"]
        if self.speed_factors is not None:
            factor = float(random.choice(self.speed_factors))
            lengths = [waveform.size / factor for waveform in waveforms]
            if min(lengths) > MIN_SAMPLES and max(lengths) < self.max_seconds * SAMPLING_RATE:
                waveforms = [change_speed(waveform, factor) for waveform in waveforms]
        if self.noise_snr_db is not None:
            low, high = self.noise_snr_db
            waveforms = [add_noise(waveform, random.uniform(low, high), random) for waveform in waveforms]
        return {**item, "waveforms": waveforms, "seconds": [waveform.size / SAMPLING_RATE for waveform in waveforms]}


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Play faster by a factor (slower below 1), as a tape would.

    Args:
        waveform: (samples,).

    Returns:
        (samples / factor,) float32.
    """
    if factor == 1.0:
        return waveform
    return soxr.resample(waveform, SAMPLING_RATE * factor, SAMPLING_RATE, quality="HQ").astype(np.float32)


def add_noise(waveform: np.ndarray, snr_db: float, random: np.random.Generator) -> np.ndarray:
    """Add white noise, this many dB below the waveform's own level; silence stays silent.

    Args:
        waveform: (samples,).
        snr_db: power of the waveform over that of the noise.
        random: draws the noise.

    Returns:
        (samples,) float32.
    """
    level = np.sqrt(np.mean(np.square(waveform, dtype=np.float64))) * 10 ** (-snr_db / 20)
    return (waveform + level * random.standard_normal(waveform.size)).astype(np.float32)
