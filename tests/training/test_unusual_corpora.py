"""Training and measuring on corpora that lack labels, are small, or have more in common than they should."""

import json

import pandas as pd
import pytest

from tests.support.programs import call_command, call_program
from tests.support.tiny_corpus import write_run

FINETUNE = "examples/run_finetune.py"
SHORT = "training.num_train_epochs=1"


def changed_corpus(corpus, folder, change):
    """The tiny corpus with rows that a function has changed, or left out by giving None."""
    folder.mkdir()
    rows = map(json.loads, (corpus / "metadata.jsonl").read_text().splitlines())
    rows = [change({**row, "file_name": str(corpus / row["file_name"])}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row is not None))
    return folder


@pytest.mark.parametrize("missing", [["valence"], ["valence", "arousal"]])
def test_a_test_split_without_labels_gets_predictions_and_what_can_be_measured(
    corpus, tmp_path, caplog, capsys, missing
):
    source = changed_corpus(
        corpus,
        tmp_path / "corpus",
        lambda row: row if row["split"] != "test" else {**row, **dict.fromkeys(missing)},
    )
    run = write_run(tmp_path / "run.yaml", source, tmp_path / "run")
    assert call_program(FINETUNE, run, SHORT) == 0
    assert "valence is missing in the split test (0 labelled turns)" in caplog.text
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    measured = {"ccc_arousal", "ccc"} if len(missing) == 1 else set()
    assert {name for name in results["test"] if name in ("ccc", "ccc_valence", "ccc_arousal")} == measured
    predictions = pd.read_csv(tmp_path / "run" / "predictions_test.csv")
    assert len(predictions) == 20  # a row a turn and label
    assert predictions["prediction"].notna().all()
    assert set(predictions["label"][predictions["reference"].isna()]) == set(missing)
    assert predictions["reference"].isna().sum() == 10 * len(missing)
    command = ["evaluate", "--model", tmp_path / "run" / "model", source, "--output", tmp_path / "measured"]
    assert call_command(*command) == 0
    again = pd.read_csv(tmp_path / "measured" / "predictions.csv")
    pd.testing.assert_frame_equal(again[predictions.columns], predictions)
    metrics = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert metrics.keys() == results["test"].keys()


def test_fewer_conversations_than_a_batch_holds_are_learnt_from(corpus, tmp_path):
    source = changed_corpus(
        corpus,
        tmp_path / "corpus",
        lambda row: row if row["split"] != "train" or row["conversation_id"] in ("train_2", "train_3") else None,
    )
    run = write_run(tmp_path / "run.yaml", source, tmp_path / "run")
    options = ["training.max_seconds_per_batch=null", "training.per_device_train_batch_size=8"]
    assert call_program(FINETUNE, run, SHORT, *options) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_what_is_in_two_splits_is_said(corpus, tmp_path, caplog):
    def change(row):
        number = row["conversation_id"].split("_")[1]
        file = "train_0_0.wav" if row["split"] == "validation" and number == "0" else row["file_name"]
        return {**row, "conversation_id": number, "speaker": "anna", "file_name": str(corpus / file)}

    source = changed_corpus(corpus, tmp_path / "corpus", change)
    run = write_run(tmp_path / "run.yaml", source, tmp_path / "run")
    assert call_program(FINETUNE, run, SHORT, "training.lr_scheduler_type=constant") == 0
    said = [record.message for record in caplog.records if " is in the splits " in record.message]
    assert [line.split(":")[0] for line in said] == [
        "file_name train_0_0.wav is in the splits train and validation",
        "conversation_id 0 and 4 more is in the splits test and train and validation "
        "(unless each numbers its conversations anew)",
        "speaker anna is in the splits test and train and validation",
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("training.lr_scheduler_type=cosin", "lr_scheduler_type is 'cosin'.*did you mean cosine?"),
        ("training.report_to=[no_such_tracker]", "report_to names no_such_tracker; the trackers installed here are"),
        ("model.pretrained_speech_encoder=outputs/wavlmm", "outputs/wavlmm"),
        ("model.pretrained_speech_encoder=/no/such/folder", "/no/such/folder is neither an existing folder nor a name"),
        ("model.pretrained_speech_encoder={corpus}", "holds no config.json, so it is no saved model"),
    ],
)
def test_a_name_that_is_wrong_is_one_sentence_before_anything_is_done(corpus, tmp_path, capsys, option, message):
    run = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    (tmp_path / "outputs").mkdir()
    option = option.replace("outputs/", f"{tmp_path}/outputs/").format(corpus=corpus)
    assert call_program(FINETUNE, run, option) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run_finetune.py: ")
    assert pd.Series([line]).str.contains(message).all(), line
    assert not (tmp_path / "run").exists()
