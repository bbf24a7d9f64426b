"""Saving and loading: a folder that works by itself, with and without the package."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    BertConfig,
    BertModel,
    Wav2Vec2FeatureExtractor,
    WavLMModel,
)

import modeling_mamba_ema
from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.publishing import TrainingFacts, prepare_release
from tests.support.models import tiny_config, tiny_model

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(modeling_mamba_ema.__file__).parent

# Loads the folder through the Auto classes with nothing of this package and nothing optional importable, without a
# network, and prints what it computed as hexadecimal float32.
LOADER = """
import socket, sys

BLOCKED = {"modeling_mamba_ema", "mamba_ssm", "soundfile", "soxr", "datasets", "evaluate", "accelerate", "matplotlib"}

def refuse(*args, **kwargs):
    raise OSError("no network in this test")

for name in BLOCKED:
    sys.modules[name] = None  # as if not installed
socket.socket.connect = refuse
socket.getaddrinfo = refuse

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification

folder = sys.argv[1]
options = dict(trust_remote_code=True, revision="main")
config = AutoConfig.from_pretrained(folder, **options)
assert config.model_type == "mamba_ema", config
extractor = AutoFeatureExtractor.from_pretrained(folder, **options)
waveform = torch.sin(torch.arange(8000) * 0.05)
features = extractor([[waveform, waveform[:3000]]], sampling_rate=16000, return_tensors="pt")
for auto in (AutoModel, AutoModelForAudioClassification):
    model = auto.from_pretrained(folder, **options).eval()
    assert type(model).__name__ == "MambaEMAForRegression", type(model)
    with torch.no_grad():
        print(model(**features).logits.numpy().tobytes().hex())
if len(sys.argv) > 2:
    model.save_pretrained(sys.argv[2])
    extractor.save_pretrained(sys.argv[2])
