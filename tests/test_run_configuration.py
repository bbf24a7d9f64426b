"""Configurations of runs: read safely, refused when misspelt, saved as they were resolved."""

from pathlib import Path

import pytest

from modeling_mamba_ema import MambaEMAConfig
from modeling_mamba_ema.training import load_run_configuration

CONFIGURATIONS = sorted((Path(__file__).parents[1] / "configuration").glob("*.yaml"))


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run_configuration(path, overrides)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_shipped_configurations_build_a_model_configuration_with_attention(path):
    config = MambaEMAConfig(**load_run_configuration(path).model.params)
    assert config.speech_encoder_pooling == "attention"


def test_command_line_wins_over_the_file_and_reads_1e5_as_a_number(tmp_path):
    run = load(
        tmp_path,
        "training: {learning_rate: 0.1}",
        "training.learning_rate=1e-5",
        "model.params.context=ema",
        "data.test_split=null",
        "training.patience=3",
    )
    assert (run.training.learning_rate, run.training.patience) == (1e-5, 3)
    assert run.model.params == {"context": "ema"}
    assert run.data.test_split is None


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (
            "training: {learning_rat: 1}",
            None,
            "unknown key training.learning_rat; did you mean training.learning_rate?",
        ),
        ("trainning: {}", None, "did you mean training?"),
        ("{}", "data.sorce=x", "did you mean data.source?"),
        ("training: {patience: many}", None, "training.patience is 'many', but must be int or null"),
        ("training: {bf16: 1}", None, "training.bf16 is 1, but must be bool"),
        ("training: {epochs: true}", None, "training.epochs is True"),
        ("training: 3", None, "training must be a section"),
        ("{}", "training.seed", "is no override"),
        ("training: {seed: !!python/object/apply:os.getpid []}", None, "is no plain YAML"),
        ("model: {pretrained_model: a, pretrained_speech_encoder: b}", None, "leave out model.params"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, override, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load(tmp_path, text, *([override] if override else []))


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path):
    with pytest.raises(ValueError, match="larger than"):
        load(tmp_path, "# " + "x" * 1_000_001)


def test_what_is_saved_loads_as_the_same_run(tmp_path):
    run = load(tmp_path, "model: {params: {context: ema}}", "training.learning_rate=1e-5", "data.source=a")
    run.save(tmp_path / "saved.yaml")
    assert load_run_configuration(tmp_path / "saved.yaml") == run
