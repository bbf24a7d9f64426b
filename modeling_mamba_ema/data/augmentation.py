"""Training data that differ in each epoch: noise, faster or slower speech, and mixtures of conversations."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import soxr
import torch
from torch import nn

from ..ccc_loss import MISSING_LABEL
from ..feature_extraction_mamba_ema import DEFAULT_MAX_SECONDS, MIN_SAMPLES, SAMPLING_RATE
from .dataset import ConversationDataset


class AugmentedDataset(torch.utils.data.Dataset):
    """A training split whose waveforms are changed anew in every epoch.

    What is drawn depends on the seed, the epoch and the item alone, so that workers, processes and a resume change
    nothing. All turns of an item get the same speed; noise is of its own strength in each turn.

    Args:
        noise_snr_db: (lowest, highest) ratio of speech to added white noise, in dB; None: no noise.
        speed_factors: speeds to draw from, such as (0.9, 1.0, 1.1) of Ko et al. 2015, "Audio augmentation for speech
            recognition"; pitch moves with speed. None: speech as it is.
        max_seconds: what would become longer than this, or too short for the model, keeps its speed.

    Raises:
        ValueError: values that are not allowed.
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        seed: int,
        noise_snr_db: Sequence[float] | None = None,
        speed_factors: Sequence[float] | None = None,
        max_seconds: float = DEFAULT_MAX_SECONDS,
    ):
        if noise_snr_db is not None and (len(noise_snr_db) != 2 or not -20 <= noise_snr_db[0] <= noise_snr_db[1] <= 80):
            raise ValueError(
                f"data.noise_snr_db is {noise_snr_db}, but must be [lowest, highest] in dB, from -20 to 80"
            )
        if speed_factors is not None and not (speed_factors and all(0.5 <= factor <= 2.0 for factor in speed_factors)):
            raise ValueError(f"data.speed_factors is {speed_factors}, but must be a list of factors from 0.5 to 2")
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
    """Play a waveform (samples,) faster by a factor (slower below 1), as a tape would: (samples / factor,) float32."""
    if factor == 1.0:
        return waveform
    return soxr.resample(waveform, SAMPLING_RATE * factor, SAMPLING_RATE, quality="HQ").astype(np.float32)


def add_noise(waveform: np.ndarray, snr_db: float, random: np.random.Generator) -> np.ndarray:
    """Add white noise, `snr_db` below the level of the waveform (samples,) itself, in float32; silence stays silent."""
    level = np.sqrt(np.mean(np.square(waveform, dtype=np.float64))) * 10 ** (-snr_db / 20)
    return (waveform + level * random.standard_normal(waveform.size)).astype(np.float32)


@contextlib.contextmanager
def mixed_conversations(
    projection: nn.Module, labels: torch.Tensor, alpha: float, random: np.random.Generator
) -> Iterator[torch.Tensor]:
    r"""Within this context, the model sees each conversation of a batch mixed with another one of it.

    Mixed are the observations, the vectors that are pooled from the turns' audio, turn by turn: two voices laid over
    each other would be no emotion between theirs (Verma et al. 2019, "Manifold Mixup"). With :math:`\lambda` from
    Beta(alpha, alpha), one for the batch, turn t of conversation i becomes :math:`\lambda z_t^i + (1 - \lambda) z_t^j`,
    and its labels likewise; its speaker stays that of i. A turn stays as it is where either conversation has no such
    turn or lacks a label of it.

    Args:
        projection: the model's module that makes observations, (batch, turns, hidden).
        labels: (batch, turns, labels), -100 where missing; what the context gives are the mixed ones.
        alpha: 0.2 mixes most pairs a little, 1 all degrees alike.
    """
    order = random.permutation(len(labels))
    partner = torch.empty(len(labels), dtype=torch.long)
    partner[order] = torch.from_numpy(np.roll(order, 1))  # a ring, in which nobody is its own partner
    partner = partner.to(labels.device)
    share = float(random.beta(alpha, alpha))
    labelled = (labels != MISSING_LABEL).all(dim=-1)
    mixed = (labelled & labelled[partner]).unsqueeze(-1)  # (batch, turns, 1)

    def mix(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mixed, share * values + (1.0 - share) * values[partner], values)

    handle = projection.register_forward_hook(lambda module, inputs, observations: mix(observations))
    try:
        yield mix(labels)
    finally:
        handle.remove()
