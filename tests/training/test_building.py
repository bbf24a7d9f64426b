"""What a run starts from: an adopted model with a change, and the configurations of the repository on tiny models."""

import json
import logging

import pytest
import torch
from transformers import WavLMConfig, WavLMModel

from modeling_mamba_ema import MambaEMAForRegression, tiny_wavlm
from modeling_mamba_ema.adoption import adopt
from modeling_mamba_ema.training import (
    DataSection,
    MambaEMATrainingArguments,
    build_model,
    check_run,
    load_run_configuration,
    load_splits,
)
from tests.support.models import TINY_ENCODER, tiny_config
from tests.support.programs import ROOT, call_program
from tests.support.published_models import NARROW, OdysseyModel, publish, with_random_weights, write_encoder_config
from tests.support.runs import FINETUNE

ADOPTED = ROOT / "configuration" / "finetune_adopted.yaml"
# The corpus has no dominance, which the adopted model predicts.
LABELS = "data.columns={dominance: valence}"


@pytest.fixture(scope="module")
def adopted(tmp_path_factory):
    """The folder of an adopted model of arousal, dominance and valence."""
    folder = tmp_path_factory.mktemp("odyssey")
    publish(with_random_weights(OdysseyModel(NARROW)), folder / "published")
    encoder = write_encoder_config(NARROW, folder / "encoder")
    adopt(str(folder / "published"), folder / "model", encoder_config=str(encoder))
    return folder / "model"


@pytest.fixture
def waveforms():
    """A conversation of three turns, (1, 3, samples)."""
    return torch.randn(1, 3, 6_000, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, waveforms):
    return model.eval()(waveforms).logits


def start_from(adopted, *overrides):
    run = load_run_configuration(ADOPTED, [f"model.pretrained_model={adopted}", *overrides])
    return build_model(run)[0]


@pytest.mark.promise("B-25", "a new context changes no number of a trained model before the first step", "0")
def test_a_run_with_a_new_context_starts_with_the_numbers_of_the_adopted_model(adopted, waveforms, caplog):
    with caplog.at_level(logging.WARNING):
        model = start_from(adopted)
    trained = MambaEMAForRegression.from_pretrained(adopted)
    assert (model.config.context, trained.config.context) == ("mamba_ema", "none")
    assert torch.equal(logits(model, waveforms), logits(trained, waveforms))
    assert "new: head.context_proj, mamba_ema.conversation_encoder" in caplog.text


def test_a_run_with_another_label_keeps_those_that_were_there(adopted, waveforms, corpus, tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps({"label_ranges": {"tension": [1, 5], "arousal": [1, 9]}}))
    labels = "{context: none, id2label: {0: arousal, 1: tension, 2: dominance, 3: valence}}"
    model = start_from(adopted, f"model.params={labels}", f"data.source={tmp_path}")
    expected = logits(MambaEMAForRegression.from_pretrained(adopted), waveforms)
    torch.testing.assert_close(logits(model, waveforms)[..., [0, 2, 3]], expected, atol=1e-6, rtol=0)
    # The corpus' scale for the label that is new; the trained ones keep theirs.
    scales = {label: tuple(scale) for label, scale in model.config.label_ranges.items()}
    assert scales == {"tension": (1, 5), "arousal": (1, 7), "dominance": (1, 7), "valence": (1, 7)}


def test_a_run_with_another_pooling_says_what_is_new(adopted, caplog):
    with caplog.at_level(logging.WARNING):
        model = start_from(adopted, "model.params={context: none, speech_encoder_pooling: attention}")
    assert model.speech_encoder.pooling == "attention"
    assert "changed model" in caplog.text
    trained = MambaEMAForRegression.from_pretrained(adopted)
    assert torch.equal(model.head.out_proj.weight, trained.head.out_proj.weight)


def test_a_model_that_was_saved_in_half_precision_is_trained_in_float32(adopted, tmp_path):
    MambaEMAForRegression.from_pretrained(adopted).bfloat16().save_pretrained(tmp_path)
    for params in ("{}", "{context: ema}"):
        assert {p.dtype for p in start_from(tmp_path, f"model.params={params}").parameters()} == {torch.float32}


def test_a_model_that_is_not_there_is_named_at_once(tmp_path):
    with pytest.raises(OSError, match="nothing"):
        start_from(tmp_path / "nothing")


