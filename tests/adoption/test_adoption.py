"""Adopted models give the published numbers, by every way this package has, and nothing else is adopted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoFeatureExtractor, AutoModel, Wav2Vec2FeatureExtractor, WavLMConfig, pipeline

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.__main__ import main
from modeling_mamba_ema.adoption import adopt
from modeling_mamba_ema.audio_files import Recording
from modeling_mamba_ema.configuration_mamba_ema import WAVLM_LARGE
from modeling_mamba_ema.inference import EmotionTracker, emotion_timeline
from modeling_mamba_ema.inference.onnx_export import export_onnx
from modeling_mamba_ema.page import views
from modeling_mamba_ema.publishing.publish import files_to_publish
from modeling_mamba_ema.sample import FOLDER, load_sample_conversation
from tests.support.pickles import pickles
from tests.support.programs import run_program
from tests.support.published_models import (
    LABELS,
    LARGE,
    NARROW,
    AudeeringModel,
    OdysseyModel,
    publish,
    published_weights,
    with_random_weights,
    write_encoder_config,
    write_weights,
)

RATE = 16_000
SHAPES = {
    "odyssey": lambda: OdysseyModel(NARROW),
    "odyssey, valence alone": lambda: OdysseyModel(NARROW, labels=("valence",)),
    "odyssey, two hidden layers": lambda: OdysseyModel(NARROW, layers=2),
    "audeering, 12 layers": lambda: AudeeringModel({**NARROW, "num_hidden_layers": 12}),
    "audeering, 24 layers": lambda: AudeeringModel({**NARROW, "num_hidden_layers": 24}),
}
FILES = {
    "new bin": {"container": "bin"},
    "old bin": {"container": "bin", "old_weight_norm": True},
    "new safetensors": {},
    "old safetensors": {"old_weight_norm": True},
    "sharded safetensors": {"old_weight_norm": True, "shards": 3},
    "sharded bin": {"container": "bin", "shards": 2},
}
MODELS = {"odyssey": OdysseyModel, "audeering": AudeeringModel}


def waveform(samples, seed=0, scale=0.1):
    return torch.from_numpy(np.random.default_rng(seed).normal(0.01, scale, samples).astype(np.float32))


def published_folder(shape, folder, **files):
    """A model, the folder its publisher would have, and what `adopt` must be told beside it."""
    model = with_random_weights(SHAPES[shape]() if isinstance(shape, str) else shape)
    publish(model, folder / "published", **files)
    options = {"published_as": model.published_as}
    if isinstance(model, OdysseyModel):
        options["encoder_config"] = str(write_encoder_config(model.encoder, folder / "encoder"))
    return model, str(folder / "published"), options


@pytest.fixture(scope="module", params=MODELS)
def adopted(request, tmp_path_factory):
    """A published model and the folder it was adopted to."""
    folder = tmp_path_factory.mktemp("adopted")
    model = MODELS[request.param]({**NARROW, "num_hidden_layers": 1})
    model, source, options = published_folder(model, folder, container="bin", old_weight_norm=True)
    adopt(source, folder / "model", **options)
    return model, folder / "model"


def on_scale_of_msp(model, samples):
    with torch.no_grad():
        return 1 + 6 * model(model.normalise(samples))


# Exactness


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_utterance_gets_the_published_numbers_from_every_kind_of_file(tmp_path, shape, files):
    model, source, options = published_folder(shape, tmp_path, **FILES[files])
    adopt(source, tmp_path / "model", **options)
    ours = MambaEMAForRegression.from_pretrained(tmp_path / "model").eval()
    assert ours.config.labels == list(model.labels)
    for samples in (waveform(20_001), waveform(400, seed=1), waveform(9_000, seed=2, scale=0.003)):
        normalised = model.normalise(samples)
        with torch.no_grad():
            torch.testing.assert_close(ours(normalised[None]).logits[0], model(normalised), atol=1e-5, rtol=0)
            double, wide = model.double()(normalised.double()), ours.double()(normalised.double()[None]).logits[0]
        torch.testing.assert_close(wide, double, atol=1e-12, rtol=0)
        model.float(), ours.float()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", MODELS)
def test_at_full_size_an_utterance_gets_the_published_numbers(tmp_path, kind):
    """With the encoder's configuration that is built in."""
    encoder = LARGE if kind == "odyssey" else {**LARGE, "num_hidden_layers": 12}
    model = MODELS[kind](encoder).eval()
    source = publish(model, tmp_path / "published", container="bin", old_weight_norm=True)
    adopted = adopt(str(source), tmp_path / "model", published_as=model.published_as)
    assert adopted.weights_read == len(model.state_dict())
    normalised = torch.stack([model.normalise(waveform(32_000, seed=seed, scale=0.02 + 0.1 * seed)) for seed in (0, 1)])
    with torch.no_grad():
        expected = torch.stack([model(samples) for samples in normalised])
        found = adopted.model(normalised).logits
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_encoder_that_is_built_in_is_that_of_the_published_configuration():
    # microsoft/wavlm-large, config.json: what its weights and its numbers depend on.
    published = {
        **LARGE,
        "conv_bias": False,
        "conv_dim": [512] * 7,
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "feat_extract_activation": "gelu",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_bucket_distance": 800,
        "num_buckets": 320,
        "num_conv_pos_embedding_groups": 16,
        "num_conv_pos_embeddings": 128,
    }
    built_in = WavLMConfig(**WAVLM_LARGE).to_dict()
    assert {name: built_in[name] for name in published} == published


