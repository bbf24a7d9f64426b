"""Two machines, as network namespaces with a cable between them: they train as one, and say so when one is lost."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import NO_DROPOUT, NO_GRADIENT
from tests.support.programs import HANGS, ROOT, call_program, environment, fork_two, wait_until
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import write_run

PLAIN = ["model.params.dropout=0", *(f"model.params.speech_encoder_config.{name}=0" for name in NO_DROPOUT)]
ADDRESS = "10.77.0.{}"


class Machine:
    """A network namespace."""

    def __init__(self, number):
        self.number, self.name = number, f"ema{uuid.uuid4().hex[:8]}"
        self.card = f"v{self.name}"

    def start(self, *options, **variables):
        """This machine's process of a run, by `accelerate launch`; returns the launcher."""
        launch = ["-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/many_nodes.yaml"]
        where = ["--machine_rank", self.number, "--main_process_ip", ADDRESS.format(1), "--main_process_port", 29500]
        command = ["ip", "netns", "exec", self.name, sys.executable, *launch, *where, "--num_processes", 2, *options]
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment(**variables),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@pytest.fixture
def machines():
    pair = Machine(0), Machine(1)
    try:
        for machine in pair:
            ip("netns", "add", machine.name)
        first, second = pair
        peer = ["peer", "name", second.card, "netns", second.name]
        ip("link", "add", first.card, "netns", first.name, "type", "veth", *peer)
        for machine in pair:
            ip("-n", machine.name, "addr", "add", f"{ADDRESS.format(machine.number + 1)}/24", "dev", machine.card)
            for card in ("lo", machine.card):
                ip("-n", machine.name, "link", "set", card, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    yield pair
    for machine in pair:
        ip("netns", "delete", machine.name, check=False)


def start_both(machines, folder, corpus, *options):
    run = write_run(folder / "run.yaml", corpus, folder / "run")
    return [machine.start(FINETUNE, run, *PLAIN, *options, GLOO_SOCKET_IFNAME=machine.card) for machine in machines]


def training_process(launcher):
    (child,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(child)


def kill(machine, pid):
    os.kill(pid, signal.SIGKILL)


def stop(machine, pid):
    os.kill(pid, signal.SIGSTOP)


def cut_the_network(machine, pid):
    ip("-n", machine.name, "link", "set", machine.card, "down")


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "fault"), [(1, kill), (0, kill), (1, stop), (0, stop), (1, cut_the_network)])
def test_a_lost_machine_ends_the_other_with_a_sentence_and_the_run_goes_on_with_one(
    tmp_path, corpus, machines, lost, fault
):
    launchers = start_both(machines, tmp_path, corpus, "training.num_train_epochs=100000", "training.ddp_timeout=20")
    victim = None
    try:
        wait_until((tmp_path / "run" / "checkpoint-4" / "SHA256SUMS").exists, launchers[0])
        victim = training_process(launchers[lost])
        fault(machines[lost], victim)
        _, printed = launchers[1 - lost].communicate(timeout=HANGS)
    finally:
        for launcher in launchers:
            launcher.kill()
        if victim is not None and fault is not kill:
            with contextlib.suppress(ProcessLookupError):  # it has noticed, too, and ended
                os.kill(victim, signal.SIGKILL)
        for launcher in launchers:
            launcher.communicate()
    assert f"run_finetune.py: process {lost}" in printed, printed
    assert "no longer answers" in printed
    assert "The same command goes on from the newest checkpoint" in printed.rsplit("Root Cause", 1)[1]
    done = int(max((tmp_path / "run").glob("checkpoint-*/SHA256SUMS"), key=os.path.getmtime).parent.name.split("-")[1])
    # The same settings but for their end.
    options = ["training.num_train_epochs=100000", f"training.max_steps={done + 2}"]
    resume = f"training.resume_from_checkpoint={tmp_path / 'run' / f'checkpoint-{done}'}"
    assert call_program(FINETUNE, tmp_path / "run.yaml", *PLAIN, *options, resume) == 0
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_two_machines_reach_the_weights_of_one(tmp_path, corpus, machines):
    for launcher in start_both(machines, tmp_path, corpus):
        _, printed = launcher.communicate(timeout=HANGS)
        assert launcher.returncode == 0, printed
    (tmp_path / "alone").mkdir()
    alone = write_run(tmp_path / "alone" / "run.yaml", corpus, tmp_path / "alone" / "run")
    assert call_program(FINETUNE, alone, *PLAIN) == 0
    weights, expected = (load_file(p / "run" / "model" / "model.safetensors") for p in (tmp_path, tmp_path / "alone"))
    for name in expected.keys() - {f"mamba_ema.{NO_GRADIENT}"}:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_machines_that_look_for_each_other_at_127_0_0_1_are_told_what_to_set(tmp_path, corpus, machines):
    run = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    launchers = [
        machine.start(FINETUNE, run, "training.ddp_timeout=20", GLOO_SOCKET_IFNAME="lo") for machine in machines
    ]
    for launcher in launchers:
        _, printed = launcher.communicate(timeout=HANGS)
        assert "run_finetune.py: the processes do not reach each other" in printed
        assert "set GLOO_SOCKET_IFNAME on each" in printed


# On one machine

LOST = """
import os, signal, sys
from accelerate import PartialState
from accelerate.utils import gather_object
from modeling_mamba_ema.training import failing_together, naming_lost_processes

with naming_lost_processes():
    state = PartialState(cpu=True)
    with failing_together():
        pass
    if state.process_index == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    gather_object([0])
"""


@pytest.mark.parametrize("lost", [0, 1])
def test_the_process_that_was_lost_is_named(lost):
    started = fork_two("-c", LOST, lost)
    assert started[lost].wait() == -signal.SIGKILL
    assert started[1 - lost].wait() == 1
    assert f"ConnectionError: process {lost}" in started[1 - lost].printed
    assert "no longer answers" in started[1 - lost].printed
