"""Batches filled by seconds of audio, mixed over conversations, the same for any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..data.dataset import ConversationDataset
from ..data.frame_cache import utterances_of

# Items are sorted by length only among this many batches' worth of shuffled items, so that batches still differ from
# epoch to epoch.
BATCHES_SORTED_TOGETHER = 8


class AudioSecondsBatchSampler(Sampler[list[int]]):
    """Batches of about `max_seconds` of audio.

    The limit holds for the batch of ALL processes together, because the CCC loss is one of the whole batch: with the
    same seed, one process and several see the same batches. Each batch comes as `num_processes` lists one after the
    other, which accelerate hands to the processes in turn.

    Each epoch shuffles anew, sorts neighbours by the length of their longest turn (which is what padding costs), cuts
    the order where the seconds are full, and shuffles the batches. The number of batches is the same in every epoch, as
    Trainer's count of steps needs it; a batch exceeds its share of the seconds by at most one item, and `max_seconds`
    also where `min_items` asks for it.

    Args:
        turn_seconds: for each item, the seconds of each of its turns.
        max_seconds: of audio in a batch.
        num_processes: that share a batch.
        seed: of the order, together with the epoch.
        min_items: a batch mixes at least this many conversations, or all there are: the CCC of a single one is another
            objective.

    Raises:
        ValueError: fewer items than processes, or seconds that are not positive.
    """

    # Read by accelerate: batches of varying size, always a whole round for all processes.
    batch_size = None
    drop_last = True

    def __init__(
        self,
        turn_seconds: Sequence[Sequence[float]],
        max_seconds: float,
        num_processes: int = 1,
        seed: int = 0,
        min_items: int = 2,
    ):
        self.total = np.array([sum(turns) for turns in turn_seconds])  # (items,)
        self.longest = np.array([max(turns) for turns in turn_seconds])  # (items,)
        self.num_processes = num_processes
        self.min_items = max(min(min_items, len(self.total)), num_processes)
        self.seed = seed
        self.epoch = 0
        if max_seconds <= 0:
            raise ValueError(f"max_seconds_per_batch is {max_seconds}, but must be positive")
        if len(self.total) < self.min_items:
            raise ValueError(
                f"there are {len(self.total)} conversations (or windows), but a batch needs {self.min_items}; use more "
                "data, smaller data.turns_per_item, or fewer processes"
            )
        by_seconds = int(np.ceil(self.total.sum() / max_seconds))
        self.num_batches = max(1, min(by_seconds, len(self.total) // self.min_items))

    def __len__(self) -> int:
        return self.num_batches * self.num_processes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches(self.epoch):
            yield from self._shares(batch)

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, each for all processes together; every item is in exactly one."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.total))
        neighbours = int(np.ceil(len(order) / self.num_batches)) * BATCHES_SORTED_TOGETHER
        order = np.concatenate(
            [
                part[np.argsort(self.longest[part], kind="stable")]
                for part in np.split(order, range(neighbours, len(order), neighbours))
            ]
        )
        seconds = np.cumsum(self.total[order])
        bounds = [0]
        for index in range(1, self.num_batches):
            wanted = int(np.searchsorted(seconds, seconds[-1] * index / self.num_batches))
            latest = len(order) - (self.num_batches - index) * self.min_items
            bounds.append(min(max(wanted, bounds[-1] + self.min_items), latest))
        bounds.append(len(order))
        batches = [order[start:end].tolist() for start, end in itertools.pairwise(bounds)]
        return [batches[index] for index in random.permutation(len(batches))]

    def _shares(self, batch: list[int]) -> list[list[int]]:
        """One list a process, even in seconds: the longest item left goes to the process with the least so far."""
        shares: list[list[int]] = [[] for _ in range(self.num_processes)]
        seconds = np.zeros(self.num_processes)
        for item in sorted(batch, key=lambda item: -self.total[item]):
            empty = [process for process in range(self.num_processes) if not shares[process]]
            process = empty[0] if empty else int(np.argmin(seconds))
            shares[process].append(item)
            seconds[process] += self.total[item]
        return shares


def seconds_of_turns(dataset: ConversationDataset) -> list[list[float]]:
    """Seconds of each turn of each item, from start and end or from the files' headers; nothing is decoded."""
    utterances = utterances_of(dataset.rows)
    return [[utterances[index].seconds for index in item] for item in dataset.items]
