"""The trainer: batches, optimizer groups, faults that stop it, and the same result on one process and two."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.metrics.tables import metrics_of_table
from modeling_mamba_ema.training import MambaEMATrainer, StopOnSignal, why_incomplete
from tests.support.models import tiny_model
from tests.support.tiny_corpus import LABELS, ROOT, environment, make_trainer, write_run


@pytest.fixture(scope="module")
def train_split(corpus):
    return ConversationDataset(load_emotion_dataset(corpus, LABELS)["train"], LABELS)


# batches


# optimizer


# faults


class WithBadLabel(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset, self.rows, self.items = dataset, dataset.rows, dataset.items

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        item = self.dataset[index]
        if index == 0:
            item["labels"] = np.full_like(item["labels"], np.nan)
        return item


@pytest.mark.promise("C-07")
def test_a_nan_label_stops_training_and_names_the_conversations(tmp_path, train_split):
    trainer = make_trainer(tmp_path, WithBadLabel(train_split))
    with pytest.raises(ValueError, match=r"NaN.*conversations of the batch: .*train_\d"):
        trainer.train()


@pytest.mark.promise("C-07")
def test_nan_weights_stop_training(tmp_path, train_split):
    model = tiny_model()
    with torch.no_grad():
        model.speech_encoder.attention.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"conversations of the batch: .*train_\d"):
        make_trainer(tmp_path, train_split, model).train()


class SendSignal(TrainerCallback):
    def __init__(self, number):
        self.number = number
        self.evaluations = 0

    def on_step_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), self.number)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1


@pytest.mark.promise(
    "C-08",
    "SIGTERM or Ctrl-C leaves one complete checkpoint and 143 or 130, and the run goes on to the same weights",
    "bitwise",
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_within_an_epoch_saves_one_complete_checkpoint_and_evaluates_nothing(
    tmp_path, train_split, number, code
):
    trainer = make_trainer(tmp_path, train_split, save_strategy="epoch", eval_strategy="epoch", max_steps=10)
    stop, sender = StopOnSignal(), SendSignal(number)
    trainer.add_callback(stop)
    trainer.add_callback(sender)
    before = signal.getsignal(number)
    trainer.train()
    assert (stop.received, stop.exit_code) == (number, code)
    assert trainer.state.global_step == 1
    assert sender.evaluations == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-1"]
    assert why_incomplete(tmp_path / "checkpoint-1") is None
    assert signal.getsignal(number) == before


def test_ctrl_c_a_second_time_ends_at_once(tmp_path, train_split):
    trainer = make_trainer(tmp_path, train_split, max_steps=10)
    before = signal.getsignal(signal.SIGINT)
    for callback in (StopOnSignal(), SendSignal(signal.SIGINT), SendSignal(signal.SIGINT)):
        trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) == before


def test_other_arguments_than_those_of_this_package_are_refused(tmp_path):
    with pytest.raises(TypeError, match="TrainingArguments, but must be MambaEMATrainingArguments"):
        MambaEMATrainer(tiny_model(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


# whole runs, as a user starts them


def launch(processes, *program):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = {1: "cpu", 2: "cpu_two_processes"}[processes]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [f"configuration/accelerate/{name}.yaml", "--main_process_port", str(port)]
    command += program
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def one_and_two_processes(tmp_path_factory, corpus):
    runs = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        configuration = write_run(folder / "run.yaml", corpus, folder / "run")
        # Dropout draws its own numbers in each process; everything else is to be the same.
        encoder = "model.params.speech_encoder_config"
        dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
        overrides = ["model.params.dropout=0.0", "training.num_train_epochs=2"]
        overrides += [f"{encoder}.{name}=0.0" for name in dropouts]
        launch(processes, "examples/run_finetune.py", str(configuration), *overrides)
        runs[processes] = folder / "run"
    return runs


@pytest.mark.promise("B-15")
def test_two_processes_train_the_weights_of_one(one_and_two_processes):
    one, two = (load_file(run / "model" / "model.safetensors") for run in one_and_two_processes.values())
    for name, weights in one.items():
        # Softmax does not see the bias of the scores: its gradient is rounding noise, which Adam scales up.
        if not name.endswith("speech_encoder.attention.bias"):
            torch.testing.assert_close(two[name], weights, atol=1e-5, rtol=0, msg=name)


def test_a_run_leaves_what_is_promised(one_and_two_processes):
    for run in one_and_two_processes.values():
        names = {path.name for path in run.iterdir()}
        assert {"run_configuration.yaml", "results.json", "learning_curve.png", "model"} <= names
        assert not list((run / "model").glob("*.bin"))
        table = pd.read_csv(run / "predictions_test.csv")
        columns = ["file_name", "conversation_id", "turn", "position", "label", "reference", "prediction"]
        assert list(table.columns) == columns
        assert all(os.path.isfile(name) for name in table["file_name"])
        assert len(table) == 10 * len(LABELS)
        assert table["prediction"].between(0, 1).all()


# The command, with the items that each process reads written down.
WATCHED_EVALUATION = """
import os, sys
from modeling_mamba_ema.__main__ import main
from modeling_mamba_ema.data.dataset import ConversationDataset
read = ConversationDataset.__getitem__
def watched(self, index):
    open(os.environ["READ"], "a").write(f"{os.environ['RANK']} {index}\\n")
    return read(self, index)
ConversationDataset.__getitem__ = watched
sys.exit(main(sys.argv[1:]))
"""


def test_a_saved_model_is_measured_by_two_processes_each_its_share_as_in_its_run_by_one(
    one_and_two_processes, corpus, tmp_path, monkeypatch
):
    run = one_and_two_processes[1]
    monkeypatch.setenv("READ", str(tmp_path / "read"))
    (tmp_path / "watched.py").write_text(WATCHED_EVALUATION)
    launch(2, str(tmp_path / "watched.py"), "evaluate", "--model", str(run / "model"), str(corpus), "--output",
           str(tmp_path), "--format", "parquet", "--batch-size", "1")  # fmt: skip
    assert sorted((tmp_path / "read").read_text().splitlines()) == ["0 0", "0 2", "1 1", "1 3"]
    table, before = pd.read_parquet(tmp_path / "predictions.parquet"), pd.read_csv(run / "predictions_test.csv")
    pd.testing.assert_frame_equal(table, before, atol=1e-6, rtol=0)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    # A correlation divides the predictions' rounding by their spread, which is small here: it is held to be that of
    # these predictions, which are the same as before; everything else is directly the same.
    expected = json.loads((run / "results.json").read_text())["test"]
    expected |= {name: value for name, value in metrics_of_table(table).items() if name.startswith("pearson")}
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / "predicted_against_true.png").stat().st_size > 1000
    assert (tmp_path / "error_by_position.png").stat().st_size > 1000


def weights_after(tmp_path, dataset, seed, workers=0):
    model = tiny_model(dropout=0.2)
    trainer = make_trainer(tmp_path, dataset, model, seed=seed, dataloader_num_workers=workers)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.promise(
    "C-13",
    "the same seed trains the same weights, in one process or with two that read; another seed others",
    "bitwise",
)
def test_the_same_seed_trains_the_same_weights_and_another_seed_others(tmp_path, train_split):
    first = weights_after(tmp_path, train_split, seed=1)
    assert torch.equal(first, weights_after(tmp_path, train_split, seed=1))
    assert torch.equal(first, weights_after(tmp_path, train_split, seed=1, workers=2))
    assert not torch.equal(first, weights_after(tmp_path, train_split, seed=2))
