"""The metrics of a predictions file are those of the run that wrote it."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from modeling_mamba_ema.metrics.__main__ import metrics_of_table

from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.training import ccc_of_predictions, prediction_table, save_predictions
from tests.test_training import LABELS, make_trainer
from tests.tiny_corpus import ROOT, environment, write_corpus


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Metrics of Trainer, and the predictions file of the same evaluation; some labels are missing."""
    folder = tmp_path_factory.mktemp("measured")
    corpus = write_corpus(folder / "corpus")
    lines = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    lines = [{**row, "valence": None if i % 7 == 0 else row["valence"]} for i, row in enumerate(lines)]
    lines = [{**row, "arousal": None if i % 14 == 0 else row["arousal"]} for i, row in enumerate(lines)]
    (corpus / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = ConversationDataset(load_emotion_dataset(corpus, LABELS)["train"], LABELS)
    trainer = make_trainer(folder, dataset)
    trainer.compute_metrics = ccc_of_predictions(LABELS, intervals=True)
    predicted = trainer.predict(dataset)
    table = prediction_table(predicted.predictions, dataset)
    for name in ("predictions.csv", "predictions.parquet"):
        save_predictions(table, folder / name)
    return folder, predicted.metrics


@pytest.mark.parametrize("name", ["predictions.csv", "predictions.parquet"])
def test_the_command_line_gives_the_numbers_of_trainer(measured, name):
    folder, metrics = measured
    done = subprocess.run(
        [sys.executable, "-m", "modeling_mamba_ema.metrics", str(folder / name)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert {"ccc", "ccc_valence_low", "pearson_arousal", "rmse", "mae_valence", "num_conversations"} <= set(printed)
    for key, value in printed.items():
        assert value == pytest.approx(metrics[f"test_{key}"], abs=1e-6), key


def table():
    random = np.random.default_rng(0)
    keys = [(c, t, label) for c in "ab" for t in range(5) for label in LABELS]
    made = pd.DataFrame(keys, columns=["conversation_id", "turn", "label"])
    return made.assign(reference=random.random(20), prediction=random.random(20))


def test_the_order_of_rows_within_a_conversation_does_not_matter():
    turned = pd.concat([table()[:10].iloc[::-1], table()[10:].iloc[::-1]])
    expected = metrics_of_table(table())
    assert metrics_of_table(turned) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop(columns="label"), "there is no column label"),
        (lambda rows: pd.concat([rows, rows[:1]]), "turn 0 of conversation 'a' has valence twice"),
        (lambda rows: rows[1:], "predictions are NaN"),
        (lambda rows: rows.assign(prediction=np.nan), "predictions are NaN"),
    ],
)
def test_a_file_that_cannot_be_measured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        metrics_of_table(change(table()))
