"""The `ccc` metric of a table of predictions."""

import numpy as np
import pandas as pd

from .ccc.ccc import CCC, MISSING_LABEL

COLUMNS = ("conversation_id", "turn", "label", "reference", "prediction")


def metrics_of_table(table: pd.DataFrame) -> dict[str, float]:
    """CCC, Pearson, RMSE and MAE of a table with `COLUMNS`, one row a turn and label: for each label and as means, with
    95 % intervals over conversations, the same numbers as training gives. Labels with fewer than two references are
    left out.

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
    given = table.groupby("label", sort=False)["reference"].count()
    labels = [label for label in dict.fromkeys(table["label"]) if given[label] >= 2]
    if not labels:
        raise ValueError("no label has two references, so nothing can be measured")
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
