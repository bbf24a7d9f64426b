"""Faults injected into training: each ends with a sentence that names it, and loses nothing that was saved."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import TrainerCallback

from modeling_mamba_ema.audio_files import AudioFileError
from modeling_mamba_ema.data import dataset as dataset_module
from modeling_mamba_ema.data.atomic_write import atomic_write
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.training import (
    RunConfiguration,
    choose_checkpoint,
    run_manifest,
    save_run,
)
from modeling_mamba_ema.training.building import check_labels_vary, check_speech_encoder
from modeling_mamba_ema.training.checkpoints import newest_complete_checkpoint
from tests.support.models import tiny_config
from tests.support.programs import HANGS, call_program, start_program, wait_until
from tests.support.runs import FINETUNE, assert_same_run, make_checkpoint, start_interrupted
from tests.support.tiny_corpus import LABELS, make_trainer, write_corpus, write_run

# a full disk


@pytest.mark.promise(
    "C-03",
    "a disk without room ends a run before its first step; one that fills up costs nothing before the last checkpoint",
    "as stated",
)
def test_a_disk_without_room_for_the_checkpoints_ends_the_run_before_the_first_step(tmp_path, train_split, monkeypatch):
    folder = tmp_path / "not" / "there"
    trainer = make_trainer(folder, train_split, save_strategy="steps", save_steps=1, save_total_limit=2)
    folder.rmdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="3 checkpoints need 0.00"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.promise("C-03")
@pytest.mark.slow
def test_a_disk_that_fills_up_while_saving_costs_nothing_but_the_steps_since_the_last_checkpoint(tmp_path, corpus):
    whole = write_run(tmp_path / "whole.yaml", corpus, tmp_path / "whole")
    assert call_program(FINETUNE, whole) == 0
    run = tmp_path / "run"
    configuration = write_run(tmp_path / "run.yaml", corpus, run)
    # No file may grow beyond this any more; to the program a write fails as on a full disk.
    full = "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))"
    process = start_interrupted(configuration, 3, full)
    assert process.wait() == 1
    assert "could not be saved" in process.printed
    assert "the same command goes on from the newest" in process.printed
    there = sorted(path.name for path in run.glob("*checkpoint*"))
    assert newest_complete_checkpoint(run).name == "checkpoint-2"
    assert sorted(path.name for path in run.glob("*checkpoint*")) == there  # nothing incomplete was left
    assert call_program(FINETUNE, configuration) == 0
    assert_same_run(run, tmp_path / "whole")


# processes that read audio


def state_of(pid):
    """A letter, as ps shows it: T is stopped. Z has ended, as a zombie until its parent looks, or altogether."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def instead_of_reading(monkeypatch, folder, action):
    """The first file that is to be read is not; a function that tells its name afterwards."""

    read = dataset_module.load_stretches

    def load(path, *args, **kwargs):
        if not (folder / "file").exists():
            atomic_write(folder / "file", Path(path).name)
            action()
        return read(path, *args, **kwargs)

    monkeypatch.setattr(dataset_module, "load_stretches", load)
    return (folder / "file").read_text


@pytest.mark.promise(
    "C-05", "a worker that dies, freezes or hangs in a file ends the run with the file's name", "as stated"
)
@pytest.mark.parametrize(("number", "what"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "froze")])
def test_a_worker_that_dies_or_freezes_ends_the_run_with_the_name_of_its_file(
    tmp_path, train_split, monkeypatch, number, what
):
    def end():
        os.kill(os.getpid(), number)
        time.sleep(2)  # a thread may run on for a moment after the signal

    earlier = multiprocessing.get_context("fork").Process(target=train_split.__getitem__, args=(0,))
    earlier.start()  # a reader of an earlier run, which is no more
    earlier.join()
    name = instead_of_reading(monkeypatch, tmp_path, end)
    get = _MultiProcessingDataLoaderIter._try_get_data

    def get_when_the_worker_has_ended_or_stopped(loader, *args):
        wait_until(lambda: state_of(loader._workers[0].pid) in "ZT")
        return get(loader, *args)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", get_when_the_worker_has_ended_or_stopped)
    trainer = make_trainer(tmp_path, train_split, dataloader_num_workers=1, worker_timeout=1.0)
    with pytest.raises(RuntimeError, match=f"a process that reads audio {what} while it was reading train_") as caught:
        trainer.train()
    assert name() in str(caught.value)


