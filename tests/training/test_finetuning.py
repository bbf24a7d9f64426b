"""The fine-tuning program, run as people run it: through `accelerate launch`, on a tiny corpus."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from tests.support.models import TINY_ENCODER
from tests.support.tiny_corpus import LABELS, call_program, environment

REPOSITORY = Path(__file__).parents[2]


def configuration(folder, corpus, **training):
    encoder = {
        **TINY_ENCODER,
        **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0),
    }
    run = {
        "model": {
            "params": {
                "speech_encoder_config": encoder,
                "hidden_size": 32,
                "head_dim": 16,
                "state_size": 16,
                "dropout": 0.0,
            }
        },
        "data": {"source": str(corpus), "turns_per_item": 3},
        "training": {
            "output_dir": str(folder / "run"),
            "num_train_epochs": 9,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "seed": 0,
            **training,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def finetune(path, *overrides, processes=1):
    accelerate = "cpu.yaml" if processes == 1 else "cpu_two_processes.yaml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", f"configuration/accelerate/{accelerate}"),
            *("examples/run_finetune.py", str(path), *overrides),
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**environment(), "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("one")
    overrides = ("training.num_train_epochs=2", "model.params.label_ranges={valence: [0, 1]}")
    return folder / "run", finetune(configuration(folder, corpus), *overrides)


def test_a_run_leaves_a_model_that_loads_and_results_over_every_turn(one_process, corpus):
    output, log = one_process
    results = json.loads((output / "results.json").read_text())
    splits = load_emotion_dataset(corpus, LABELS)
    for split in ("validation", "test"):
        assert results[split]["num_turns"] == len(splits[split])
        for name in ("ccc", "ccc_valence", "ccc_arousal"):
            assert results[split][f"{name}_low"] <= results[split][f"{name}_high"]
    assert (
        len(re.findall(r"epoch [12]: CCC valence \S+, arousal \S+, mean \S+; RMSE \S+ on a scale from 0 to 1", log))
        == 2
    )
    assert "eval_" not in log  # no dictionaries of metrics
    assert "epoch 2.0, loss" in log  # beside the progress bar
    model = AutoModel.from_pretrained(output / "model")
    assert torch.isfinite(model(torch.randn(1, 4_000)).logits).all()
    assert not list((output / "model").glob("*.bin"))
    card = (output / "model" / "README.md").read_text()
    assert f"{results['test']['ccc_arousal']:.3f} ({results['test']['ccc_arousal_low']:.3f} to" in card
    assert "examples/run_finetune.py" in card
    assert "training.num_train_epochs=2 'model.params.label_ranges={valence: [0, 1]}'" in card  # what was given
    assert yaml.safe_load((output / "run_configuration.yaml").read_text())["training"]["learning_rate"] == 1e-3


def test_the_model_is_saved_before_the_test_split_is_touched_and_may_have_other_labels(corpus, tmp_path, monkeypatch):
    lines = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    rows = [{**line, "file_name": str(corpus / line["file_name"]), "dominance": line["valence"]} for line in lines]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = configuration(tmp_path / "runs", tmp_path, num_train_epochs=1)
    read = ConversationDataset.__getitem__

    def fail_on_the_test_split(self, index):
        if str(self.rows[0]["file_name"]).startswith(str(corpus / "test")):
            raise OSError("the disk with the test split is gone")
        return read(self, index)

    monkeypatch.setattr(ConversationDataset, "__getitem__", fail_on_the_test_split)
    assert call_program("examples/run_finetune.py", str(run), "model.params.id2label={0: dominance, 1: arousal}") == 1
    assert not (tmp_path / "runs" / "run" / "results.json").exists()
    assert AutoModel.from_pretrained(tmp_path / "runs" / "run" / "model").config.labels == ["dominance", "arousal"]


def test_two_processes_train_and_measure_as_one_does_on_the_same_global_batch(one_process, corpus, tmp_path):
    finetune(configuration(tmp_path, corpus, per_device_train_batch_size=2), "training.num_train_epochs=2", processes=2)
    alone = load_file(one_process[0] / "model" / "model.safetensors")
    pair = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, weight in alone.items():
        # Softmax does not see the bias of the scores: its gradient is rounding noise, which Adam scales up.
        if not name.endswith("speech_encoder.attention.bias"):
            torch.testing.assert_close(pair[name], weight, atol=1e-5, rtol=0, msg=name)
    one, two = (json.loads((f / "results.json").read_text())["test"] for f in (one_process[0], tmp_path / "run"))
    assert two["num_turns"] == one["num_turns"]
    # Rounding in training counts here too; one model measured on one and on two processes agrees to 1e-6, as
    # test_training.py shows.
    assert all(two[name] == pytest.approx(one[name], abs=1e-5) for name in one)
