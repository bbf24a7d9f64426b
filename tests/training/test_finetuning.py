"""The fine-tuning program, run as people run it: in one process, and in two by `accelerate launch`."""

import json
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from modeling_mamba_ema.data.dataset import ConversationDataset
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.metrics.tables import metrics_of_table
from tests.support.models import NO_DROPOUT
from tests.support.programs import Forked, call_program, launch_two_processes
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import LABELS, write_run

# Dropout draws its own numbers in each process; everything else is to be the same.
ENCODER = "model.params.speech_encoder_config"
ALIKE = ["model.params.dropout=0.0", "training.num_train_epochs=2", *(f"{ENCODER}.{name}=0.0" for name in NO_DROPOUT)]
# Ways to make batches, each with what a process gets when there are one and two.
BATCHES = {
    "by seconds": ([], []),
    "by number": tuple(
        [f"training.per_device_train_batch_size={size}", "training.max_seconds_per_batch=null", "data.turns_per_item=3"]
        for size in (4, 2)
    ),
}
# The command `evaluate`, with the items that each process reads written down.
WATCHED_EVALUATION = """
import os, sys
from modeling_mamba_ema.__main__ import main
from modeling_mamba_ema.data.dataset import ConversationDataset
read = ConversationDataset.__getitem__
def watched(self, index):
    open(sys.argv[1], "a").write(f"{os.environ['RANK']} {index}\\n")
    return read(self, index)
ConversationDataset.__getitem__ = watched
sys.exit(main(sys.argv[2:]))
"""


class Runs:
    """Folders of runs, by how their batches were made and by their number of processes, and of an evaluation."""

    def __init__(self, folder, corpus):
        self.folder, self.read, self.measured = folder, folder / "read", folder / "measured"
        for batches, options in BATCHES.items():
            assert call_program(*self.finetune(corpus, batches, 1, options[0])) == 0
        script = folder / "watched.py"
        script.write_text(WATCHED_EVALUATION)
        model = self.run("by seconds", 1) / "model"
        evaluate = ["evaluate", "--model", model, corpus, "--output", self.measured, "--format", "parquet"]
        launch_two_processes(
            folder,
            *(self.finetune(corpus, batches, 2, options[1]) for batches, options in BATCHES.items()),
            [str(word) for word in (script, self.read, *evaluate, "--batch-size", "1")],
        )

    def run(self, batches, processes):
        return self.folder / f"{batches} {processes}"

    def finetune(self, corpus, batches, processes, options):
        run = self.run(batches, processes)
        return [FINETUNE, str(write_run(self.folder / f"{run.name}.yaml", corpus, run)), *ALIKE, *options]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    return Runs(tmp_path_factory.mktemp("runs"), corpus)


