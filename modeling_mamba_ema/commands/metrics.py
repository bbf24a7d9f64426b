"""The metrics of a predictions file.

    mamba-ema metrics outputs/evaluation/predictions.csv

Takes what training and `mamba-ema evaluate` write, or any CSV or Parquet with the columns conversation_id, turn, label,
reference (empty where missing) and prediction, one row a turn and label. Prints CCC, Pearson, RMSE and MAE as JSON, for
each label and as means, on the scale of the file: 0 to 1 in files of this package.
"""

import argparse
from pathlib import Path

HELP = "the metrics of a predictions file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", type=Path, help="a .csv or .parquet file")


def run(options: argparse.Namespace) -> int:
    import pandas as pd

    from ..data.text_files import json_text
    from ..metrics.tables import metrics_of_table

    path = options.predictions
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path.name} must end with .csv or .parquet")
    try:
        print(json_text(metrics_of_table(readers[path.suffix](path))))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return 0
