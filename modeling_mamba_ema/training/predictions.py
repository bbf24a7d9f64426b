"""Predictions as a table that people read elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ..ccc_loss import MISSING_LABEL
from ..data.dataset import ConversationDataset


def prediction_table(predictions: np.ndarray, dataset: ConversationDataset) -> pd.DataFrame:
    """One row a turn and label.

    Args:
        predictions: (items, turns, labels) on the unit scale, in the dataset's order; padding is ignored.
        dataset: of whole conversations or windows.

    Returns:
        Columns `conversation_id`, `turn`, `position` (0 is the conversation's first turn), `label`, `reference` (NaN
        where the corpus has none), `prediction`.
    """
    rows = dataset.rows
    conversations, turns = list(rows["conversation_id"]), list(rows["turn"])
    references = np.array([rows[label] for label in dataset.labels], dtype=np.float64).T  # (rows, labels)
    records, position, previous = [], 0, None
    for item, indices in enumerate(dataset.items):
        for place, index in enumerate(indices):
            position = position + 1 if conversations[index] == previous else 0
            previous = conversations[index]
            for column, label in enumerate(dataset.labels):
                reference = references[index, column]
                records.append(
                    {
                        "conversation_id": conversations[index],
                        "turn": turns[index],
                        "position": position,
                        "label": label,
                        "reference": np.nan if reference == MISSING_LABEL else reference,
                        "prediction": float(predictions[item, place, column]),
                    }
                )
    return pd.DataFrame.from_records(records)


def save_predictions(table: pd.DataFrame, path: Path) -> None:
    """Write as CSV or Parquet, as the name ends."""
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        raise ValueError(f"{path.name} must end with .csv or .parquet")
