"""A corpus as conversations: its splits in normal form, see `normal_form.py`, and items for training and evaluation."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from ..audio_files import load_stretches
from ..feature_extraction_mamba_ema import SAMPLING_RATE
from .frame_cache import FrameCache
from .normal_form import in_normal_form, spread_to_unit_scale, to_unit_scale
from .sources import Source, read_label_ranges, read_table
from .utterances import utterances_of
from .watched_reading import WatchedReading


def load_emotion_dataset(
    source: Source,
    labels: Sequence[str],
    label_ranges: Mapping[str, Sequence[float]] | None = None,
    columns: Mapping[str, str] | None = None,
    labels_optional: bool = False,
    with_spread: bool = False,
) -> DatasetDict:
    """Read a corpus; audio is not decoded.

    Args:
        source: see [`read_table`]; audio is found relative to the metadata.
        label_ranges: each label's scale (low, high), [0, 1] where not named; a `corpus.json` beside the metadata, which
            knows the corpus' own scale, goes before it. Labels come out on the unit scale, -100 where the corpus has
            none.
        columns: what the corpus calls a column of the normal form or a label, such as `{"valence": "EmoVal"}`.
        labels_optional: labels for which the corpus has no column are missing, for predictions without a reference.
        with_spread: also read the raters' standard deviations, such as `valence_sd`, likewise.

    Returns:
        Splits by name; rows ordered by conversation and turn, `file_name` made absolute. A corpus without the column
        `conversation_id` has single utterances: each becomes a conversation of its own. Without `turn`, turns are
        ordered by `start`. Each split may number its conversations anew.

    Raises:
        LabelError: a label that is no number, or far off its scale.
        ValueError: the source, a column or a value is not what it must be; the message names it, with its row.
    """
    table, name, folder = read_table(source)
    spreads = {f"{label}_sd": label for label in labels if with_spread}
    table = in_normal_form(table, name, labels, columns or {}, labels_optional, list(spreads))
    scales = {**(label_ranges or {}), **read_label_ranges(source)}
    for label in labels:
        table[label] = to_unit_scale(table, label, scales.get(label, (0, 1)), name)
    for column, label in spreads.items():
        table[column] = spread_to_unit_scale(table, column, scales.get(label, (0, 1)), name)
    table["file_name"] = [file if "://" in file else str(folder.absolute() / file) for file in table["file_name"]]
    return DatasetDict(
        {
            str(split): Dataset.from_pandas(rows.drop(columns="split"), preserve_index=False)
            for split, rows in table.groupby("split", sort=False)
        }
    )


class ConversationDataset(torch.utils.data.Dataset):
    """Conversations, or windows of their turns, as items for training and evaluation.

    Args:
        rows: one split of [`load_emotion_dataset`].
        labels: the label columns, and those of the raters' standard deviations behind them.
        turns_per_item: cut longer conversations into windows of this many turns; None: whole conversations.
        frame_cache: read frames from here instead of audio.
        context_turns: an item also holds up to this many turns before its window, from which the model only takes the
            state that the window starts from; `context_turns` of the item says how many.

    An item is a dict: `waveforms` (a list of (samples,) arrays at 16 kHz) with `seconds` (their lengths), or `frames`
    (a list of (layers, frames, hidden) tensors); `labels` (turns, labels) on the unit scale, `conversation_id`, `turns`
    (their numbers), `speakers` (None where the corpus names none).
    """

    def __init__(
        self,
        rows: Dataset,
        labels: Sequence[str],
        turns_per_item: int | None = None,
        frame_cache: FrameCache | None = None,
        context_turns: int = 0,
    ):
        self.rows = rows
        self.context_turns = context_turns
        self.frame_cache = frame_cache
        self.labels = list(labels)
        self.items: list[list[int]] = []
        previous = None
        for index, conversation in enumerate(rows["conversation_id"][:]):
            full = turns_per_item is not None and self.items and len(self.items[-1]) >= turns_per_item
            if conversation != previous or full:
                self.items.append([])
            self.items[-1].append(index)
            previous = conversation
        self.reading = WatchedReading()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        window = self.items[index]
        first = window[0]
        conversation = self.rows[first]["conversation_id"]
        earliest = max(0, first - self.context_turns)
        while first > earliest and self.rows[first - 1]["conversation_id"] == conversation:
            first -= 1
        indices = [*range(first, window[0]), *window]
        rows = self.rows[indices]  # by column; `select` would copy the table's description each time
        item: dict[str, Any] = {
            "context_turns": window[0] - first,
            "labels": np.array([rows[label] for label in self.labels], dtype=np.float32).T,
            "conversation_id": str(rows["conversation_id"][0]),
            "turns": list(rows["turn"]),
            "speakers": list(rows.get("speaker", [None] * len(indices))),
        }
        utterances = list(zip(indices, utterances_of(rows)))
        if self.frame_cache is not None:
            item["frames"] = [
                self.reading.read(row, utterance.file_name, self.frame_cache.read, utterance)
                for row, utterance in utterances
            ]
        else:
            item["waveforms"] = []
            for name, group in itertools.groupby(utterances, lambda utterance: utterance[1].file_name):
                numbers, files = zip(*group)
                stretches = [(file.start, file.end, file.channel) for file in files]
                item["waveforms"] += self.reading.read(numbers[0], name, load_stretches, name, stretches)
            item["seconds"] = [waveform.size / SAMPLING_RATE for waveform in item["waveforms"]]
        return item

    def being_read(self) -> dict[int, str | None]:
        """For each process that has read audio, by its id, the file it is at; None between files."""
        return {
            pid: None if row is None else str(self.rows[row]["file_name"])
            for pid, row in self.reading.readers().items()
        }
