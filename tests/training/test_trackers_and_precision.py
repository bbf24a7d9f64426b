"""Trackers get the evaluations, without a network; bf16, workers and gradient accumulation train as they should."""

import sqlite3

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from modeling_mamba_ema.training import MambaEMATrainer, MambaEMATrainingArguments
from tests.support.audio_cases import noise
from tests.support.models import features, tiny_model
from tests.support.programs import run_program
from tests.support.tiny_corpus import make_trainer, write_run


def tracked(folder, dataset, tracker):
    trainer = make_trainer(
        folder, dataset, report_to=[tracker], logging_steps=1, eval_strategy="steps", eval_steps=1, run_name="tiny"
    )
    trainer.train()
    return [entry["eval_ccc"] for entry in trainer.state.log_history if "eval_ccc" in entry]


def test_tensorboard_gets_the_ccc_of_each_evaluation(tmp_path, train_split, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    expected = tracked(tmp_path, train_split, "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [event.value for event in events.Scalars("eval/ccc")] == pytest.approx(expected)
    assert {"eval/ccc_valence", "eval/ccc_arousal", "eval/rmse", "train/loss", "train/degenerate_batches"} <= set(
        events.Tags()["scalars"]
    )


# The fine-tuning program, with every name that is looked up on the network written down and refused.
WATCHED = """
import os, runpy, socket, sys
resolve = socket.getaddrinfo
def local_only(host, *args, **kwargs):
    if host not in (None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1"):
        open(os.environ["ASKED"], "a").write(f"{host}\\n")
        raise OSError("no network in this test")
    return resolve(host, *args, **kwargs)
socket.getaddrinfo = local_only
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_trackio_keeps_the_ccc_of_each_evaluation_on_this_machine(tmp_path, corpus):
    pytest.importorskip("trackio")
    configuration = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    variables = {"TRACKIO_DIR": str(tmp_path / "trackio"), "ASKED": str(tmp_path / "asked")}
    options = ["training.report_to=trackio", "training.num_train_epochs=1"]
    run_program("-c", WATCHED, "examples/run_finetune.py", configuration, *options, **variables)
    (database,) = (tmp_path / "trackio").rglob("*.db")
    kept = [row[0] for row in sqlite3.connect(database).execute("select metrics from metrics")]
    assert any("eval/ccc_arousal" in str(row) for row in kept)
    assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()


def first_step(folder, dataset, **arguments):
    trainer = make_trainer(folder, dataset, tiny_model(), max_steps=1, logging_steps=1, max_grad_norm=1e9, **arguments)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entry["loss"], entry["grad_norm"], trainer


class OneConversation(torch.utils.data.Dataset):
    """The same conversation again and again, so that any number of them has the CCC of one."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        inputs = features([[noise(900 + 200 * turn, turn) for turn in range(5)]])
        labels = torch.rand(5, 2, generator=torch.Generator().manual_seed(3))
        return {**{name: tensor[0] for name, tensor in inputs.items()}, "labels": labels}


@pytest.mark.promise(
    "B-16", "gradient accumulation scales neither the logged loss nor the gradient", "1e-4 of the values of one step"
)
@pytest.mark.parametrize(
    ("trainer", "arguments"), [(Trainer, TrainingArguments), (MambaEMATrainer, MambaEMATrainingArguments)]
)
def test_accumulation_scales_neither_the_logged_loss_nor_the_gradient(tmp_path, trainer, arguments, record_property):
    results = []
    for steps in (1, 4):
        names = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
        own = {} if trainer is Trainer else {"load_best_model_at_end": False, "eval_strategy": "no"}
        training = trainer(
            model=tiny_model(speech_encoder_config=dict.fromkeys(names, 0.0)),
            args=arguments(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, max_grad_norm=1e9,
                           gradient_accumulation_steps=steps, logging_steps=1, save_strategy="no", report_to="none",
                           use_cpu=True, disable_tqdm=True, **own),
            train_dataset=OneConversation(),
            data_collator=default_data_collator,
        )  # fmt: skip
        training.train()
        (entry,) = [entry for entry in training.state.log_history if "loss" in entry]
        results.append((entry["loss"], entry["grad_norm"]))
    (loss, norm), (accumulated_loss, accumulated_norm) = results
    record_property(
        "figure", f"loss {accumulated_loss / loss:.6f}, gradient {accumulated_norm / norm:.6f} of one step's"
    )
    assert norm > 1e-3
    assert accumulated_loss == pytest.approx(loss, rel=1e-4)
    assert accumulated_norm == pytest.approx(norm, rel=1e-4)


def test_bf16_trains_to_nearly_the_same_loss_in_float32_states(tmp_path, train_split):
    plain, _, _ = first_step(tmp_path, train_split)
    half, norm, trainer = first_step(tmp_path, train_split, bf16=True)
    assert half == pytest.approx(plain, abs=0.05)
    assert half != plain
    assert norm > 0
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