"""


def expected_output(model):
    waveform = torch.sin(torch.arange(8000) * 0.05)
    features = MambaEMAFeatureExtractor()([[waveform, waveform[:3000]]], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        return model(**features).logits.numpy().tobytes().hex()


def load_elsewhere(folder, tmp_path, python=sys.executable, again=None):
    script = tmp_path / "loader.py"
    script.write_text(LOADER)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # Where another version of transformers is tried, it lies in front of the packages of this Python.
        "PYTHONPATH": os.environ.get("TRANSFORMERS_OVERLAY", ""),
    }
    command = [str(python), str(script), str(folder), *([str(again)] if again else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.set_num_threads(1)
    model = tiny_model(label_ranges={"valence": (1, 5)})
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    MambaEMAFeatureExtractor().save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def release(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(published[1], folder, dirs_exist_ok=True)
    results = {"test": {"num_turns": 295, "num_conversations": 44}}
    for place, name in enumerate(("ccc_valence", "ccc_arousal", "ccc")):
        results["test"] |= {name: 0.5 + 0.1 * place, f"{name}_low": 0.4, f"{name}_high": 0.8}
    command = "python run_finetune.py configuration/demo.yaml training.seed=3"
    facts = TrainingFacts(results, "data/demo", command, "microsoft/wavlm-large", "cc-by-nc-4.0", ["en", "de"])
    prepare_release(folder, facts)
    return folder


def test_a_saved_folder_holds_weights_settings_and_at_most_twelve_files_of_code(published):
    names = {path.name for path in published[1].iterdir()}
    code = {name for name in names if name.endswith(".py")}
    assert names - code == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert code <= {path.name for path in PACKAGE.glob("*.py")}
    assert len(code) <= 12
    auto_map = json.loads((published[1] / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification", "AutoFeatureExtractor"}
    for reference in auto_map.values():
        assert reference.split(".")[0] + ".py" in names


def test_every_entry_file_names_all_the_files_it_needs(published):
    """Until 5.8 transformers copied, for a local folder, no more than the files that the entry file itself names."""
    config = json.loads((published[1] / "config.json").read_text())
    references = [*config["auto_map"].values(), *(task["impl"] for task in config["custom_pipelines"].values())]
    for entry in {reference.split(".")[0] for reference in references}:
        named = imported_files(published[1] / f"{entry}.py")
        needed, found = set(), set(named)
        while found:
            needed |= found
            found = {name for file in found for name in imported_files(published[1] / f"{file}.py")} - needed
        assert needed - {entry} <= named, entry


def imported_files(path):
    return set(re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_a_feature_extractor_that_normalises_otherwise_than_the_model_is_refused(tmp_path):
    MambaEMAFeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do_normalize is True in config.json and False in preprocessor_config.json"):
        tiny_model().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_feature_extractor_with_the_statistics_of_another_corpus_is_refused(tmp_path):
    MambaEMAFeatureExtractor(do_normalize=False, waveform_mean=0.0, waveform_std=0.2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"waveform_std is 0.1 in config.json and 0.2 in preprocessor_config.json"):
        tiny_model(do_normalize=False, waveform_mean=0.0, waveform_std=0.1).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["layer_attention", "group_statistics"])
def test_models_saved_before_the_files_were_merged_give_the_numbers_they_gave(name):
    folder = REPOSITORY / "tests" / "saved_models" / name
    time = torch.arange(9000.0)
    turns = [
        (0.3 * torch.sin(time * 0.05 * (1 + turn)) * torch.sin(time * 0.0007 * (1 + turn)))[: 5000 + 800 * turn].numpy()
        for turn in range(4)
    ]
    extractor = MambaEMAFeatureExtractor.from_pretrained(folder)
    model = MambaEMAForRegression.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(**extractor([turns, turns[1:3]], sampling_rate=16_000, return_tensors="pt")).logits
    before = torch.from_numpy(np.load(folder / "logits.npy"))
    torch.testing.assert_close(logits, before, atol=1e-6, rtol=0, equal_nan=True)


def test_a_model_alone_writes_its_feature_extractor_too(tmp_path):
    tiny_model(do_normalize=False).save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert isinstance(loaded, MambaEMAFeatureExtractor)
    assert loaded.do_normalize is False


def test_it_loads_by_itself_in_another_process_with_bitwise_the_same_numbers(published, tmp_path):
    model, folder = published
    assert load_elsewhere(folder, tmp_path) == [expected_output(model)] * 2


def test_a_model_loaded_as_remote_code_can_be_saved_again(published, tmp_path):
    model, folder = published
    again = tmp_path / "again"
    load_elsewhere(folder, tmp_path, again=again)
    assert load_elsewhere(again, tmp_path) == [expected_output(model)] * 2


@pytest.mark.slow
def test_it_loads_in_a_fresh_environment_with_torch_transformers_numpy_and_safetensors_alone(published, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = ["torch", "transformers", "numpy", "safetensors"]
    constraints = str(REPOSITORY / "constraints.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *packages], check=True, timeout=1200)
    assert load_elsewhere(published[1], tmp_path, python=python) == [expected_output(published[0])] * 2


def test_the_installed_package_needs_no_remote_code(published):
    model, folder = published
    for auto in (AutoModel, AutoModelForAudioClassification):
        loaded = auto.from_pretrained(folder).eval()
        assert type(loaded) is MambaEMAForRegression
        assert expected_output(loaded) == expected_output(model)
    assert type(AutoConfig.from_pretrained(folder)) is MambaEMAConfig
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is MambaEMAFeatureExtractor


@pytest.mark.parametrize("context", ["none", "ema", "mamba", "mamba_ema"])
def test_nothing_is_missing_or_unexpected_in_a_checkpoint(tmp_path, context):
    tiny_model(context=context, speech_encoder_layers=[0, -1], ema_decay_learnable=True).save_pretrained(tmp_path)
    _, loading = MambaEMAForRegression.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]


def test_loaded_weights_begin_where_new_ones_do_so_that_products_are_rounded_alike(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model, _ = MambaEMAForRegression.from_pretrained(tmp_path, output_loading_info=True)
    assert {weight.data_ptr() % 64 for weight in (*model.parameters(), *model.buffers())} == {0}


def test_saving_loading_and_saving_again_gives_the_same_file(published, tmp_path):
    AutoModel.from_pretrained(published[1]).save_pretrained(tmp_path)
    digests = {hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in (published[1], tmp_path)}
    assert len(digests) == 1


def test_a_parameter_missing_from_the_checkpoint_is_initialised_and_the_others_are_kept(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model(
        speech_encoder_pooling="multihead_attention", speech_encoder_layers=[0, -1], ema_decay_learnable=True
    )
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ours = [name for name in tensors if ".wavlm." not in name]
    assert len(ours) > 20
    for name in ours:
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
        state = MambaEMAForRegression.from_pretrained(tmp_path).state_dict()
        assert torch.isfinite(state[name]).all(), name
        assert state[name].abs().max() < 20, name
        for other in ours:
            assert other == name or torch.equal(state[other], tensors[other]), (name, other)


def test_no_buffer_is_left_out_of_checkpoints():
    model = tiny_model()
    assert {name for name, _ in model.named_buffers()} <= set(model.state_dict())


def test_weights_load_in_bfloat16_and_states_stay_float32(published):
    model = AutoModel.from_pretrained(published[1], dtype=torch.bfloat16).eval()
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        outputs = model(torch.randn(1, 4_000), use_conversation_state=True)
    assert outputs.logits.dtype == torch.float32
    assert outputs.conversation_state.mamba[0].ssm.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps_work(published, device_map):
    model = AutoModel.from_pretrained(published[1], device_map=device_map).eval()
    assert expected_output(model) == expected_output(published[0])


def test_gradient_checkpointing_changes_no_gradient_and_the_reentrant_kind_is_refused():
    gradients = []
    for enabled in (False, True):
        model = tiny_model().train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(torch.randn(3, 4_000), labels=torch.rand(3, 2)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    # Without a word on it torch takes the re-entrant kind.
    for options in ({"use_reentrant": True}, {}, {"preserve_rng_state": True}):
        with pytest.raises(ValueError, match="re-entrant"):
            tiny_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_pretrained_wavlm_gives_its_weights_and_normalisation(tmp_path, norm):
    encoder = tiny_config(norm).speech_encoder_config
    encoder.layerdrop, encoder.apply_spec_augment = 0.1, True  # as published checkpoints have it
    wavlm = WavLMModel(encoder)
    wavlm.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    model = MambaEMAForRegression.from_pretrained_speech_encoder(
        tmp_path, speech_encoder_pooling="attention", hidden_size=32, head_dim=16
    )
    for name, tensor in wavlm.state_dict().items():
        assert torch.equal(model.speech_encoder.backbone.state_dict()[name], tensor), name
    assert model.config.speech_encoder_config.layerdrop == 0.0
    assert model.config.speech_encoder_config.apply_spec_augment is False
    assert model.config.do_normalize is False
    assert model.config.speech_encoder_pooling == "attention"


def test_a_mamba_ema_gives_its_encoder_to_another(tmp_path):
    donor = tiny_model(speech_encoder_pooling="mean", do_normalize=False)
    donor.save_pretrained(tmp_path)
    model = MambaEMAForRegression.from_pretrained_speech_encoder(
        tmp_path, speech_encoder_pooling="attention", hidden_size=16, head_dim=16
    )
    for name, tensor in donor.speech_encoder.backbone.state_dict().items():
        assert torch.equal(model.speech_encoder.backbone.state_dict()[name], tensor), name
    assert (model.config.speech_encoder_pooling, model.config.hidden_size) == ("attention", 16)
    assert model.config.do_normalize is False


def test_a_checkpoint_that_is_no_speech_encoder_or_lacks_weights_is_refused(tmp_path):
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(ValueError, match="'bert'; allowed are 'wavlm', 'wav2vec2', 'hubert', 'mamba_ema'"):
        MambaEMAForRegression.from_pretrained_speech_encoder(tmp_path / "bert")
    wavlm = WavLMModel(tiny_config().speech_encoder_config)
    state = {name: tensor for name, tensor in wavlm.state_dict().items() if "layers.1.attention.q_proj" not in name}
    wavlm.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ValueError, match="lacks 2 weights of its speech encoder"):
        MambaEMAForRegression.from_pretrained_speech_encoder(tmp_path / "part")


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_other_pretrained_encoders_give_their_weights_too(tmp_path, kind):
    encoder = tiny_model(speech_encoder_config={"model_type": kind}).speech_encoder.backbone
    encoder.save_pretrained(tmp_path)
    model = MambaEMAForRegression.from_pretrained_speech_encoder(tmp_path, hidden_size=32, head_dim=16)
    assert model.config.speech_encoder_config.model_type == kind
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.speech_encoder.backbone.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "model")
    assert type(AutoModel.from_pretrained(tmp_path / "model").speech_encoder.backbone) is type(encoder)


@pytest.mark.parametrize("nested", [False, True])
def test_a_config_json_cannot_choose_an_attention_kernel(published, tmp_path, nested):
    config = json.loads((published[1] / "config.json").read_text())
    (config["speech_encoder_config"] if nested else config)["_attn_implementation"] = "someone/kernels"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no attention kernel"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_model_card_has_metadata_the_hub_reads(release):
    card = ModelCard.load(release / "README.md")
    assert card.data.pipeline_tag == "audio-classification"
    assert card.data.library_name == "transformers"
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.base_model == "microsoft/wavlm-large"
    assert card.data.language == ["en", "de"]
    assert card.data.datasets == ["demo"]
    found = {result.metric_name: result for result in card.data.eval_results}
    assert set(found) == {"CCC valence", "CCC arousal", "mean CCC"}
    assert found["CCC arousal"].metric_value == 0.6
    assert found["CCC arousal"].metric_args == {"low": 0.4, "high": 0.8}
    assert found["CCC arousal"].dataset_split == "test"
    assert "| 0 | valence | unpleasant | pleasant | 1 to 5 |" in card.text
    assert "| test | 295 | 44 | 0.500 (0.400 to 0.800) | 0.600 (0.400 to 0.800) | 0.700 (0.400 to 0.800) |" in card.text
    assert "python run_finetune.py configuration/demo.yaml training.seed=3" in card.text
    for example in card.data.widget:
        samples, rate = soundfile.read(release / example["src"])
        assert example["example_title"]
        assert rate == 16_000
        assert 1 < len(samples) / rate < 5
        assert {row["label"] for row in example["output"]} == {"valence", "arousal"}
        assert all(0 <= row["score"] <= 1 for row in example["output"])
    for line in card.text.splitlines():
        assert "trust_remote_code=True" not in line or "revision=" in line


def test_a_card_of_an_unknown_training_claims_no_licence_and_no_results(published, tmp_path):
    shutil.copytree(published[1], tmp_path, dirs_exist_ok=True)
    prepare_release(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "records neither training data nor an evaluation" in card.text
    (tmp_path / "README.md").write_text("My own card.")
    prepare_release(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My own card."


def test_the_snippets_of_the_card_run(release, tmp_path):
    card = (release / "README.md").read_text(encoding="utf-8")
    shutil.copyfile(release / "sample_quarrel.wav", tmp_path / "speech.wav")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    program = "\n".join(snippets).replace("path/or/name-of-this-model", str(release)) + "\nprint(outputs.logits.shape)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "'label': 'arousal'" in done.stdout
    assert "torch.Size([1, 2])" in done.stdout


def test_the_snippet_of_the_configuration_prints_pooling_and_attention():
    snippet = textwrap.dedent(
        """
        import yaml
        from modeling_mamba_ema import MambaEMAConfig, MambaEMAForRegression
        params = yaml.safe_load(open("configuration/finetune.yaml"))["model"]["params"]
        model = MambaEMAForRegression(MambaEMAConfig(**params))
        print(f"Pooling: {model.speech_encoder.pooling}")
        print(f"Has attention: {hasattr(model.speech_encoder, 'attention')}")
        """
    )
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=REPOSITORY, timeout=240)
    assert done.stdout == "Pooling: attention\nHas attention: True\n", done.stderr
