"""Processes that train together: they fail, choose and share as one, and a folder has one run at a time."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from modeling_mamba_ema.training import failing_together, lock_folder, require_same_data
from modeling_mamba_ema.training.checkpoints import newest_complete_checkpoint
from tests.support.programs import HANGS, Forked, free_port, run_program, start_program, wait_until
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import write_run

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/cpu_two_processes.yaml"]
# Runs that are refused, in the processes of one launch, which take longer to start than to run; the last ends it.
# Two machines see other folders: names in the settings end with the number of the process.
REFUSED = f"""
import json, os, runpy, sys
rank = os.environ["RANK"]
for name, *options in json.loads(sys.argv[1]):
    sys.argv = [{FINETUNE!r}, *(option.replace("RANK", rank) for option in options)]
    try:
        runpy.run_path({FINETUNE!r}, run_name="__main__")
    except SystemExit as end:
        if name == "the last":
            raise
        open(f"{{os.path.dirname(__file__)}}/{{name}} {{rank}}", "w").write(end.code)
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory, corpus):
    """The folder of runs, with the sentence with which each process ended each, and what the launcher printed."""
    folder = tmp_path_factory.mktemp("refused")
    shutil.copytree(corpus, folder / "corpus0")
    shutil.copytree(corpus, folder / "corpus1")
    (folder / "corpus1" / "train_1_0.wav").write_bytes(b"no sound")
    program, run = folder / "refused.py", str(write_run(folder / "run.yaml", corpus, folder / "run"))
    program.write_text(REFUSED)
    other_audio = [run, f"data.source={folder / 'corpusRANK'}"]
    runs = [
        ("other folders", run, f"training.output_dir={folder / 'runRANK'}"),
        ("bad audio", *other_audio),
        ("other rows", *other_audio, "data.on_bad_audio=skip"),
        ("the last", run, "data.turns_per_item=0"),
    ]
    done = run_program(*LAUNCH, "--main_process_port", free_port(), program, json.dumps(runs), check=False)
    assert done.returncode != 0
    return folder, done.stderr


def test_output_folders_that_the_machines_do_not_share_are_refused_before_the_first_step(refused):
    folder, _ = refused
    for rank in "01":
        said = (folder / f"other folders {rank}").read_text()
        assert f"training.output_dir {folder / 'run'}{rank} is not the same folder on" in said
    assert not list(folder.glob("run*/checkpoint-*"))


def test_bad_audio_on_one_machine_ends_both_with_its_sentence(refused):
    folder, _ = refused
    first, second = ((folder / f"bad audio {rank}").read_text() for rank in "01")
    assert first.startswith("run_finetune.py: process 1 on ")  # said by the process that has no fault
    assert "train_1_0.wav" in first
    assert "train_1_0.wav" in second
    for rank in "01":
        assert "the processes do not read the same split train" in (folder / f"other rows {rank}").read_text()


def test_the_last_thing_that_the_launcher_prints_is_the_sentence_of_the_program(refused):
    report = refused[1].rsplit("Root Cause", 1)[1]
    assert "traceback : run_finetune.py: data.turns_per_item must be at least 1" in report


def test_one_process_is_on_its_own():
    require_same_data({"data": {"train": {"turns": 3, "sha256": "0"}}})
    with pytest.raises(ValueError, match="^wrong$"), failing_together():
        raise ValueError("wrong")


def test_a_folder_that_another_run_writes_to_is_refused_until_that_run_ends(tmp_path, corpus):
    configuration = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    running = Forked(FINETUNE, configuration, "training.num_train_epochs=100000")
    try:
        wait_until((tmp_path / "run" / "checkpoint-2").exists, running)
        with pytest.raises(OSError, match=f"another run writes to {tmp_path / 'run'}; wait for it"):
            lock_folder(tmp_path / "run")
    finally:
        running.kill()
        running.wait()
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
