"""Saving and loading: what a folder holds, and that it gives the same model back."""

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
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
from tests.support.audio_cases import noise
from tests.support.models import predict, tiny_config, tiny_model
from tests.support.pickles import pickles, plain_pickle

PACKAGE = Path(modeling_mamba_ema.__file__).parent


def assert_same_numbers(model, other):
    turns = [[noise(8_000), noise(3_000, 1)]]
    assert torch.equal(predict(model, turns).logits, predict(other, turns).logits)


def test_a_saved_folder_holds_weights_settings_and_at_most_twelve_files_of_code(saved_model):
    names = {path.name for path in saved_model.iterdir()}
    code = {name for name in names if name.endswith(".py")}
    assert names - code == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert code <= {path.name for path in PACKAGE.glob("*.py")}
    assert len(code) <= 12
    auto_map = json.loads((saved_model / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification", "AutoFeatureExtractor"}
    for reference in auto_map.values():
        assert reference.split(".")[0] + ".py" in names


def test_every_entry_file_names_all_the_files_it_needs(saved_model):
    """Until 5.8 transformers copied, for a local folder, no more than the files that the entry file itself names."""
    config = json.loads((saved_model / "config.json").read_text())
    references = [*config["auto_map"].values(), *(task["impl"] for task in config["custom_pipelines"].values())]
    for entry in {reference.split(".")[0] for reference in references}:
        named = imported_files(saved_model / f"{entry}.py")
        needed, found = set(), set(named)
        while found:
            needed |= found
            found = {name for file in found for name in imported_files(saved_model / f"{file}.py")} - needed
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
    folder = Path(__file__).parent / "saved_models" / name
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
    torch.testing.assert_close(logits, before, atol=2e-6, rtol=0, equal_nan=True)


def test_a_model_alone_writes_its_feature_extractor_too(tmp_path):
    tiny_model(do_normalize=False).save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert isinstance(loaded, MambaEMAFeatureExtractor)
    assert loaded.do_normalize is False


def test_the_installed_package_needs_no_remote_code(saved_model):
    for auto in (AutoModel, AutoModelForAudioClassification):
        loaded = auto.from_pretrained(saved_model).eval()
        assert type(loaded) is MambaEMAForRegression
        assert_same_numbers(loaded, tiny_model())
    assert type(AutoConfig.from_pretrained(saved_model)) is MambaEMAConfig
    assert type(AutoFeatureExtractor.from_pretrained(saved_model)) is MambaEMAFeatureExtractor


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


@pytest.mark.promise("B-01")
def test_saving_loading_and_saving_again_gives_the_same_file(saved_model, tmp_path):
    AutoModel.from_pretrained(saved_model).save_pretrained(tmp_path)
    digests = {hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in (saved_model, tmp_path)}
    assert len(digests) == 1


def test_a_parameter_missing_from_the_checkpoint_is_initialised_and_the_others_are_kept(tmp_path):
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


def test_weights_load_in_bfloat16_and_states_stay_float32(saved_model):
    model = AutoModel.from_pretrained(saved_model, dtype=torch.bfloat16).eval()
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        outputs = model(torch.randn(1, 4_000), use_conversation_state=True)
    assert outputs.logits.dtype == torch.float32
    assert outputs.conversation_state.mamba[0].ssm.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps_work(saved_model, device_map):
    model = AutoModel.from_pretrained(saved_model, device_map=device_map).eval()
    assert_same_numbers(model, tiny_model())


@pytest.mark.promise("B-14", "gradient checkpointing changes no gradient; the re-entrant kind is refused", "bitwise")
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


def test_the_malicious_pickle_is_one(tmp_path):
    plain_pickle(tmp_path / "evil", tmp_path / "witness")
    pickle.loads((tmp_path / "evil").read_bytes())
    assert (tmp_path / "witness").exists()


@pytest.mark.promise("E-05", "pickles in a model or a checkpoint run nothing", "0")
@pickles
@pytest.mark.parametrize("auto", [True, False], ids=["AutoModel", "class"])
def test_pickled_weights_are_neither_run_nor_read(saved_model, tmp_path, write_pickle, auto):
    shutil.copytree(saved_model, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    write_pickle(tmp_path / "copy" / "pytorch_model.bin", tmp_path / "witness")
    with pytest.raises(OSError, match="safetensors"):
        (AutoModel if auto else MambaEMAForRegression).from_pretrained(tmp_path / "copy")
    assert not (tmp_path / "witness").exists()


@pytest.mark.promise("E-05")
@pickles
def test_a_pickle_that_is_asked_for_or_is_a_wavlms_runs_nothing(saved_model, tmp_path, write_pickle):
    shutil.copytree(saved_model, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    write_pickle(tmp_path / "copy" / "pytorch_model.bin", tmp_path / "witness")
    with pytest.raises((pickle.UnpicklingError, OSError, RuntimeError)):
        MambaEMAForRegression.from_pretrained(tmp_path / "copy", use_safetensors=False)
    tiny_model().config.speech_encoder_config.save_pretrained(tmp_path / "copy")
    with pytest.raises((pickle.UnpicklingError, OSError, RuntimeError)):
        MambaEMAForRegression.from_pretrained_speech_encoder(tmp_path / "copy")
    assert not (tmp_path / "witness").exists()
