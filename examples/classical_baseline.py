"""What a classical system reaches on a corpus: openSMILE's eGeMAPS functionals and a support vector regressor.

    pip install '.[train,baseline]'
    python examples/classical_baseline.py data/demo
    python examples/classical_baseline.py data/demo --predictions outputs/demo/predictions_test.csv
    python examples/classical_baseline.py data/emodb --leave-speakers-out 2 \
        --predictions 'outputs/emodb/comparison/trainings/attention-none-seed0-*/test.parquet'

88 functionals an utterance (Eyben et al. 2016, "The Geneva Minimalistic Acoustic Parameter Set"), standardised with the
training split's moments, and an SVR for each label (C 1, epsilon 0.05) on the unit scale: no context, nothing is tuned.
Splits, metric and intervals are those of training and `mamba-ema evaluate`, so that a model's predictions can be
compared turn by turn: does the network earn its cost?

openSMILE is free for research and education; its licence forbids commercial use (https://www.audeering.com/opensmile).
"""

import argparse
import glob
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, concatenate_datasets
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from tqdm import tqdm

from modeling_mamba_ema.audio_files import load_audio
from modeling_mamba_ema.ccc_loss import MISSING_LABEL
from modeling_mamba_ema.data.dataset import load_emotion_dataset
from modeling_mamba_ema.data.utterances import utterances_of
from modeling_mamba_ema.feature_extraction_mamba_ema import SAMPLING_RATE
from modeling_mamba_ema.metrics import bootstrap_intervals, concordance_cc, paired_bootstrap_difference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a folder with metadata, or a table, in the normal form")
    parser.add_argument("--labels", nargs="+", default=["valence", "arousal"])
    parser.add_argument(
        "--label-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=(0, 1),
        help="the labels' own scale, where no corpus.json names it (0 1)",
    )
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument(
        "--leave-speakers-out",
        type=int,
        metavar="N",
        help="instead of splits: N speakers are left out in turn, and intervals come from drawing speakers",
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        default=[],
        metavar="FILE",
        help="a model's predictions of the same turns, to compare with; several: trainings of other seeds, and "
        "their ensemble is shown, too; a pattern with *: files of folds, which are one training together",
    )
    parser.add_argument("--output", type=Path, help="CSV to write the baseline's predictions to")
    options = parser.parse_args()

    # 1. corpus, and the predictions to compare with
    scales = dict.fromkeys(options.labels, options.label_range)
    splits = load_emotion_dataset(options.corpus, options.labels, scales)
    if options.leave_speakers_out is None:
        for name in (options.train_split, options.test_split):
            if name not in splits:
                raise ValueError(f"{options.corpus} has no split {name}; there are {', '.join(splits)}")
        parts = [splits[options.train_split], splits[options.test_split]]
        rows = concatenate_datasets(parts)
        folds = np.repeat([-1, 0], [len(part) for part in parts])  # -1: learnt from in every fold
        groups = np.array([str(name) for name in rows["conversation_id"]])
    else:
        rows = concatenate_datasets(list(splits.values()))
        groups = np.array([str(name) for name in rows["speaker"]])
        folds = speaker_folds(groups, options.leave_speakers_out)
    tested = folds >= 0
    references = np.array([rows[label] for label in options.labels]).T  # (turns, labels)
    table = reference_table(rows.select(np.flatnonzero(tested)), options.labels)
    models = [read_predictions(pattern, table, options.labels) for pattern in options.predictions]

    # 2. features, and one regressor a label and fold
    predictions = predict_folds(egemaps(rows), references, folds)[tested]
    references, conversations = references[tested], groups[tested].tolist()
    if options.output is not None:
        table.assign(prediction=predictions.T.ravel()).to_csv(options.output, index=False, float_format="%.9g")

    # 3. CCC, and the difference to a model's where its predictions are given
    kind = "conversations" if options.leave_speakers_out is None else "speakers"
    print(f"{len(predictions)} turns; 95 % intervals by drawing {len(set(conversations))} {kind} again")
    several = {"ensemble of the models": [np.mean(models, axis=0)]} if len(models) > 1 else {}
    singles = [(title, model) for title, (model,) in several.items()]
    for title, predicted in [("eGeMAPS + SVR", predictions), *zip(options.predictions, models), *singles]:
        low, high = bootstrap_intervals(predicted, references, conversations)
        print_ccc(title, options.labels, ccc_of(predicted, references), low, high)
    for title, group in ({"model": models, **several} if models else {}).items():
        difference = np.mean([ccc_of(model, references) for model in group], axis=0) - ccc_of(predictions, references)
        low, high = paired_bootstrap_difference(group, [predictions] * len(group), references, conversations)
        print_ccc(f"{title} - eGeMAPS + SVR (paired)", options.labels, difference, low, high)
    return 0