@pytest.mark.promise("C-05")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_hangs_ends_the_run_with_its_name(tmp_path, train_split, monkeypatch, workers):
    name = instead_of_reading(monkeypatch, tmp_path, lambda: time.sleep(3600))
    monkeypatch.setattr("modeling_mamba_ema.data.watched_reading.READ_SECONDS", 0.5)
    with pytest.raises(AudioFileError, match="could not be read within 0.5 s") as caught:
        make_trainer(tmp_path, train_split, dataloader_num_workers=workers).train()
    assert workers or name() in str(caught.value)  # two workers come to two files


# processes that train together


def ranks_of(launcher):
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_when_one_of_two_processes_is_killed_or_frozen_the_other_ends(tmp_path, corpus, number):
    run = tmp_path / "run"
    configuration = write_run(tmp_path / "run.yaml", corpus, run)
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/cpu_two_processes.yaml"]
    options = ["training.num_train_epochs=100000", "training.ddp_timeout=60"]
    launcher = start_program(*launch, "--main_process_port", "0", FINETUNE, configuration, *options)
    try:
        wait_until((run / "checkpoint-4" / "SHA256SUMS").exists, launcher)
        first, second = ranks_of(launcher)
        os.kill(second, number)
        wait_until(lambda: state_of(first) == "Z")
        if number == signal.SIGSTOP:
            os.kill(second, signal.SIGKILL)  # what the launcher does after 30 s
        launcher.communicate(timeout=HANGS)
        assert launcher.returncode != 0
        assert newest_complete_checkpoint(run) is not None
    finally:
        launcher.kill()
        launcher.communicate()


# NaN


class Spoil(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.speech_encoder.attention.weight[0, 0] = torch.nan


@pytest.mark.promise(
    "C-07",
    "NaN in weights, audio, labels or gradients stops the run at that step, and is never saved",
    "no step is taken",
)
def test_weights_with_nan_are_not_saved(tmp_path, train_split):
    trainer = make_trainer(tmp_path, train_split, save_strategy="steps", save_steps=1)
    trainer.add_callback(Spoil())
    with pytest.raises(ValueError, match=r"speech_encoder.attention.weight holds NaN.*no checkpoint is saved"):
        trainer.train()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.promise("C-07")
def test_audio_with_nan_stops_the_run_naming_the_file(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    samples, rate = sf.read(corpus / "train_5_1.wav")
    samples[100] = np.nan
    sf.write(corpus / "train_5_1.wav", samples, rate, subtype="FLOAT")
    train_split = ConversationDataset(load_emotion_dataset(corpus, LABELS)["train"], LABELS)
    with pytest.raises(AudioFileError, match="train_5_1.wav has a peak of nan"):
        make_trainer(tmp_path / "run", train_split, max_steps=20).train()


# a metric that is no number


class Metric:
    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, prediction):
        return dict.fromkeys(("ccc_valence", "ccc_arousal", "rmse", "num_turns"), self.values[0]) | {
            "ccc": self.values.pop(0)
        }


@pytest.mark.promise(
    "C-10", "an evaluation without a number is never the best; a run of such ends with an error", "as stated"
)
def test_an_evaluation_without_a_number_is_never_the_best(tmp_path, train_split):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options["load_best_model_at_end"] = True
    trainer = make_trainer(tmp_path / "some", train_split, **options)
    trainer.compute_metrics = Metric(math.nan, 0.1, math.nan)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    trainer = make_trainer(tmp_path / "none", train_split, **options)
    trainer.compute_metrics = Metric(math.nan, math.nan, math.nan)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None


@pytest.mark.promise("C-10")
def test_a_run_whose_evaluations_gave_no_number_ends_with_an_error_and_no_model(tmp_path, corpus, monkeypatch, capsys):
    metric = Metric(*[math.nan] * 100)
    monkeypatch.setattr("modeling_mamba_ema.training.trainer.ccc_of_predictions", lambda *_: metric)
    configuration = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    assert call_program(FINETUNE, configuration, "training.num_train_epochs=1") == 1
    assert "no evaluation gave a CCC that is a number" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.promise("C-11")
@pytest.mark.parametrize(("value", "what"), [(0.25, "0.25 throughout"), (None, "missing")])
def test_labels_that_do_not_vary_are_refused_before_training(tmp_path, corpus, value, what):
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, "arousal": value if row["split"] == "validation" else row["arousal"]} for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load_emotion_dataset(tmp_path, LABELS)
    check_labels_vary("train", splits["train"], LABELS)
    with pytest.raises(ValueError, match=f"arousal is {what} in the split validation"):
        check_labels_vary("validation", splits["validation"], LABELS)


