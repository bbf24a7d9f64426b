"""The metrics of a predictions file are those of the run that wrote it."""

import json

import numpy as np
import pandas as pd
import pytest

from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.metrics.tables import metrics_of_table
from modeling_mamba_ema.training import describe_metrics, measure, save_predictions
from tests.support.models import tiny_config
from tests.support.programs import call_command
from tests.support.tiny_corpus import LABELS, make_trainer, write_corpus


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
    trainer.model.config.label_ranges = {"arousal": [1, 7]}
    metrics, table = measure(trainer, dataset, trainer.model.config)
    for name in ("predictions.csv", "predictions.parquet"):
        save_predictions(table, folder / name)
    return folder, metrics


@pytest.mark.parametrize("name", ["predictions.csv", "predictions.parquet"])
def test_the_command_line_gives_the_numbers_of_trainer(measured, name, capsys):
    folder, metrics = measured
    assert call_command("metrics", folder / name) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"ccc", "ccc_valence_low", "pearson_arousal", "rmse", "mae_valence", "num_conversations"} <= set(printed)
    for key, value in printed.items():
        assert value == pytest.approx(metrics[key], abs=1e-6), key


def test_a_single_conversation_has_no_interval(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(
        "conversation_id,turn,label,reference,prediction\na,0,valence,0,0\na,1,valence,1,1\n"
    )
    assert call_command("metrics", tmp_path / "a.csv") == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) >= {"ccc_valence", "num_conversations"}
    assert "ccc_valence_low" not in printed
    config = tiny_config(id2label={0: "valence"})
    assert "CCC valence      1.000\n" in describe_metrics("test", printed, config)


def test_predictions_name_their_file_and_are_on_the_unit_scale_and_on_the_labels_own(measured):
    table = pd.read_csv(measured[0] / "predictions.csv")
    assert table["prediction"].between(0, 1).all()
    arousal, valence = table[table["label"] == "arousal"], table[table["label"] == "valence"]
    assert (set(arousal["scale"]), set(valence["scale"])) == ({"1 to 7"}, {"0 to 1"})
    np.testing.assert_allclose(arousal["prediction_value"], 1 + 6 * arousal["prediction"], rtol=1e-8)
    np.testing.assert_allclose(arousal["reference_value"], 1 + 6 * arousal["reference"], rtol=1e-8)
    np.testing.assert_array_equal(valence["prediction_value"], valence["prediction"])
    rows = [json.loads(line) for line in (measured[0] / "corpus" / "metadata.jsonl").read_text().splitlines()]
    files = {(row["conversation_id"], row["turn"]): row["file_name"] for row in rows}
    assert all(row.file_name.endswith(files[row.conversation_id, row.turn]) for row in table.itertuples())


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