def test_labels_come_in_order_and_on_the_scale_of_the_corpus(adopted):
    model, folder = adopted
    tracker = EmotionTracker.from_pretrained(folder)
    assert tracker.labels == list(LABELS)
    for seed in range(3):
        samples = waveform(12_000, seed=seed)
        expected = on_scale_of_msp(model, samples)
        tracker.reset()
        heard = tracker.update(samples, RATE)
        assert heard.label_values == pytest.approx(dict(zip(LABELS, expected.tolist())), abs=6e-5)
    assert expected.min() < 1 or expected.max() > 7  # what follows is of numbers outside the scale, too


def test_waveforms_are_normalised_as_published(adopted):
    model, folder = adopted
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    samples = waveform(8_000)
    values = extractor(samples, sampling_rate=RATE, return_tensors="pt").input_values[0]
    torch.testing.assert_close(values, model.normalise(samples), atol=1e-6, rtol=0)
    if isinstance(model, AudeeringModel):
        theirs = Wav2Vec2FeatureExtractor(do_normalize=True)(samples.numpy(), sampling_rate=RATE, return_tensors="pt")
        torch.testing.assert_close(values, theirs.input_values[0], atol=1e-5, rtol=0)


# By every way that this package has


def test_batches_conversations_and_streams_give_the_numbers_of_each_utterance_alone(adopted):
    model, folder = adopted
    ours, extractor = MambaEMAForRegression.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    turns = [waveform(samples, seed=samples) for samples in (16_000, 400, 9_999, 30_000)]
    expected = torch.stack([model(model.normalise(turn)) for turn in turns])
    with torch.no_grad():
        batch = ours(**extractor(turns, sampling_rate=RATE, return_tensors="pt"))
        conversation = ours(**extractor([turns], sampling_rate=RATE, return_tensors="pt"))
    torch.testing.assert_close(batch.logits, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(conversation.logits[0], expected, atol=2e-5, rtol=0)
    tracker = EmotionTracker(ours, extractor)
    streamed = [list(tracker.update(turn, RATE).values.values()) for turn in turns]
    torch.testing.assert_close(torch.tensor(streamed), expected, atol=2e-5, rtol=0)


def test_attention_comes_back_as_the_published_weights_over_time(adopted):
    model, folder = adopted
    samples = waveform(12_000)
    attention = EmotionTracker.from_pretrained(folder).update(samples, RATE).attention[0]
    if isinstance(model, AudeeringModel):
        expected = torch.full((len(attention),), 1 / len(attention))
    else:
        frames = model.ssl_model(model.normalise(samples)[None]).last_hidden_state[0]
        scores = torch.tanh(model.pool_model.sap_linear(frames)) @ model.pool_model.attention
        expected = scores.softmax(dim=0)[:, 0]
        assert expected.max() > 2 / len(attention)
    np.testing.assert_allclose(attention, expected.detach(), atol=1e-5)


def test_a_recording_gives_a_timeline_of_published_numbers(adopted):
    model, folder = adopted
    rows = list(emotion_timeline(EmotionTracker.from_pretrained(folder), Recording(FOLDER / "turn0_anna.wav"), 1.0))
    samples = torch.from_numpy(load_sample_conversation()[0]["waveform"])
    assert len(rows) > 1
    for row in rows:
        expected = on_scale_of_msp(model, samples[round(row.start * RATE) : round(row.end * RATE)])
        assert row.heard.label_values == pytest.approx(dict(zip(LABELS, expected.tolist())), abs=1e-4)


def test_the_pipeline_gives_published_numbers(adopted):
    model, folder = adopted
    emotion = pipeline("audio-classification", model=str(folder), trust_remote_code=True)
    rows = emotion((FOLDER / "turn0_anna.wav").read_bytes(), return_label_values=True)
    expected = on_scale_of_msp(model, torch.from_numpy(load_sample_conversation()[0]["waveform"]))
    assert {row["label"]: row["value"] for row in rows} == pytest.approx(dict(zip(LABELS, expected.tolist())), abs=1e-4)


# The encoder and the pooling of the other are exported in tests/inference/test_onnx_export.py.
@pytest.mark.parametrize("adopted", [pytest.param("odyssey", marks=pytest.mark.slow), "audeering"], indirect=True)
def test_onnxruntime_gives_published_numbers(adopted, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, folder = adopted
    export_onnx(MambaEMAForRegression.from_pretrained(folder).eval(), tmp_path)
    sys.path.insert(0, str(tmp_path))
    try:
        from mamba_ema_onnx import OnnxEmotionTracker
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("mamba_ema_onnx", None)
    assert onnxruntime
    tracker = OnnxEmotionTracker(tmp_path)
    for samples in (waveform(12_000), waveform(7_777, seed=1, scale=0.01)):
        expected = on_scale_of_msp(model, samples)
        heard = tracker.update(samples.numpy())
        assert heard["label_values"] == pytest.approx(dict(zip(LABELS, expected.tolist())), abs=1e-4)


def test_the_folder_works_where_the_package_is_not_installed(adopted, tmp_path):
    model, folder = adopted
    program = f"""
import torch
from transformers import AutoFeatureExtractor, AutoModel
options = dict(trust_remote_code=True, revision="main")
model = AutoModel.from_pretrained({str(folder)!r}, **options).eval()
extractor = AutoFeatureExtractor.from_pretrained({str(folder)!r}, **options)
assert "transformers_modules" in type(model).__module__
features = extractor(torch.sin(torch.arange(8000) * 0.05) / 2, sampling_rate=16000, return_tensors="pt")
with torch.no_grad():
    print(model.to_label_ranges(model(**features).logits)[0].tolist())
"""
    clean = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=clean, timeout=200
    )
    assert done.returncode == 0, done.stderr
    expected = on_scale_of_msp(model, torch.sin(torch.arange(8000) * 0.05) / 2)
    assert json.loads(done.stdout) == pytest.approx(expected.tolist(), abs=6e-5)


def test_the_page_and_its_pictures_show_values_outside_the_unit_scale(adopted):
    _, folder = adopted
    tracker = EmotionTracker.from_pretrained(folder)
    turns = [tracker.update(waveform(12_000, seed=seed), RATE, "anna") for seed in range(4)]
    assert any(not 0 <= value <= 1 for turn in turns for value in turn.values.values())
    table = views.numbers(turns, dict.fromkeys(LABELS, (1.0, 7.0)))
    assert f"{turns[-1].label_values['valence']:.2f}" in table
    assert views.trajectory(turns).count("<img") == 2
    assert "<img" in views.attention(waveform(12_000).numpy(), turns[0])


# The folder


def test_the_folder_is_a_release_whose_card_states_licence_corpus_and_published_results(adopted):
    model, folder = adopted
    files = {file.name for file in files_to_publish(folder)}
    assert {"README.md", "handler.py", "model.safetensors", "preprocessor_config.json", "SHA256SUMS"} <= files
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == model.published_as
    assert f"mamba-ema adopt {model.published_as} model" in card.text
    if isinstance(model, OdysseyModel):
        assert card.data.license == "mit"
        assert card.data.datasets == ["MSP-Podcast 1.11"]
        found = {result.metric_name: result for result in card.data.eval_results}
        assert {name: result.metric_value for name, result in found.items()} == {
            "CCC arousal": 0.577,
            "CCC valence": 0.577,
            "CCC dominance": 0.405,
        }
        assert found["CCC arousal"].source_name == f"published with {model.published_as}"
        assert "| Test3 | dominance | 0.405 |" in card.text
        assert "not measured again" in card.text
    else:
        assert card.data.license == "cc-by-nc-sa-4.0"
        assert card.data.datasets == ["MSP-Podcast 1.7"]
        assert card.data.eval_results is None
    assert "cite" in card.text
    assert "| 2 | valence | unpleasant | pleasant | 1 to 7 |" in card.text


def test_the_command_says_licence_corpus_labels_and_that_every_weight_has_its_place(tmp_path, capsys):
    model, source, options = published_folder("odyssey, valence alone", tmp_path)
    arguments = ["adopt", source, str(tmp_path / "model"), "--encoder-config", options["encoder_config"]]
    assert main([*arguments, "--published-as", model.published_as]) == 0
    printed = capsys.readouterr().out
    weights = len(model.state_dict())
    assert "mit\n" in printed
    assert "MSP-Podcast 1.11" in printed
    assert "Goncalves" in printed
    assert "valence (1 to 7)" in printed
    assert f"all {weights} of the file used, all {weights + 1} filled" in printed
    assert main(["predict", "--model", str(tmp_path / "model"), str(FOLDER / "turn0_anna.wav")]) == 0
    with torch.no_grad():
        expected = model(model.normalise(torch.from_numpy(load_sample_conversation()[0]["waveform"])))
    assert f"{expected.item():.3f}" in capsys.readouterr().out


def test_without_a_known_name_neither_licence_nor_corpus_is_claimed(tmp_path, capsys):
    _, source, _ = published_folder("audeering, 12 layers", tmp_path)
    assert main(["adopt", source, str(tmp_path / "model")]) == 0
    assert "not known: ask its publisher" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license is None
    assert "records neither training data" in card.text


def test_a_model_is_adopted_from_the_hub_at_a_revision(tmp_path):
    """From the Hub's cache, without a network: where `hf_hub_download` puts the files."""
    model, source, _ = published_folder("audeering, 12 layers", tmp_path, container="bin")
    repository = tmp_path / "hub" / f"models--{model.published_as.replace('/', '--')}"
    commit = "b" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    (repository / "snapshots").mkdir()
    os.rename(source, repository / "snapshots" / commit)
    command = ["adopt", model.published_as, str(tmp_path / "model"), "--revision", "v1"]
    cached = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    assert "cc-by-nc-sa-4.0" in run_program("-m", "modeling_mamba_ema", *command, **cached).stdout
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert f"mamba-ema adopt {model.published_as} model --revision {commit}" in card.text
    ours, samples = AutoModel.from_pretrained(tmp_path / "model").eval(), model.normalise(waveform(9_000))
    torch.testing.assert_close(ours(samples[None]).logits[0], model(samples), atol=1e-5, rtol=0)


# What is refused


def refused(tmp_path, shape, match, change_weights=None, config=(), error=ValueError, **options):
    model, source, known = published_folder(shape, tmp_path)
    weights = published_weights(model, old_weight_norm=False)
    if change_weights is not None:
        change_weights(weights)
    write_weights(weights, Path(source))
    described = json.loads((Path(source) / "config.json").read_text())
    (Path(source) / "config.json").write_text(json.dumps({**described, **dict(config)}))
    with pytest.raises(error, match=match):
        adopt(source, tmp_path / "model", **{**known, **options})
    assert not (tmp_path / "model").exists()


WRONG_WEIGHTS = {
    "one is missing": (
        "odyssey",
        lambda weights: weights.pop("pool_model.sap_linear.bias"),
        r"1 are missing, by our names: mamba_ema.speech_encoder.attention.hidden.bias",
    ),
    "one of the encoder is missing": (
        "audeering, 12 layers",
        lambda weights: weights.pop("wav2vec2.encoder.layers.3.attention.q_proj.weight"),
        r"1 are missing, by our names: mamba_ema.speech_encoder.wav2vec2.encoder.layers.3.attention.q_proj.weight",
    ),
    "the weight norm's direction is missing": (
        "odyssey",
        lambda weights: weights.pop("ssl_model.encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
        r"1 are missing.*pos_conv_embed.conv.parametrizations.weight.original1",
    ),
    "one too many": (
        "odyssey",
        lambda weights: weights.update({"ser_model.extra": torch.zeros(3)}),
        r"1 have no place in the model: ser_model.extra",
    ),
    "a layer too many": (
        "audeering, 12 layers",
        lambda weights: weights.update({"wav2vec2.encoder.layers.12.layer_norm.weight": torch.zeros(32)}),
        r"1 have no place in the model: wav2vec2.encoder.layers.12.layer_norm.weight",
    ),
    "a bias of the score, which the published form does not have": (
        "odyssey",
        lambda weights: weights.update({"mamba_ema.speech_encoder.attention.score.bias": torch.zeros(1)}),
        r"1 have no place in the model",
    ),
    "a weight under its old and its new name": (
        "audeering, 12 layers",
        lambda weights: weights.update({"wav2vec2.encoder.pos_conv_embed.conv.weight_g": torch.zeros(1, 1, 16)}),
        "pos_conv_embed.conv.parametrizations.weight.original0, which is there already under this or its old name",
    ),
    "another shape": (
        "audeering, 12 layers",
        lambda weights: weights.update({"classifier.dense.weight": torch.zeros(32, 16)}),
        r"1 do not have the shape that the configuration says: classifier.dense.weight \(32, 16\)",
    ),
    "another number of outputs": (
        "odyssey",
        lambda weights: weights.update({"ser_model.out.0.weight": torch.zeros(1, 32)}),
        r"1 do not have the shape that the configuration says: ser_model.out.0.weight \(1, 32\)",
    ),
}


@pytest.mark.parametrize("what", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, what):
    shape, change, match = WRONG_WEIGHTS[what]
    refused(tmp_path, shape, match, change)


WRONG_CONFIGURATIONS = {
    "categories": (
        "odyssey",
        {"id2label": {"0": "Angry", "1": "Sad"}},
        "predicts angry, sad; models of arousal, dominance, valence can be adopted",
    ),
    "a label twice": (
        "odyssey",
        {"id2label": {"0": "valence", "1": "Valence"}},
        "predicts valence, valence; models of",
    ),
    "fewer labels than classes": ("odyssey", {"id2label": {"0": "valence"}}, "num_classes 3; .* with 1"),
    "as many classes as there are no labels": ("odyssey", {"num_classes": 8}, "num_classes 8; .* with 3"),
    "another width than the encoder's": ("odyssey", {"hidden_size": 64}, "hidden_size 64; .* with 32"),
    "more layers than can be adopted": (
        "odyssey",
        {"classifier_hidden_layers": 3},
        "classifier_hidden_layers 3; 1 and",
    ),
    "no deviation": ("odyssey", {"std": None}, "config.json has no std"),
    "a deviation that would make huge values": ("odyssey", {"std": 0.0}, "waveform_std is 0.0; allowed are numbers"),
    "another pooling": ("audeering, 12 layers", {"pooling_mode": "max"}, "pooling_mode 'max'; .* with 'mean'"),
    "a classifier": (
        "audeering, 12 layers",
        {"problem_type": "single_label_classification"},
        "problem_type 'single_label_classification'",
    ),
    "another model": (
        "audeering, 12 layers",
        {"architectures": ["Wav2Vec2ForCTC"]},
        "'wav2vec2', which cannot be adopted",
    ),
    "another rate": ("odyssey", {"sampling_rate": 8_000}, "sampling_rate 8000; .* with 16000"),
}


@pytest.mark.parametrize("what", WRONG_CONFIGURATIONS)
def test_a_configuration_of_another_kind_is_refused(tmp_path, what):
    shape, config, match = WRONG_CONFIGURATIONS[what]
    refused(tmp_path, shape, match, config=config)


def test_a_name_that_does_not_belong_to_the_files_is_refused(tmp_path):
    refused(tmp_path / "a", "odyssey", "has another form or", published_as=AudeeringModel.published_as)
    valence = "3loi/SER-Odyssey-Baseline-WavLM-Valence"
    refused(tmp_path / "b", "odyssey", f"is not {valence}: .* other labels", published_as=valence)
    refused(tmp_path / "c", "odyssey", "no published model that is known; known are 3loi/", published_as="me/mine")


def test_an_encoder_that_the_configuration_holds_itself_cannot_be_given(tmp_path):
    encoder = write_encoder_config(NARROW, tmp_path / "other")
    refused(tmp_path, "audeering, 12 layers", "no other can be given", encoder_config=str(encoder))


def test_another_encoder_than_the_weights_were_made_with_is_refused(tmp_path):
    encoder = write_encoder_config({**NARROW, "conv_bias": True}, tmp_path / "other")
    refused(tmp_path, "odyssey", r"7 are missing.*conv_layers.0.conv.bias", encoder_config=str(encoder / "config.json"))


def test_wavlm_large_is_not_taken_for_an_encoder_of_another_size(tmp_path):
    refused(tmp_path, "odyssey", "hidden_size 32; .* with 1024", encoder_config=None)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    _, source, options = published_folder("audeering, 12 layers", tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="is not empty; name another folder"):
        adopt(source, tmp_path / "model", **options)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]


def test_a_hub_that_cannot_be_reached_is_not_taken_for_a_model_without_files(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="Hub cannot be reached.*hf download me/mine .*adopt FOLDER"):
        adopt("me/mine", tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("preprocessor_config.json", "{", "is no JSON"),
        ("config.json", "[]", "holds a list; names and values"),
    ],
)
def test_a_configuration_that_is_no_json_object_is_named(tmp_path, name, text, says):
    _, source, options = published_folder("odyssey", tmp_path)
    (Path(source) / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} of .* {says}"):
        adopt(source, tmp_path / "model", **options)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_file_that_is_missing_is_named(tmp_path, name):
    _, source, options = published_folder("audeering, 12 layers", tmp_path)
    (Path(source) / name).unlink()
    with pytest.raises((OSError, ValueError), match=name):
        adopt(source, tmp_path / "model", **options)


