"""Runs of the fine-tuning program that something befalls, and what they leave."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modeling_mamba_ema.training.checkpoints import newest_complete_checkpoint, seal_checkpoint
from tests.support.programs import Forked

FINETUNE = "examples/run_finetune.py"
CHECKPOINT_FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"),
)
# The program, which does something to itself after a step: at this step on any machine.
_INTERRUPTED = """
import os, resource, runpy, signal, sys
from transformers import TrainerCallback
from modeling_mamba_ema.training import MambaEMATrainer

step, action, *sys.argv = sys.argv[1:]

class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(step):
            exec(action, globals())

made = MambaEMATrainer.__init__
def make(self, *args, **kwargs):
    made(self, *args, **kwargs)
    self.add_callback(Interrupt())
MambaEMATrainer.__init__ = make
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_interrupted(configuration: Path, step: int, action: str, *options: Any) -> Forked:
    """Start the program; after a step, before what follows from it is saved, it executes an action."""
    return Forked("-c", _INTERRUPTED, step, action, FINETUNE, configuration, *options)


def make_checkpoint(folder: Path, step: int) -> None:
    """A complete checkpoint as far as its files and sums go."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in CHECKPOINT_FILES:
        (checkpoint / name).write_text(f"{name} at {step}, long enough to cut\n")
    seal_checkpoint(checkpoint)


def assert_same_run(run: Path, other: Path) -> None:
    """Both ended with the same weights, bit by bit, and the same results."""
    last, expected_last = newest_complete_checkpoint(run), newest_complete_checkpoint(other)
    assert last is not None
    assert expected_last is not None
    assert last.name == expected_last.name
    for folder, expected_folder in ((last, expected_last), (run / "model", other / "model")):
        weights, expected = (load_file(place / "model.safetensors") for place in (folder, expected_folder))
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name
    assert json.loads((run / "results.json").read_text()) == json.loads((other / "results.json").read_text())
