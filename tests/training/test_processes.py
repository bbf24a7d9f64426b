"""Processes that train together: they fail, choose and share as one, and a folder has one run at a time."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from modeling_mamba_ema.training import failing_together, lock_folder, require_same_data
from modeling_mamba_ema.training.checkpoints import newest_complete_checkpoint
from tests.support.programs import HANGS, free_port, run_program, start_program, wait_until
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import write_corpus, write_run

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/cpu_two_processes.yaml"]
# Two machines with folders of their own: names of folders in the settings end with the number of the process.
TWO_MACHINES = f"""
import os, runpy, sys
rank = os.environ["RANK"]
sys.argv = [argument.replace("RANK", rank) for argument in sys.argv[1:]]
runpy.run_path({FINETUNE!r}, run_name="__main__")
"""


def two_machines(tmp_path, *options):
    """Run the fine-tuning in two processes; returns what they wrote to the console."""
    program = tmp_path / "machine.py"
    program.write_text(TWO_MACHINES)
    run = tmp_path / "run.yaml"
    done = run_program(*LAUNCH, "--main_process_port", free_port(), program, FINETUNE, run, *options, check=False)
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_output_folders_that_the_machines_do_not_share_are_refused_before_the_first_step(tmp_path, corpus):
    write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    printed = two_machines(tmp_path, f"training.output_dir={tmp_path / 'runRANK'}")
    assert f"training.output_dir {tmp_path / 'run0'} is not the same folder on" in printed
    assert not list(tmp_path.glob("run*/checkpoint-*"))


def test_bad_audio_on_one_machine_ends_both_with_its_sentence(tmp_path):
    write_corpus(tmp_path / "corpus0")
    shutil.copytree(tmp_path / "corpus0", tmp_path / "corpus1")
    (tmp_path / "corpus1" / "train_1_0.wav").write_bytes(b"no sound")
    write_run(tmp_path / "run.yaml", tmp_path / "corpusRANK", tmp_path / "run")
    options = [f"data.source={tmp_path / 'corpusRANK'}"]
    printed = two_machines(tmp_path, *options)
    assert "run_finetune.py: process 1 on " in printed  # said by the process that has no fault
    assert "train_1_0.wav" in printed
    printed = two_machines(tmp_path, *options, "data.on_bad_audio=skip")
    assert "the processes do not read the same split train" in printed


def test_one_process_is_on_its_own():
    require_same_data({"data": {"train": {"turns": 3, "sha256": "0"}}})
    with pytest.raises(ValueError, match="^wrong$"), failing_together():
        raise ValueError("wrong")


def test_a_folder_that_another_run_writes_to_is_refused_until_that_run_ends(tmp_path, corpus):
    configuration = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    running = start_program(FINETUNE, configuration, "training.num_train_epochs=100000")
    try:
        wait_until((tmp_path / "run" / "checkpoint-2").exists, running)
        with pytest.raises(OSError, match=f"another run writes to {tmp_path / 'run'}; wait for it"):
            lock_folder(tmp_path / "run")
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.communicate(timeout=HANGS)
    lock_folder(tmp_path / "run").release()


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_a_checkpoint_from_which_the_run_goes_on(tmp_path, corpus):
    configuration = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    program = [*LAUNCH, "--main_process_port", free_port(), FINETUNE, configuration]
    endless = "training.num_train_epochs=100000"
    launcher = start_program(*program, endless)
    try:
        wait_until((tmp_path / "run" / "checkpoint-2" / "SHA256SUMS").exists, launcher)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        launcher.send_signal(signal.SIGTERM)  # as a scheduler does; torch's launcher passes it on
        _, printed = launcher.communicate(timeout=HANGS)
    finally:
        launcher.kill()
        launcher.communicate()
    assert launcher.returncode != 0
    assert len(children) == 2
    assert not any(Path("/proc", child).exists() for child in children)
    assert printed.count("SIGTERM: a checkpoint is saved; the same command goes on from it") == 2
    newest = newest_complete_checkpoint(tmp_path / "run")
    steps = int(newest.name.split("-")[1]) + 2
    done = run_program(*program, endless, f"training.max_steps={steps}", f"training.resume_from_checkpoint={newest}")
    assert f"going on from {newest}" in done.stderr
    assert (tmp_path / "run" / f"checkpoint-{steps}").exists()


def test_the_last_thing_that_the_launcher_prints_is_the_sentence_of_the_program(tmp_path, corpus):
    configuration = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    refused = run_program(
        *(*LAUNCH, "--main_process_port", free_port(), FINETUNE, configuration, "data.turns_per_item=0"), check=False
    )
    report = refused.stderr.rsplit("Root Cause", 1)[1]
    assert "traceback : run_finetune.py: data.turns_per_item must be at least 1" in report
