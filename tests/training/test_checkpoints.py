"""Training that is killed goes on as if nothing had happened."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.training import newest_complete_checkpoint, why_incomplete
from modeling_mamba_ema.training.checkpoints import REQUIRED, seal_checkpoint
from tests.support.tiny_corpus import LABELS, ROOT, call_program, environment, make_trainer, run_program, write_run

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]


def make_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_text(f"{name} at {step}, long enough to cut\n")
    seal_checkpoint(checkpoint)


def missing(path):
    path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[:5])


def empty(path):
    path.write_bytes(b"")


def flipped(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [missing, truncated, empty, flipped])
@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, caplog, name, damage):
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 10)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    damage(tmp_path / "checkpoint-10" / name)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert (tmp_path / "broken-checkpoint-10").is_dir()
    assert "checkpoint-10 cannot be resumed" in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_sealed_without_a_needed_file_is_incomplete(tmp_path, name):
    make_checkpoint(tmp_path, 1)
    (tmp_path / "checkpoint-1" / name).unlink()
    seal_checkpoint(tmp_path / "checkpoint-1")
    assert why_incomplete(tmp_path / "checkpoint-1") == f"there is no {next(r for r in REQUIRED if name.startswith(r))}"


def test_sums_cannot_point_outside_the_checkpoint(tmp_path):
    make_checkpoint(tmp_path, 1)
    with (tmp_path / "checkpoint-1" / "SHA256SUMS").open("a") as file:
        file.write("00  ../../secret\n")
    assert "outside" in why_incomplete(tmp_path / "checkpoint-1")


def test_a_folder_without_checkpoints_begins_anew(tmp_path):
    assert newest_complete_checkpoint(tmp_path / "nothing") is None


class KillBeforeSealing(TrainerCallback):
    """Stops the training as `kill -9` would between the last file of a checkpoint and its sums."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_go_only_when_the_new_one_is_complete(tmp_path, corpus, limit):
    rows = load_emotion_dataset(corpus, LABELS)["train"]
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "save_total_limit": limit}
    trainer = make_trainer(tmp_path, ConversationDataset(rows, LABELS), **options)
    trainer.callback_handler.callbacks.insert(0, KillBeforeSealing(4))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    there = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert there == [f"checkpoint-{step}" for step in (2, 3, 4)][2 - limit :]
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("uninterrupted")
    configuration = write_run(folder / "run.yaml", corpus, folder / "run")
    run_program("examples/run_finetune.py", str(configuration))
    return folder / "run"


def final_checkpoint(run):
    return newest_complete_checkpoint(run)


def assert_same_run(run, other):
    assert final_checkpoint(run).name == final_checkpoint(other).name
    for part in (final_checkpoint, lambda folder: folder / "model"):
        weights, expected = (load_file(part(folder) / "model.safetensors") for folder in (run, other))
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name
    assert json.loads((run / "results.json").read_text()) == json.loads((other / "results.json").read_text())


def start(configuration):
    return subprocess.Popen(
        [sys.executable, "examples/run_finetune.py", str(configuration)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(process, run, step):
    deadline = time.monotonic() + 150
    while not list(run.glob(f"checkpoint-{step}/SHA256SUMS")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stop_a_run(tmp_path, corpus, number):
    """A run that a signal stopped after its fourth step: its folder, its configuration, its exit code and its log."""
    run = tmp_path / "run"
    configuration = write_run(tmp_path / "run.yaml", corpus, run)
    process = start(configuration)
    try:
        wait_for_checkpoint(process, run, 4)
        process.send_signal(number)
        _, log = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert not list(run.glob("broken-*"))
    assert not (run / "results.json").exists()
    return run, configuration, process.returncode, log


def test_a_run_that_is_killed_goes_on_to_the_same_weights(tmp_path, corpus, uninterrupted):
    run, configuration, code, _ = stop_a_run(tmp_path, corpus, signal.SIGKILL)
    assert code == -signal.SIGKILL
    # What a kill in the middle of a save leaves behind.
    unfinished = shutil.copytree(final_checkpoint(run), run / "checkpoint-99")
    (unfinished / "SHA256SUMS").unlink()
    (unfinished / "optimizer.pt").write_bytes(b"PK")
    run_program("examples/run_finetune.py", str(configuration))
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_ends_without_a_traceback_and_goes_on_to_the_same_weights(
    tmp_path, corpus, uninterrupted, number, code
):
    run, configuration, ended, log = stop_a_run(tmp_path, corpus, number)
    assert ended == code
    assert "the same command goes on from it" in log
    assert "Traceback" not in log
    run_program("examples/run_finetune.py", str(configuration))
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_kills_at_random_moments_change_nothing(tmp_path, corpus, uninterrupted):
    run, random = tmp_path / "run", np.random.default_rng(0)
    configuration = write_run(tmp_path / "run.yaml", corpus, run)
    for _ in range(8):
        process, before = start(configuration), newest_step(run)
        deadline = time.monotonic() + 150
        while process.poll() is None and newest_step(run) <= before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.communicate(timeout=30)
    run_program("examples/run_finetune.py", str(configuration))
    assert_same_run(run, uninterrupted)


def newest_step(run):
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=0)


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(uninterrupted, capsys, caplog):
    program = ("examples/run_finetune.py", str(uninterrupted.parent / "run.yaml"))
    before = (uninterrupted / "results.json").stat().st_mtime_ns
    caplog.set_level("INFO")
    assert call_program(*program) == 0
    assert "holds a finished run" in caplog.text
    assert call_program(*program, "training.learning_rate=0.5") == 1
    assert "training.learning_rate: 0.002 -> 0.5" in capsys.readouterr().err
    assert (uninterrupted / "results.json").stat().st_mtime_ns == before
