"""Splits for a corpus that has none: no speaker (or session, or film) in two of them; and what others have in two."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

SHARE = 0.2  # of the turns, for each new split
# What is looked for in several splits, and why it may mean nothing.
SHARED = {"file_name": "", "conversation_id": " (unless each numbers its conversations anew)", "speaker": ""}


def split_off(rows: Dataset, column: str, names: Sequence[str]) -> list[Dataset]:
    """Divide rows so that no value of a column is in two parts, and no conversation either.

    Returns:
        What is left, then a part for each of `names`, with about `SHARE` of the turns; always the same parts.

    Raises:
        ValueError: no such column, a row without a value, or fewer groups than parts.
    """
    if column not in rows.column_names:
        raise ValueError(f"data.split_by: there is no column {column!r}; there are {', '.join(rows.column_names)}")
    if None in rows[column][:]:
        raise ValueError(f"data.split_by: {column} is empty in row {rows[column][:].index(None) + 1}")
    groups = _connected(rows["conversation_id"][:], rows[column][:])  # (rows,)
    sizes = np.bincount(groups)
    if len(sizes) <= len(names):
        raise ValueError(
            f"data.split_by: {', '.join(names)} cannot be split off by {column}: there are {len(sizes)} groups of rows "
            f"with no {column} and no conversation in common; data.split_by=conversation_id divides more finely"
        )
    order = np.random.default_rng(0).permutation(len(sizes)).tolist()
    part_of = np.zeros(len(sizes), dtype=int)
    for number in range(1, len(names) + 1):
        filled, wanted = 0, SHARE * len(groups)
        # Each later part, and what is left, needs a group too.
        while len(order) > len(names) - number + 1 and (not filled or filled + sizes[order[-1]] / 2 <= wanted):
            filled += sizes[order[-1]]
            part_of[order.pop()] = number
    return [rows.select(np.flatnonzero(part_of[groups] == number)) for number in range(len(names) + 1)]


def in_several_splits(splits: Mapping[str, Dataset], wanted: Sequence[str]) -> list[str]:
    """What one of the `wanted` splits has in common with another, so that its figures say less; a line for each
    kind."""
    lines = []
    for column, doubt in SHARED.items():
        found: dict[str, list[str]] = {}
        for split, rows in splits.items():
            for value in set(rows[column][:] if column in rows.column_names else ()) - {None}:
                found.setdefault(str(value), []).append(split)
        shared = {value: names for value, names in found.items() if len(names) > 1 and set(names) & set(wanted)}
        if shared:
            first = min(shared)
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            splits_of = " and ".join(sorted(shared[first]))
            lines.append(
                f"{column} {Path(first).name}{more} is in the splits {splits_of}{doubt}: what is measured there is not "
                "what the model does on others"
            )
    return lines


def _connected(conversations: Sequence, values: Sequence) -> np.ndarray:
    """(rows,) numbers, the same for rows that share a conversation or a value, directly or through other rows."""
    groups, before = pd.Series(range(len(values))), None
    while before is None or not groups.equals(before):
        before = groups
        for column in (conversations, values):
            groups = groups.groupby(list(column)).transform("min")
    return np.unique(groups, return_inverse=True)[1]