def test_a_shard_that_is_missing_or_outside_the_folder_is_named(tmp_path):
    _, source, options = published_folder("audeering, 12 layers", tmp_path, shards=2)
    index = Path(source) / "model.safetensors.index.json"
    (Path(source) / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(OSError, match=r"lacks model-00002-of-00002.safetensors, which model.safetensors.index.json"):
        adopt(source, tmp_path / "model", **options)
    index.write_text(index.read_text().replace("model-00002-of-00002", "../elsewhere"))
    with pytest.raises(ValueError, match=r"names '../elsewhere.safetensors'; allowed are files of its own folder"):
        adopt(source, tmp_path / "model", **options)


@pickles
def test_a_pickle_with_code_in_it_is_refused_and_its_code_does_not_run(tmp_path, write_pickle):
    _, source, options = published_folder("audeering, 12 layers", tmp_path)
    (Path(source) / "model.safetensors").unlink()
    write_pickle(Path(source) / "pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged or holds more than tensors"):
        adopt(source, tmp_path / "model", **options)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": torch.zeros(1)}}, {"epoch": 3}])
def test_a_file_of_something_else_than_a_state_dict_is_refused(tmp_path, content):
    _, source, options = published_folder("audeering, 12 layers", tmp_path)
    (Path(source) / "model.safetensors").unlink()
    torch.save(content, Path(source) / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no plain state dict"):
        adopt(source, tmp_path / "model", **options)


@pytest.mark.parametrize(("container", "name"), [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")])
def test_a_damaged_file_is_named(tmp_path, container, name):
    _, source, options = published_folder("audeering, 12 layers", tmp_path, container=container)
    path = Path(source) / name
    path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises((OSError, ValueError), match=f"{name} is damaged"):
        adopt(source, tmp_path / "model", **options)


def test_a_folder_that_does_not_exist_is_named(tmp_path, capsys):
    assert main(["adopt", str(tmp_path / "nothing"), str(tmp_path / "model")]) == 1
    assert str(tmp_path / "nothing") in capsys.readouterr().err


def test_the_extractor_of_an_adopted_model_reaches_a_model_that_takes_its_encoder(adopted):
    model, folder = adopted
    donor = MambaEMAForRegression.from_pretrained_speech_encoder(folder, hidden_size=32, head_dim=16)
    extractor = MambaEMAFeatureExtractor.for_model(donor.config)
    samples = waveform(4_000)
    values = extractor(samples, sampling_rate=RATE, return_tensors="pt").input_values[0]
    torch.testing.assert_close(values, model.normalise(samples), atol=1e-6, rtol=0)


def test_a_weight_that_is_no_number_is_refused(tmp_path):
    def spoil(weights):
        name = next(name for name, weight in weights.items() if weight.is_floating_point())
        weights[name].view(-1)[0] = math.nan

    refused(tmp_path, "odyssey", "hold NaN or infinity", change_weights=spoil)