def test_a_run_that_keeps_the_convolutions_trains_the_transformer_and_what_follows(corpus, tmp_path):
    torch.manual_seed(0)
    WavLMModel(WavLMConfig(**TINY_ENCODER)).save_pretrained(tmp_path / "encoder")
    options = [f"model.pretrained_speech_encoder={tmp_path / 'encoder'}", "model.freeze_feature_encoder=true"]
    options += ["model.params={hidden_size: 64, freeze_speech_encoder: false}", f"data.source={corpus}"]
    options += [f"training.output_dir={tmp_path / 'run'}", "training.num_train_epochs=1", "training.warmup_steps=0"]
    options += ["data.cache_frames=false"]
    assert call_program(FINETUNE, ROOT / "configuration" / "finetune.yaml", *options) == 0
    trained = MambaEMAForRegression.from_pretrained(tmp_path / "run" / "model").speech_encoder.backbone.state_dict()
    before = WavLMModel.from_pretrained(tmp_path / "encoder").state_dict()
    kept = {name for name, weight in before.items() if torch.equal(weight, trained[name])}
    convolutions = {name for name in before if name.startswith("feature_extractor.")}
    assert convolutions <= kept
    assert not any(name.startswith("encoder.layers.0.feed_forward") for name in kept)


def test_before_the_first_step_the_program_has_the_adopted_model(adopted, waveforms, corpus, tmp_path):
    """All learning rates are 0, so that the model it leaves is the one it started from."""
    options = [f"model.pretrained_model={adopted}", f"data.source={corpus}", LABELS, "training.num_train_epochs=1"]
    options += ["training.max_seconds_per_batch=4", f"training.output_dir={tmp_path / 'run'}"]
    options += [f"data.cache_folder={tmp_path / 'frames'}"]
    options += ["model.params.label_ranges={arousal: [0, 1], dominance: [0, 1], valence: [0, 1]}"]
    assert call_program(FINETUNE, ADOPTED, *options, "training.learning_rate=0") == 0
    model = MambaEMAForRegression.from_pretrained(tmp_path / "run" / "model")
    assert model.config.context == "mamba_ema"
    assert torch.equal(logits(model, waveforms), logits(MambaEMAForRegression.from_pretrained(adopted), waveforms))


def test_finetune_lora_runs_on_a_tiny_encoder_with_exact_accumulation_and_checkpointing(corpus, tmp_path):
    torch.manual_seed(0)
    WavLMModel(WavLMConfig(**TINY_ENCODER)).save_pretrained(tmp_path / "encoder")
    options = [f"model.pretrained_speech_encoder={tmp_path / 'encoder'}", f"data.source={corpus}"]
    options += [f"training.output_dir={tmp_path / 'run'}", "training.num_train_epochs=2"]
    options += ["training.max_seconds_per_batch=3", "training.gradient_accumulation_steps=2"]
    options += ["model.params.hidden_size=64"]  # updater heads are 64 wide
    assert call_program(FINETUNE, ROOT / "configuration" / "finetune_lora.yaml", *options) == 0
    adapters = MambaEMAForRegression.from_pretrained(tmp_path / "run" / "model").speech_encoder.backbone.state_dict()
    before = WavLMModel.from_pretrained(tmp_path / "encoder").state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(weight, adapters[name])}
    assert changed == {
        f"encoder.layers.{layer}.feed_forward.{name}.weight"
        for layer in (0, 1)
        for name in ("intermediate_dense", "output_dense")
    }


def test_settings_that_the_pretrained_encoder_s_weights_do_not_fit_are_refused():
    for fields, says in (
        (
            {"num_hidden_layers": 2},
            "has num_hidden_layers, with which the pretrained weights do not fit",
        ),
        ({"conv_dim": [3]}, "speech_encoder_config: .*conv_dim"),
    ):
        with pytest.raises(ValueError, match=says):
            MambaEMAForRegression.from_pretrained_speech_encoder(tiny_wavlm.FOLDER, speech_encoder_config=fields)


def test_a_split_that_is_learned_from_and_measured_on_is_named(corpus, tmp_path, caplog):
    data = DataSection(source=str(corpus), test_split="train", cache_folder=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        load_splits(data, tiny_config(), tmp_path)
    assert "the split train is used twice: what is measured on it is not what the model does on others" in caplog.text


def test_rows_of_a_split_that_is_not_named_are_counted(corpus, tmp_path, caplog):
    data = DataSection(source=str(corpus), test_split=None, cache_folder=str(tmp_path))
    with caplog.at_level(logging.INFO):
        load_splits(data, tiny_config(), tmp_path)
    assert f"splits of {corpus} that are not used: test (10 turns)" in caplog.text


@pytest.mark.parametrize(("threads", "frozen", "advised"), [(2, False, True), (2, True, False), (1, False, False)])
def test_who_trains_an_encoder_by_one_process_on_a_cpu_is_told_of_several(
    corpus, tmp_path, caplog, threads, frozen, advised
):
    config = tiny_config(freeze_speech_encoder=frozen)
    data = DataSection(source=str(corpus), cache_folder=str(tmp_path))
    splits = load_splits(data, config, tmp_path)
    torch.set_num_threads(threads)
    try:
        with caplog.at_level(logging.INFO):
            check_run(config, MambaEMATrainingArguments(output_dir=str(tmp_path), use_cpu=True), data, splits)
    finally:
        torch.set_num_threads(1)
    assert ("cpu_two_processes.yaml --num_processes 2" in caplog.text) == advised
