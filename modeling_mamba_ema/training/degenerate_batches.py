"""How many batches taught nothing about some label."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..ccc_loss import MISSING_LABEL


class DegenerateBatches:
    """Counts training batches in which a label is missing or the same in all turns: its CCC is 0, and so is what can be
    learned from it. `take_share()` is the share since it was last asked."""

    def __init__(self) -> None:
        self.batches = 0
        self.degenerate = 0

    def count(self, labels: torch.Tensor) -> None:
        """
        Args:
            labels: (batch, turns, labels) of this process, -100 where missing. The batch of all processes counts.
        """
        values = labels.detach().flatten(0, -2).float()  # (turns, labels)
        missing = values == MISSING_LABEL
        lowest = values.masked_fill(missing, torch.inf).amin(dim=0)
        highest = values.masked_fill(missing, -torch.inf).amax(dim=0)
        bounds = torch.cat([lowest, -highest])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bounds, op=dist.ReduceOp.MIN)
        lowest, highest = bounds.chunk(2)
        self.batches += 1
        self.degenerate += bool((-highest <= lowest).any())

    def take_share(self) -> float:
        share = self.degenerate / max(self.batches, 1)
        self.batches = self.degenerate = 0
        return share
