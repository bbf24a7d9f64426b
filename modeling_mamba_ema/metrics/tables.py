"""The `ccc` metric of a predictions file.

    python -m modeling_mamba_ema.metrics outputs/evaluation/predictions.csv

Takes what training and evaluate_checkpoint.py write, or any CSV or Parquet with the columns conversation_id, turn,
label, reference (empty where missing) and prediction, one row a turn and label. Prints the metrics as JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from .ccc.ccc import CCC, MISSING_LABEL

COLUMNS = ("conversation_id", "turn", "label", "reference", "prediction")


def metrics_of_table(table: pd.DataFrame) -> dict[str, float]:
    """
    Args:
        table: with `COLUMNS`, one row a turn and label.

    Returns:
        CCC, Pearson, RMSE and MAE for each label and as means, with 95 % intervals over conversations: the same numbers
        as training and evaluate_checkpoint.py give.

    Raises:
        ValueError: columns or rows that are missing or doubled, or a prediction that is not finite.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(f"there is no column {', '.join(missing)}; needed are {', '.join(COLUMNS)}")
    keys = ["conversation_id", "turn"]
    if table.duplicated([*keys, "label"]).any():
        turn = table[table.duplicated([*keys, "label"])].iloc[0]
        raise ValueError(f"turn {turn['turn']} of conversation {turn['conversation_id']!r} has {turn['label']} twice")
    labels = list(dict.fromkeys(table["label"]))
    turns = table.drop_duplicates(keys)[keys]
    wide = table.set_index([*keys, "label"])[["prediction", "reference"]].unstack("label")
    wide = wide.reindex(pd.MultiIndex.from_frame(turns))
    predictions = wide["prediction"][labels].to_numpy(np.float64)  # (turns, labels)
    references = wide["reference"][labels].to_numpy(np.float64)
    # A bootstrap draws conversations by their place in the file, as training draws them by their place in the corpus.
    conversations = pd.factorize(turns["conversation_id"])[0]
    labelled = np.isfinite(references).any(axis=1)
    return CCC().compute(
        predictions=predictions[labelled],
        references=np.nan_to_num(references[labelled], nan=MISSING_LABEL),
        label_names=labels,
        conversation_ids=conversations[labelled].tolist(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_mamba_ema.metrics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", type=Path, help="a .csv or .parquet file")
    path = parser.parse_args().predictions
    if path.suffix not in (".csv", ".parquet"):
        parser.error(f"{path.name} must end with .csv or .parquet")
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        print(json.dumps(metrics_of_table(table), indent=2))
    except (ValueError, OSError) as error:
        sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    main()
