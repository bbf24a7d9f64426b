"""The normal form of a corpus: one row an utterance, grouped into conversations.

Columns: `file_name`, `conversation_id`, `turn`, the label names, and optionally `speaker`, `split`, `start`, `end`
(seconds, where several utterances share a file).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict

from ..audio_files import load_audio
from ..ccc_loss import MISSING_LABEL
from ..feature_extraction_mamba_ema import SAMPLING_RATE
from .categories import refuse_categories
from .frame_cache import FrameCache, utterances_of
from .sources import Source, read_label_ranges, read_table
from .watched_reading import WatchedReading

logger = logging.getLogger(__name__)

COLUMNS = ("file_name", "start", "end", "conversation_id", "turn", "speaker", "split")
# Ratings slightly off their scale are clipped; farther off, the scale was named wrongly.
_CLIP_SHARE = 0.02


def load_emotion_dataset(
    source: Source,
    labels: Sequence[str],
    label_ranges: Mapping[str, Sequence[float]] | None = None,
    columns: Mapping[str, str] | None = None,
    labels_optional: bool = False,
) -> DatasetDict:
    """Read a corpus; audio is not decoded.

    Args:
        source: a folder with `metadata.jsonl`, `.csv` or `.parquet`, such a file, an audiofolder, a name on the Hub, a
            `Dataset` or `DatasetDict`, see [`read_table`]; audio is found relative to the metadata.
        labels: names of the label columns.
        label_ranges: each label's scale (low, high), [0, 1] where not named; a `corpus.json` beside the metadata, which
            knows the corpus' own scale, goes before it. Labels come out on the unit scale, -100 where the corpus has
            none.
        columns: what the corpus calls a column of the normal form or a label, such as `{"valence": "EmoVal"}`.
        labels_optional: leave out labels that the corpus does not have, for predictions without a reference.

    Returns:
        Splits by name; rows ordered by conversation and turn, `file_name` made absolute. A corpus without the column
        `conversation_id` has single utterances: each becomes a conversation of its own. Without `turn`, turns are
        ordered by `start`.

    Raises:
        ValueError: the source, a column or a label is not what it must be; the message names it.
    """
    table, name, folder = read_table(source)
    columns = columns or {}
    if labels_optional:
        labels = [label for label in labels if label in columns or label in table.columns]
    table = _with_normal_names(table, name, labels, columns)
    doubled = table.duplicated(["conversation_id", "turn"])
    if doubled.any():
        row = table[doubled].iloc[0]
        raise ValueError(f"{name} has turn {row['turn']} of conversation {row['conversation_id']!r} twice")
    scales = {**(label_ranges or {}), **read_label_ranges(source)}
    for label in labels:
        table[label] = _to_unit_scale(table, label, scales.get(label, (0, 1)))
    table["file_name"] = [str(folder.absolute() / file) for file in table["file_name"]]
    table = table.sort_values(["conversation_id", "turn"], kind="stable")
    if "split" not in table.columns:
        table["split"] = "train"
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
        labels: names of the label columns.
        turns_per_item: cut longer conversations into windows of this many turns; None: whole conversations.
        frame_cache: read frames from here instead of audio.
        context_turns: an item also holds up to this many turns before its window, from which the model only takes the
            state that the window starts from; `context_turns` of the item says how many.

    An item is a dict: `waveforms` (a list of (samples,) arrays at 16 kHz) with `seconds` (their lengths), or `frames` (a
    list of (layers, frames, hidden) tensors); `labels` (turns, labels) on the unit scale, `conversation_id`, `turns`
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
        for index, conversation in enumerate(rows["conversation_id"]):
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
        conversation, first = self.rows[window[0]]["conversation_id"], window[0]
        while window[0] - first < self.context_turns and first and self.rows[first - 1]["conversation_id"] == conversation:
            first -= 1
        indices = [*range(first, window[0]), *window]
        rows = self.rows.select(indices)
        item: dict[str, Any] = {
            "context_turns": window[0] - first,
            "labels": np.array([rows[label] for label in self.labels], dtype=np.float32).T,
            "conversation_id": str(rows["conversation_id"][0]),
            "turns": list(rows["turn"]),
            "speakers": list(rows["speaker"]) if "speaker" in rows.column_names else [None] * len(rows),
        }
        utterances = list(zip(indices, utterances_of(rows)))
        if self.frame_cache is not None:
            item["frames"] = [
                self.reading.read(row, utterance.file_name, self.frame_cache.read, utterance)
                for row, utterance in utterances
            ]
        else:
            item["waveforms"] = [
                self.reading.read(row, file.file_name, load_audio, file.file_name, file.start, file.end)
                for row, file in utterances
            ]
            item["seconds"] = [waveform.size / SAMPLING_RATE for waveform in item["waveforms"]]
        return item

    def being_read(self) -> dict[int, str | None]:
        """For each process that has read audio, by its id, the file it is at; None between files."""
        return {
            pid: None if row is None else str(self.rows[row]["file_name"])
            for pid, row in self.reading.readers().items()
        }


def _with_normal_names(
    table: pd.DataFrame, name: str, labels: Sequence[str], columns: Mapping[str, str]
) -> pd.DataFrame:
    """Columns under the names of the normal form, with all that are required."""
    for normal, own in columns.items():
        if normal not in (*COLUMNS, *labels):
            raise ValueError(f"data.columns names {normal!r}{_nearest(normal, (*COLUMNS, *labels))}")
        if own not in table.columns:
            raise ValueError(f"{name} has no column {own!r} for {normal}{_nearest(own, table.columns)}")
    if labels and not any(label in columns or label in table.columns for label in labels):
        refuse_categories(name, table.columns)
    renamed = {normal: table[own] for normal, own in columns.items()}
    table = table.assign(**renamed)
    for column in ("file_name", *labels):
        if column not in table.columns:
            raise ValueError(f"{name} has no column {column!r}{_nearest(column, table.columns)}; data.columns can name it")
    for column in ("file_name", "conversation_id", "turn"):
        if column in table.columns and table[column].isna().any():
            raise ValueError(f"{name} has no {column} in row {int(table[column].isna().to_numpy().argmax()) + 1}")
    if "conversation_id" not in table.columns:
        close = difflib.get_close_matches("conversation_id", table.columns, n=1)
        if close or table["file_name"].duplicated().any():
            hint = f"; did you mean {close[0]!r}?" if close else ", although several utterances share a file"
            raise ValueError(f"{name} has no column 'conversation_id'{hint} data.columns can name it")
        logger.info("%s has no conversations: each of its %d utterances stands alone", name, len(table))
        table = table.assign(conversation_id=table["file_name"], turn=0)
    if "turn" not in table.columns:
        if "start" not in table.columns or table["start"].isna().any():
            raise ValueError(f"{name} has no column 'turn', and no 'start' to order turns by{_nearest('turn', table.columns)}")
        table = table.assign(turn=table.groupby("conversation_id")["start"].rank(method="first").astype(int) - 1)
    return table


def _nearest(name: str, known: Sequence[str] | pd.Index) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", only {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _to_unit_scale(table: pd.DataFrame, label: str, scale: Sequence[float]) -> np.ndarray:
    low, high = float(scale[0]), float(scale[1])
    values = pd.to_numeric(table[label], errors="coerce").to_numpy(float)
    given = table[label].notna().to_numpy()
    # Written so that NaN from a text and infinity are off, too.
    off = given & ~((values >= low - _CLIP_SHARE * (high - low)) & (values <= high + _CLIP_SHARE * (high - low)))
    if off.any():
        row = table[off].iloc[0]
        value = row[label] if isinstance(row[label], str) else f"{row[label]:g}"
        raise ValueError(
            f"{label} of turn {row['turn']} of conversation {row['conversation_id']!r} is {value}, outside its scale "
            f"[{low:g}, {high:g}]; name the corpus' scale in model.params.label_ranges or in its corpus.json"
        )
    clipped = given & ((values < low) | (values > high))
    if clipped.any():
        logger.warning("%d values of %s lie slightly outside [%g, %g] and were clipped", clipped.sum(), label, low, high)
    return np.where(given, np.clip((values - low) / (high - low), 0, 1), MISSING_LABEL)
