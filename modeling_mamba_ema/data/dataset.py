"""The normal form of a corpus: one row an utterance, grouped into conversations.

Columns: `file_name`, `conversation_id`, `turn`, the label names, and optionally `speaker`, `split`, `start`, `end`
(seconds, where several utterances share a file).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset

from ..model_inputs import MISSING_LABEL
from .audio import load_audio

logger = logging.getLogger(__name__)

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_REQUIRED = ("file_name", "conversation_id", "turn")
# Ratings slightly off their scale are clipped; farther off, the scale was named wrongly.
_CLIP_SHARE = 0.02


def load_emotion_dataset(
    source: str | Path, labels: Sequence[str], label_ranges: dict[str, tuple[float, float]] | None = None
) -> DatasetDict:
    """Read a corpus in the normal form; audio is not decoded.

    Args:
        source: a folder with `metadata.jsonl`, `.csv` or `.parquet`, or such a file; audio is found relative to it.
        labels: names of the label columns.
        label_ranges: each label's scale (low, high), [0, 1] where not named. Labels come out on the unit scale,
            -100 where the corpus has none.

    Returns:
        Splits by name; rows ordered by conversation and turn, `file_name` made absolute.

    Raises:
        ValueError: the source, a column or a label is not what it must be; the message names it.
    """
    metadata = _find_metadata(Path(source))
    table = load_dataset(_READERS[metadata.suffix], data_files=str(metadata), split="train").to_pandas()
    for column in (*_REQUIRED, *labels):
        if column not in table.columns:
            close = difflib.get_close_matches(column, table.columns, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{metadata.name} has no column {column!r}, only {', '.join(table.columns)}{hint}")
    doubled = table.duplicated(["conversation_id", "turn"])
    if doubled.any():
        row = table[doubled].iloc[0]
        raise ValueError(f"{metadata.name} has turn {row['turn']} of conversation {row['conversation_id']!r} twice")
    for label in labels:
        table[label] = _to_unit_scale(table[label].to_numpy(float), label, (label_ranges or {}).get(label, (0, 1)), table)
    table["file_name"] = [str(metadata.parent / name) for name in table["file_name"]]
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

    An item is a dict: `waveforms` (a list of (samples,) arrays at 16 kHz), `labels` (turns, labels) on the unit scale,
    `conversation_id`, `turns` (their numbers).
    """

    def __init__(self, rows: Dataset, labels: Sequence[str], turns_per_item: int | None = None):
        self.rows = rows
        self.labels = list(labels)
        self.items: list[list[int]] = []
        previous = None
        for index, conversation in enumerate(rows["conversation_id"]):
            full = turns_per_item is not None and self.items and len(self.items[-1]) >= turns_per_item
            if conversation != previous or full:
                self.items.append([])
            self.items[-1].append(index)
            previous = conversation

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self.rows.select(self.items[index])
        starts = rows["start"] if "start" in rows.column_names else [None] * len(rows)
        ends = rows["end"] if "end" in rows.column_names else [None] * len(rows)
        return {
            "waveforms": [
                load_audio(name, start, end, downmix=True) for name, start, end in zip(rows["file_name"], starts, ends)
            ],
            "labels": np.array([rows[label] for label in self.labels], dtype=np.float32).T,
            "conversation_id": str(rows["conversation_id"][0]),
            "turns": list(rows["turn"]),
        }


def _find_metadata(source: Path) -> Path:
    candidates = [source] if source.is_file() else sorted(source.glob("metadata.*"))
    readable = [path for path in candidates if path.suffix in _READERS]
    if not readable:
        raise ValueError(
            f"{source} is no corpus: give a folder with metadata{', metadata'.join(_READERS)}, or such a file"
        )
    return readable[0]


def _to_unit_scale(values: np.ndarray, label: str, scale: Sequence[float], table: Any) -> np.ndarray:
    low, high = float(scale[0]), float(scale[1])
    unit = (values - low) / (high - low)
    given = np.isfinite(unit)
    off = given & ((unit < -_CLIP_SHARE) | (unit > 1 + _CLIP_SHARE))
    if off.any():
        row = table[off].iloc[0]
        raise ValueError(
            f"{label} of turn {row['turn']} of conversation {row['conversation_id']!r} is {values[off][0]:g}, outside its "
            f"scale [{low:g}, {high:g}]; name the corpus' scale in data.label_ranges"
        )
    clipped = given & ((unit < 0) | (unit > 1))
    if clipped.any():
        logger.warning("%d values of %s lie slightly outside [%g, %g] and were clipped", clipped.sum(), label, low, high)
    return np.where(given, np.clip(unit, 0, 1), MISSING_LABEL)
