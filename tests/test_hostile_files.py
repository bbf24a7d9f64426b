"""Files from elsewhere that want to run code or take all memory: pickles, configurations, YAML."""

import io
import json
import pickle
import shutil
import tracemalloc
import zipfile

import pytest
import torch
from transformers import AutoConfig, AutoModel, default_data_collator

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.training import MambaEMATrainer, MambaEMATrainingArguments, load_run_configuration
from modeling_mamba_ema.training.checkpoints import seal_checkpoint
from tests.support.audio_cases import RATE, noise
from tests.support.models import tiny_model


class Malicious:
    """Unpickling it writes a file: what a test can see of code that was run."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (open, (str(self.witness), "w"))


def plain_pickle(path, witness):
    path.write_bytes(pickle.dumps({"head.dense.weight": Malicious(witness)}))


def torch_archive(path, witness):
    """The format of `torch.save`, with the pickle inside replaced."""
    buffer = io.BytesIO()
    torch.save({"head.dense.weight": torch.zeros(1)}, buffer)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            evil = pickle.dumps({"a": Malicious(witness)}, protocol=2)
            bad.writestr(name, evil if name.endswith("data.pkl") else good.read(name))


pickles = pytest.mark.parametrize("write", [plain_pickle, torch_archive])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


def test_the_malicious_pickle_is_one(tmp_path):
    plain_pickle(tmp_path / "evil", tmp_path / "witness")
    pickle.loads((tmp_path / "evil").read_bytes())
    assert (tmp_path / "witness").exists()


@pickles
@pytest.mark.parametrize("auto", [True, False], ids=["AutoModel", "class"])
def test_pickled_weights_are_neither_run_nor_read(folder, tmp_path, write, auto):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    write(tmp_path / "copy" / "pytorch_model.bin", tmp_path / "witness")
    with pytest.raises(OSError, match="safetensors"):
        (AutoModel if auto else MambaEMAForRegression).from_pretrained(tmp_path / "copy")
    assert not (tmp_path / "witness").exists()


@pickles
def test_a_pickle_that_is_asked_for_or_is_a_wavlms_runs_nothing(folder, tmp_path, write):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    write(tmp_path / "copy" / "pytorch_model.bin", tmp_path / "witness")
    with pytest.raises((pickle.UnpicklingError, OSError, RuntimeError)):
        MambaEMAForRegression.from_pretrained(tmp_path / "copy", use_safetensors=False)
    tiny_model().config.speech_encoder_config.save_pretrained(tmp_path / "copy")
    with pytest.raises((pickle.UnpicklingError, OSError, RuntimeError)):
        MambaEMAForRegression.from_pretrained_speech_encoder(tmp_path / "copy")
    assert not (tmp_path / "witness").exists()


class Turns(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        speech = [noise(900 + 200 * turn, turn) for turn in range(3)]
        inputs = MambaEMAFeatureExtractor()([speech], sampling_rate=RATE, return_tensors="pt")
        return {**{name: tensor[0] for name, tensor in inputs.items()}, "labels": torch.rand(3, 2)}


def trainer(folder, steps):
    arguments = MambaEMATrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="no",
        load_best_model_at_end=False,
        per_device_train_batch_size=1,
        disable_tqdm=True,
    )
    return MambaEMATrainer(tiny_model(), arguments, train_dataset=Turns(), data_collator=default_data_collator)


@pickles
def test_pickles_in_a_checkpoint_run_nothing_on_resume(tmp_path, write):
    trainer(tmp_path / "run", 1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    write(checkpoint / "training_args.bin", tmp_path / "witness")
    seal_checkpoint(checkpoint)
    trainer(tmp_path / "run", 2).train(resume_from_checkpoint=str(checkpoint))  # training_args.bin is never read
    for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt"):
        shutil.copytree(checkpoint, tmp_path / "evil" / name)
        write(tmp_path / "evil" / name / name, tmp_path / "witness")
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            trainer(tmp_path / "run", 2).train(resume_from_checkpoint=str(tmp_path / "evil" / name))
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**6),
        ("intermediate_size", 10**9),
        ("conv_dim", [10**6] * 7),
        ("conv_dim", [16] * 10_000),
        ("conv_kernel", [10**9] * 7),
        ("conv_stride", [10**9] * 7),
        ("num_conv_pos_embeddings", 10**9),
        ("num_conv_pos_embedding_groups", 10**9),
        ("num_buckets", 10**9),
        ("max_bucket_distance", 10**9),
        ("add_adapter", True),
    ],
)
def test_a_config_json_with_sizes_without_bounds_is_refused_before_memory_is_taken(folder, tmp_path, field, value):
    config = json.loads((folder / "config.json").read_text())
    encoder = config["speech_encoder_config"]
    encoder[field] = value
    if field == "conv_dim":
        encoder["num_feat_extract_layers"] = len(value)
        encoder["conv_kernel"], encoder["conv_stride"] = [2] * len(value), [1] * len(value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=field):
            AutoConfig.from_pretrained(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: !!python/object/apply:os.system ['touch witness']", "no plain YAML"),
        ("model: !!python/object/new:subprocess.Popen [['id']]", "no plain YAML"),
        ("model: !!python/name:os.system", "no plain YAML"),
        ("model: !!python/module:os", "no plain YAML"),
        (BOMB + "model: *i", "aliases are not allowed, found one in line 2"),
        ("model: &m {params: *m}", "aliases are not allowed"),
        ("[" * 100_000, "no plain YAML"),
        ("model: " + "x" * 1_000_001, "larger than 1000000 bytes"),
        ("model: " + "x" * 100_000, "model must be a section"),
        ("modle: {}", "unknown key modle; did you mean model?"),
        ("training: {learning_rat: 1}", "did you mean training.learning_rate?"),
        ("training: {seed: [1, 2]}", "training.seed is"),
        ("\x00", "no plain YAML"),
    ],
    ids=range(13),
)
def test_hostile_yaml_is_refused_in_a_short_sentence(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        load_run_configuration("run.yaml")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