@pytest.mark.promise("B-15")
@pytest.mark.parametrize("batches", BATCHES)
def test_two_processes_train_the_weights_of_one_and_measure_as_it_does(runs, batches):
    one, two = (runs.run(batches, processes) for processes in (1, 2))
    weights, expected = (load_file(run / "model" / "model.safetensors") for run in (two, one))
    for name, value in expected.items():
        # Softmax does not see the bias of the scores: its gradient is rounding noise, which Adam scales up.
        if not name.endswith("speech_encoder.attention.bias"):
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0, msg=name)
    found, expected = (json.loads((run / "results.json").read_text())["test"] for run in (two, one))
    # Correlations divide rounding by the predictions' spread, which is small here.
    assert {name: found[name] for name in found if "pearson" not in name} == pytest.approx(
        {name: expected[name] for name in expected if "pearson" not in name}, abs=1e-5
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_leaves_a_model_its_results_and_a_prediction_for_every_turn(runs, splits, processes):
    run = runs.run("by seconds", processes)
    assert {"run_configuration.yaml", "results.json", "learning_curve.png", "model"} <= {p.name for p in run.iterdir()}
    assert not list((run / "model").glob("*.bin"))
    table = pd.read_csv(run / "predictions_test.csv")
    columns = ["file_name", "conversation_id", "turn", "position", "label", "reference", "prediction"]
    assert list(table.columns) == columns
    assert all(os.path.isfile(name) for name in table["file_name"])
    assert len(table) == 10 * len(LABELS)
    assert table["prediction"].between(0, 1).all()
    results = json.loads((run / "results.json").read_text())
    for split in ("validation", "test"):
        assert results[split]["num_turns"] == len(splits[split])
        for name in ("ccc", "ccc_valence", "ccc_arousal"):
            assert results[split][f"{name}_low"] <= results[split][f"{name}_high"]


def test_a_saved_model_is_measured_by_two_processes_each_its_share_as_in_its_run_by_one(runs):
    run = runs.run("by seconds", 1)
    assert sorted(runs.read.read_text().splitlines()) == ["0 0", "0 2", "1 1", "1 3"]
    table, before = pd.read_parquet(runs.measured / "predictions.parquet"), pd.read_csv(run / "predictions_test.csv")
    pd.testing.assert_frame_equal(table, before, atol=1e-6, rtol=0)
    metrics = json.loads((runs.measured / "metrics.json").read_text())
    # A correlation divides the predictions' rounding by their spread, which is small here: it is held to be that of
    # these predictions, which are the same as before; everything else is directly the same.
    expected = json.loads((run / "results.json").read_text())["test"]
    expected |= {name: value for name, value in metrics_of_table(table).items() if name.startswith("pearson")}
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert (runs.measured / "predicted_against_true.png").stat().st_size > 1000
    assert (runs.measured / "error_by_position.png").stat().st_size > 1000


def test_the_log_has_a_line_of_metrics_an_epoch_and_the_card_the_command_that_was_given(corpus, tmp_path):
    configuration = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    run = yaml.safe_load(configuration.read_text())
    run["training"] = {name: value for name, value in run["training"].items() if "_st" not in name}  # by epochs
    configuration.write_text(yaml.safe_dump(run))
    given = ["training.num_train_epochs=2", "model.params.label_ranges={valence: [0, 1]}"]
    program = Forked(FINETUNE, configuration, *given)
    assert program.wait() == 0, program.printed
    log = program.printed
    metrics = r"epoch [12]: CCC valence \S+, arousal \S+, mean \S+; RMSE \S+ on a scale from 0 to 1"
    assert len(re.findall(metrics, log)) == 2
    assert "eval_" not in log  # no dictionaries of metrics
    assert "epoch 2.0, loss" in log  # beside the progress bar
    model = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert torch.isfinite(model(torch.randn(1, 4_000)).logits).all()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"{results['test']['ccc_arousal']:.3f} ({results['test']['ccc_arousal_low']:.3f} to" in card
    assert FINETUNE in card
    assert "training.num_train_epochs=2 'model.params.label_ranges={valence: [0, 1]}'" in card
    saved = yaml.safe_load((tmp_path / "run" / "run_configuration.yaml").read_text())
    assert saved["training"]["num_train_epochs"] == 2


def test_the_model_is_saved_before_the_test_split_is_touched_and_may_have_other_labels(corpus, tmp_path, monkeypatch):
    lines = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    rows = [{**line, "file_name": str(corpus / line["file_name"]), "dominance": line["valence"]} for line in lines]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = write_run(tmp_path / "run.yaml", tmp_path, tmp_path / "run")
    read = ConversationDataset.__getitem__

    def fail_on_the_test_split(self, index):
        if str(self.rows[0]["file_name"]).startswith(str(corpus / "test")):
            raise OSError("the disk with the test split is gone")
        return read(self, index)

    monkeypatch.setattr(ConversationDataset, "__getitem__", fail_on_the_test_split)
    options = ["training.num_train_epochs=1", "model.params.id2label={0: dominance, 1: arousal}"]
    assert call_program(FINETUNE, run, *options) == 1
    assert not (tmp_path / "run" / "results.json").exists()
    assert AutoModel.from_pretrained(tmp_path / "run" / "model").config.labels == ["dominance", "arousal"]


def test_a_corpus_of_two_speakers_trains_a_context_of_each_which_the_tracker_gives_by_name(corpus, tmp_path):
    lines = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    rows = [
        {**line, "file_name": str(corpus / line["file_name"]), "speaker": f"{line['split']}_{'aabb'[line['turn']]}"}
        for line in lines
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = write_run(tmp_path / "run.yaml", tmp_path, tmp_path / "run")
    options = ["training.num_train_epochs=1", "model.params.context_scope=speaker", "model.params.max_speakers"]
    options += ["training.turns_per_chunk=2"]  # evaluated in chunks
    assert call_program(FINETUNE, run, *options[:2], f"{options[2]}=1") == 1  # two speakers, room for one
    assert call_program(FINETUNE, run, *options[:2], f"{options[2]}=2", options[3]) == 0
    tracker = EmotionTracker.from_pretrained(tmp_path / "run" / "model")
    table = pd.read_csv(tmp_path / "run" / "predictions_test.csv")
    names = {row["file_name"]: row["speaker"] for row in rows}
    for _, conversation in table[table["label"] == "arousal"].groupby("conversation_id"):
        tracker.reset()
        heard = [tracker.update(file, speaker=names[file]).values["arousal"] for file in conversation["file_name"]]
        np.testing.assert_allclose(heard, conversation["prediction"], atol=2e-5)