def egemaps(rows: Dataset) -> np.ndarray:
    """(turns, 88) functionals of eGeMAPSv02."""
    import opensmile

    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    features = []
    for utterance in tqdm(utterances_of(rows), desc="eGeMAPS", disable=None):
        waveform = load_audio(utterance.file_name, utterance.start, utterance.end)
        features.append(smile.process_signal(waveform, SAMPLING_RATE).to_numpy()[0])
    return np.stack(features)


def speaker_folds(speakers: np.ndarray, left_out: int) -> np.ndarray:
    """(turns,) the fold in which each turn is tested; of the sorted speakers, fold i of n has those at i, i + n ..."""
    names = sorted(set(speakers))
    if not 1 <= left_out < len(names) or len(names) % left_out:
        raise ValueError(f"--leave-speakers-out is {left_out}, but must divide the number of speakers, {len(names)}")
    number_of_folds = len(names) // left_out
    fold = {name: number % number_of_folds for number, name in enumerate(names)}
    return np.array([fold[name] for name in speakers])


def predict_folds(features: np.ndarray, references: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(turns, labels) predictions by models that have not seen the turn's fold; NaN in fold -1."""
    predictions = np.full(references.shape, np.nan)
    for fold in range(folds.max() + 1):
        for column in range(references.shape[1]):
            learnt = (folds != fold) & (references[:, column] != MISSING_LABEL)
            model = make_pipeline(StandardScaler(), SVR(C=1.0, epsilon=0.05))
            model.fit(features[learnt], references[learnt, column])
            predictions[folds == fold, column] = model.predict(features[folds == fold])
    return predictions


def reference_table(rows: Dataset, labels: list[str]) -> pd.DataFrame:
    """One row a turn and label, as in a predictions file; all turns of a label, then those of the next."""
    turns = pd.DataFrame({"conversation_id": [str(name) for name in rows["conversation_id"]], "turn": rows["turn"]})
    tables = [turns.assign(label=label, reference=np.asarray(rows[label])) for label in labels]
    return pd.concat(tables, ignore_index=True).replace({"reference": {MISSING_LABEL: np.nan}})


def read_predictions(pattern: str, table: pd.DataFrame, labels: list[str]) -> np.ndarray:
    """(turns, labels) of files with the columns conversation_id, turn, label and prediction, in the table's order."""
    keys = ["conversation_id", "turn", "label"]
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise ValueError(f"there is no file {pattern}")
    read = [pd.read_parquet(path) if path.endswith(".parquet") else pd.read_csv(path) for path in paths]
    theirs = pd.concat(read).astype({"conversation_id": str})
    missing = {*keys, "prediction"} - set(theirs.columns)
    if missing:
        raise ValueError(f"{pattern} lacks the column {', '.join(sorted(missing))}")
    together = table[keys].merge(theirs[[*keys, "prediction"]], on=keys, how="left", validate="one_to_one")
    absent = int(together["prediction"].isna().sum())
    if absent:
        raise ValueError(
            f"{pattern} has no prediction for {absent} of the {len(together)} turns and labels of this test"
        )
    return together["prediction"].to_numpy().reshape(len(labels), -1).T


def ccc_of(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """(labels + 1,): of each label, and their mean."""
    there = references != MISSING_LABEL
    columns = [concordance_cc(p[t], r[t]) for p, r, t in zip(predictions.T, references.T, there.T)]
    return np.array([*columns, np.mean(columns)])


def print_ccc(title: str, labels: list[str], values: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    cells = [f"{name} {v:.3f} [{a:.3f}, {b:.3f}]" for name, v, a, b in zip([*labels, "mean"], values, low, high)]
    print(f"{title}: CCC {', '.join(cells)}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:  # what its reader can mend
        sys.exit(f"classical_baseline.py: {error}")