# unusual batches


class Unusual(torch.utils.data.Dataset):
    """Five conversations, of one turn and of 0.2 s among them, with the same label throughout."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        turns = [random.normal(size=3_200).astype(np.float32) for _ in range(1 + index % 2)]
        labels = np.full((len(turns), 2), 0.5, dtype=np.float32)
        return {"waveforms": turns, "labels": labels, "conversation_id": str(index), "turns": list(range(len(turns)))}


@pytest.mark.promise(
    "C-11",
    "single turns, short utterances and constant labels in a batch train to finite weights and are counted",
    "as stated",
)
def test_unusual_batches_train_to_finite_weights_and_are_counted(tmp_path):
    trainer = make_trainer(
        tmp_path,
        Unusual(),
        per_device_train_batch_size=2,
        dataloader_drop_last=True,  # as the program does: the fifth conversation alone would be a batch without a CCC
        max_seconds_per_batch=None,
        max_steps=4,
        logging_steps=2,
    )
    trainer.train()
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    shares = [entry["degenerate_batches"] for entry in trainer.state.log_history if "loss" in entry]
    assert shares == [1.0, 1.0]


def test_usual_batches_do_not_count_as_degenerate(tmp_path, train_split):
    trainer = make_trainer(tmp_path, train_split, max_steps=2, logging_steps=1)
    trainer.train()
    assert [entry["degenerate_batches"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]


# settings that cannot work


@pytest.mark.promise(
    "C-12",
    "layer drop with several processes, and SpecAugment with short utterances, are refused before training",
    "as stated",
)
def test_layer_drop_with_several_processes_and_spec_augment_with_short_utterances_are_refused(splits):
    rows = splits["train"]  # utterances of 0.3 to 0.7 s
    long = rows.map(lambda row: {"start": 0.0, "end": 1.1})
    dropping = tiny_config(speech_encoder_config={"layerdrop": 0.1})
    check_speech_encoder(dropping, 1, rows)
    with pytest.raises(ValueError, match="layerdrop is 0.1 with 2 processes"):
        check_speech_encoder(dropping, 2, rows)
    hiding = tiny_config(speech_encoder_config={"apply_spec_augment": True})
    check_speech_encoder(hiding, 2, long)
    with pytest.raises(ValueError, match=r"the shortest utterance lasts 0\.3\d s"):
        check_speech_encoder(hiding, 1, rows)
    frozen = tiny_config(speech_encoder_config={"apply_spec_augment": True}, freeze_speech_encoder=True)
    check_speech_encoder(frozen, 2, rows)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.params.speech_encoder_config.apply_spec_augment=true", "SpecAugment hides most of an utterance"),
        ("training.metric_for_best_model=cccc", "metric_for_best_model is cccc; evaluations give ccc, pearson"),
        ("training.optim=schedule_free_sgd", "You need to install `schedulefree`"),
        ("data.test_split=null", None),
    ],
)
def test_the_program_refuses_what_cannot_work_before_it_writes_anything(tmp_path, corpus, capsys, override, message):
    configuration = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    options = [override, "training.num_train_epochs=0.01"]
    assert call_program(FINETUNE, configuration, *options) == (0 if message is None else 1)
    assert message is None or message in capsys.readouterr().err
    assert (tmp_path / "run" / "run_configuration.yaml").exists() == (message is None)


def test_a_misspelt_corpus_is_noticed_before_an_encoder_is_looked_for(tmp_path, capsys):
    configuration = write_run(tmp_path / "run.yaml", tmp_path / "corpsu", tmp_path / "run")
    assert call_program(FINETUNE, configuration, "model.pretrained_speech_encoder=nobody/nothing") == 1
    assert f"{tmp_path / 'corpsu'} is neither a file or folder here nor a dataset" in capsys.readouterr().err


# going on with something else


@pytest.fixture
def interrupted(tmp_path, splits):
    """A run that has left a checkpoint, and its manifest."""
    run = RunConfiguration(training={"output_dir": str(tmp_path), "max_seconds_per_batch": 10.0})
    make_checkpoint(tmp_path, 2)
    manifest = run_manifest({"train": splits["train"]}, world_size=1)
    save_run(run, manifest)
    return run, manifest


def test_the_same_run_goes_on_without_a_warning(interrupted, caplog):
    assert choose_checkpoint(*interrupted).name == "checkpoint-2"
    assert not caplog.text


@pytest.mark.promise(
    "C-09",
    "resuming with other data, order, batch size or number of processes is refused, with other code warned of",
    "every case",
)
def test_other_data_or_another_order_of_them_are_refused(interrupted, splits):
    run, _ = interrupted
    rows = splits["train"]
    for other in (rows.select(range(len(rows) - 1)), rows.select([1, 0, *range(2, len(rows))])):
        with pytest.raises(ValueError, match="other settings: other rows or audio files in split train. Take"):
            choose_checkpoint(run, run_manifest({"train": other}, 1))


@pytest.mark.promise("C-09")
def test_another_number_of_processes_is_refused_where_it_changes_the_batch_and_warned_of_elsewhere(interrupted, caplog):
    run, manifest = interrupted
    assert choose_checkpoint(run, {**manifest, "world_size": 2}).name == "checkpoint-2"
    assert "written by 1 processes, this run has 2" in caplog.text
    run.training["max_seconds_per_batch"] = None
    save_run(run, manifest)
    with pytest.raises(ValueError, match="world_size: 1 -> 2"):
        choose_checkpoint(run, {**manifest, "world_size": 2})


@pytest.mark.promise("C-09")
def test_another_batch_size_is_refused_and_other_code_is_warned_of(interrupted, caplog):
    run, manifest = interrupted
    assert choose_checkpoint(run, {**manifest, "code": {"version": "9.9", "sha256": "0"}}) is not None
    assert "WARNING: since checkpoint-2 was written, code.version changed: " in caplog.text
    assert "code.sha256 changed\n" in caplog.text
    run.training["per_device_train_batch_size"] = 9
    with pytest.raises(ValueError, match="training.per_device_train_batch_size: default -> 9"):
        choose_checkpoint(run, manifest)


def test_a_run_that_begins_anew_keeps_the_checkpoints_before_it_aside(interrupted, tmp_path):
    run, manifest = interrupted
    run.training["resume_from_checkpoint"] = None
    assert choose_checkpoint(run, manifest) is None
    assert not list(tmp_path.glob("checkpoint-*"))
    assert newest_complete_checkpoint(tmp_path / "earlier-run").name == "checkpoint-2"


def test_a_run_killed_between_its_early_stop_and_its_results_trains_no_further(tmp_path, train_split):
    def trainer():
        made = make_trainer(
            tmp_path,
            train_split,
            max_steps=9,
            learning_rate=1e-3,
            **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
            load_best_model_at_end=True,
            early_stopping_patience=1,
        )
        made.compute_metrics = Metric(0.5, 0.6, 0.1, *[0.9] * 9)
        return made

    first = trainer()
    first.train()
    assert first.state.global_step == 3
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    assert Path(again.state.best_model_checkpoint).name == "checkpoint-2"
    weights = [torch.cat([p.detach().flatten() for p in made.model.parameters()]) for made in (first, again)]
    assert torch.equal(*weights)
