"""Batches: which conversations go together, by seconds of audio, and how they are padded to one tensor."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ..ccc_loss import MISSING_LABEL
from ..conversation_encoder import UNKNOWN_SPEAKER, number_speakers
from ..data.dataset import ConversationDataset
from ..data.utterances import seconds_of
from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError, MambaEMAFeatureExtractor
from ..pooling import length_mask

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
    seconds = seconds_of(dataset.rows)
    return [[seconds[index] for index in item] for item in dataset.items]


class ConversationCollator:
    """Pads conversations in turns and in samples (or frames), and their labels with -100.

    Returns, when called with items of `ConversationDataset`, or others like them (`speakers` may be left out):
    `input_values`, `attention_mask` (batch, turns, samples), or, from cached frames, `frame_values` (batch, turns,
    layers, frames, hidden), `frame_mask` (batch, turns, frames); `turn_mask` (batch, turns), `speaker_ids` (batch,
    turns), -1 for unknown, `labels` (batch, turns, labels), and `conversation_ids`, a list of names for messages;
    `context_turns` (batch,) where items begin with turns before their window.
    """

    def __init__(self, extractor: MambaEMAFeatureExtractor):
        self.extractor = extractor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._labels_and_names(items), **self._features(items)}

    def in_chunks(self, items: list[dict[str, Any]], turns_per_chunk: int) -> dict[str, Any]:
        """A batch for `predict_in_chunks`, in which no conversation is padded to the turns of the longest.

        Returns:
            As a call, but for conversations of more turns than `turns_per_chunk` without waveforms and frames. These
            are in `chunks`: of each so many turns, the conversations that have some of them, padded to these.
        """
        turns = max(len(item["labels"]) for item in items)
        if turns <= turns_per_chunk:
            return self(items)
        chunks = []
        for start in range(0, turns, turns_per_chunk):
            going_on = [item for item in items if len(item["labels"]) > start]
            chunks.append(self._features([_cut(item, start, start + turns_per_chunk) for item in going_on]))
        turn_mask = length_mask(torch.tensor([len(item["labels"]) for item in items]), turns)
        return {**self._labels_and_names(items), "turn_mask": turn_mask, "chunks": chunks}

    def _features(self, items: list[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        return pad_frames([item["frames"] for item in items]) if "frames" in items[0] else self._extract(items)

    def _labels_and_names(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        turns, labels = max(len(item["labels"]) for item in items), items[0]["labels"].shape[1]
        batch_labels = torch.full((len(items), turns, labels), MISSING_LABEL)
        speaker_ids = torch.full((len(items), turns), UNKNOWN_SPEAKER)
        for row, item in enumerate(items):
            batch_labels[row, : len(item["labels"])] = torch.from_numpy(item["labels"])
            speakers = item.get("speakers", [None] * len(item["labels"]))
            speaker_ids[row, : len(speakers)] = torch.tensor(number_speakers(speakers))
        batch = {
            "labels": batch_labels,
            "speaker_ids": speaker_ids,
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


def _cut(item: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The audio of some turns of a conversation."""
    cut = {name: item[name][start:stop] for name in ("waveforms", "frames") if name in item}
    return {**cut, "conversation_id": item["conversation_id"]}


def pad_frames(conversations: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Frames of conversations' turns, (layers, frames, hidden) each -> `frame_values` (batch, turns, layers, frames,
    hidden), `frame_mask` (batch, turns, frames), `turn_mask` (batch, turns)."""
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
