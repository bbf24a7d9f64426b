"""FSDP 2: weights spread over two processes train, are saved, resumed and loaded as those of one process."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from tests.support.models import NO_DROPOUT, NO_GRADIENT
from tests.support.programs import call_program, free_port, run_program
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import make_trainer, write_run

# accelerate shards on GPUs only. Told that these processes train by FSDP, it shards on a CPU as well.
ON_A_CPU = """
import runpy, sys
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.tensor import DTensor
from modeling_mamba_ema.training import MambaEMATrainer

made, saved = AcceleratorState.__init__, MambaEMATrainer.save_model

def make(self, *args, fsdp_plugin=None, **kwargs):
    made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type

def save(self, *args, **kwargs):
    assert all(isinstance(weight, DTensor) for weight in self.model.state_dict().values())
    saved(self, *args, **kwargs)
    print("saved a sharded model", file=sys.stderr)

AcceleratorState.__init__, MambaEMATrainer.save_model = make, save
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CONFIGURATION = "configuration/accelerate/fsdp.yaml"
# Two batches to a step; conversations longer than a chunk, which the processes have different numbers of.
OPTIONS = (
    *("training.gradient_accumulation_steps=2", "training.turns_per_chunk=1", "model.params.dropout=0"),
    *(f"model.params.speech_encoder_config.{name}=0" for name in NO_DROPOUT),
)


def sharded(folder, *options, check=True):
    (folder / "on_a_cpu.py").write_text(ON_A_CPU)
    launch = ["-m", "accelerate.commands.launch", "--config_file", CONFIGURATION, "--num_processes", 2]
    program = [folder / "on_a_cpu.py", FINETUNE, folder / "run.yaml", *OPTIONS, *options]
    return run_program(*launch, "--main_process_port", free_port(), *program, check=check).stderr


def assert_same_weights(folder, expected_folder, tolerance):
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, expected_folder))
    assert weights.keys() == expected.keys()
    for name in expected.keys() - {f"mamba_ema.{NO_GRADIENT}"}:
        value = expected[name]
        torch.testing.assert_close(weights[name], value, atol=tolerance, rtol=0, msg=name)


@pytest.mark.slow
def test_sharded_weights_are_those_of_one_process_saved_resumed_and_loaded(tmp_path, corpus):
    write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    printed = sharded(tmp_path)
    assert "saved a sharded model" in printed
    (tmp_path / "alone").mkdir()
    alone = write_run(tmp_path / "alone" / "run.yaml", corpus, tmp_path / "alone" / "run")
    assert call_program(FINETUNE, alone, *OPTIONS) == 0
    last = max((path.name for path in (tmp_path / "run").glob("checkpoint-*")), key=lambda name: int(name[11:]))
    assert_same_weights(tmp_path / "run" / last, tmp_path / "alone" / "run" / last, 1e-5)
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "alone" / "run" / "model", 1e-5)

    # everywhere: the code is the model's own
    names, expected = ({path.name for path in (p / "run" / "model").iterdir()} for p in (tmp_path, tmp_path / "alone"))
    assert names == expected
    model = AutoModel.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    assert type(model).__name__ == "MambaEMAForRegression"
    assert not list((tmp_path / "run" / last).glob("_fsdp*"))

    # resumed: the last checkpoint is lost, and made again
    shutil.copytree(tmp_path / "run" / last, tmp_path / "expected")
    shutil.rmtree(tmp_path / "run" / last)
    (tmp_path / "run" / "results.json").unlink()
    assert "going on from" in sharded(tmp_path)
    assert_same_weights(tmp_path / "run" / last, tmp_path / "expected", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.lora={r: 2}"], "training.lora does not go with FSDP"),
        (["data.turns_per_item=2", "data.context_turns=1"], "data.context_turns does not go with FSDP"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(tmp_path, corpus, options, message):
    run = yaml.safe_load(write_run(tmp_path / "run.yaml", corpus, tmp_path / "run").read_text())
    run["model"] = {"pretrained_speech_encoder": "tiny", "params": {"context": "none"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert message in sharded(tmp_path, *options, check=False)


def test_sharding_that_accelerate_would_leave_out_is_refused(tmp_path, train_split, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"shards weights \(FSDP\) on GPUs only; on CPUs, take cpu_two_processes"):
        make_trainer(tmp_path, train_split)
