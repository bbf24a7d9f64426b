"""Training that is killed goes on as if nothing had happened."""

import pickle
import shutil
import signal
import time

import numpy as np
import pytest
from transformers import TrainerCallback

from modeling_mamba_ema.training.checkpoints import (
    REQUIRED,
    newest_complete_checkpoint,
    seal_checkpoint,
    why_incomplete,
)
from tests.support.pickles import pickles
from tests.support.programs import Forked, call_program, wait_until
from tests.support.runs import CHECKPOINT_FILES, FINETUNE, assert_same_run, make_checkpoint, start_interrupted
from tests.support.tiny_corpus import make_trainer, write_run


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


@pytest.mark.promise(
    "C-02",
    "each file of a checkpoint missing, truncated, empty or with a flipped bit: the one before is taken",
    "every damage",
)
@pytest.mark.parametrize("damage", [missing, truncated, empty, flipped])
@pytest.mark.parametrize("name", [*CHECKPOINT_FILES, "SHA256SUMS"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, caplog, name, damage):
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 10)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    damage(tmp_path / "checkpoint-10" / name)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert (tmp_path / "broken-checkpoint-10").is_dir()
    assert "checkpoint-10 cannot be resumed" in caplog.text


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
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


@pytest.mark.promise("C-01")
@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_go_only_when_the_new_one_is_complete(tmp_path, train_split, limit):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "save_total_limit": limit}
    trainer = make_trainer(tmp_path, train_split, **options)
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
    assert call_program(FINETUNE, configuration) == 0
    return folder / "run"


def interrupted_run(tmp_path, corpus, number):
    """A run that got a signal after its fifth step: its folder, its configuration, its exit code and its log."""
    run = tmp_path / "run"
    configuration = write_run(tmp_path / "run.yaml", corpus, run)
    process = start_interrupted(configuration, 5, f"os.kill(os.getpid(), {number:d})")
    code = process.wait()
    assert not list(run.glob("broken-*"))
    assert not (run / "results.json").exists()
    return run, configuration, code, process.printed


def test_a_run_that_is_killed_goes_on_to_the_same_weights(tmp_path, corpus, uninterrupted):
    run, configuration, code, _ = interrupted_run(tmp_path, corpus, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert newest_complete_checkpoint(run).name == "checkpoint-4"
    # What a kill in the middle of a save leaves behind.
    unfinished = shutil.copytree(run / "checkpoint-4", run / "checkpoint-99")
    (unfinished / "SHA256SUMS").unlink()
    (unfinished / "optimizer.pt").write_bytes(b"PK")
    assert call_program(FINETUNE, configuration) == 0
    assert_same_run(run, uninterrupted)


@pytest.mark.promise("C-08")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_ends_without_a_traceback_and_goes_on_to_the_same_weights(
    tmp_path, corpus, uninterrupted, number, code
):
    run, configuration, ended, log = interrupted_run(tmp_path, corpus, number)
    assert ended == code
    assert "the same command goes on from it" in log
    assert "Traceback" not in log
    assert call_program(FINETUNE, configuration) == 0
    assert_same_run(run, uninterrupted)


@pytest.mark.promise(
    "C-01",
    "a run killed at 8 random moments, or while it saves, ends with the weights of one that was never killed",
    "bitwise",
)
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_kills_at_random_moments_change_nothing(tmp_path, corpus, uninterrupted):
    run, random = tmp_path / "run", np.random.default_rng(0)
    configuration = write_run(tmp_path / "run.yaml", corpus, run)
    for _ in range(8):
        process = Forked(FINETUNE, configuration)
        wait_for_another_checkpoint(run, process)
        time.sleep(random.uniform(0, 0.2))  # whenever the kill comes, it changes nothing
        process.kill()
        process.wait()
    assert call_program(FINETUNE, configuration) == 0
    assert_same_run(run, uninterrupted)


def wait_for_another_checkpoint(run, process):
    """Or for the end of the process."""

    def newest_step():
        return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=0)

    before = newest_step()
    wait_until(lambda: newest_step() > before or process.poll() is not None)


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(uninterrupted, caplog, capsys):
    caplog.set_level("INFO")
    configuration = uninterrupted.parent / "run.yaml"
    before = (uninterrupted / "results.json").stat().st_mtime_ns
    assert call_program(FINETUNE, configuration) == 0
    assert "holds a finished run" in caplog.text
    assert call_program(FINETUNE, configuration, "training.learning_rate=0.5") == 1
    assert "training.learning_rate: 0.002 -> 0.5" in capsys.readouterr().err
    assert (uninterrupted / "results.json").stat().st_mtime_ns == before


@pytest.mark.promise("E-05")
@pickles
def test_pickles_in_a_checkpoint_run_nothing_on_resume(tmp_path, train_split, write_pickle):
    def trainer(steps):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps}
        return make_trainer(tmp_path / "run", train_split, **options)

    trainer(1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    write_pickle(checkpoint / "training_args.bin", tmp_path / "witness")
    seal_checkpoint(checkpoint)
    trainer(2).train(resume_from_checkpoint=str(checkpoint))  # training_args.bin is never read
    for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt"):
        shutil.copytree(checkpoint, tmp_path / "evil" / name)
        write_pickle(tmp_path / "evil" / name / name, tmp_path / "witness")
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            trainer(2).train(resume_from_checkpoint=str(tmp_path / "evil" / name))
    assert not (tmp_path / "witness").exists()
