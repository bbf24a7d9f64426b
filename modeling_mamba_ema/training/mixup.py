"""Mixup of conversations: between two of them lie others, with labels between theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ..ccc_loss import MISSING_LABEL


@contextlib.contextmanager
def mixed_conversations(
    projection: nn.Module, labels: torch.Tensor, alpha: float, random: np.random.Generator
) -> Iterator[torch.Tensor]:
    r"""Within this context, the model sees each conversation of a batch mixed with another one of it.

    Mixed are the observations, the vectors that are pooled from the turns' audio, turn by turn: two voices laid over
    each other would be no emotion between theirs (Verma et al. 2019, "Manifold Mixup"). With :math:`\lambda` from
    Beta(alpha, alpha), one for the batch, turn t of conversation i becomes
    :math:`\lambda z_t^i + (1 - \lambda) z_t^j`, and its labels likewise. A turn stays as it is where either
    conversation has no such turn or lacks a label of it.

    Args:
        projection: the model's module that makes observations, (batch, turns, hidden).
        labels: (batch, turns, labels), -100 where missing.
        alpha: 0.2 mixes most pairs a little, 1 all degrees alike.
        random: draws lambda and the pairs.

    Yields:
        the mixed labels, (batch, turns, labels).
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
