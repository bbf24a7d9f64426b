"""What test_finetuning.py leaves open about configurations of runs."""

import pytest

from modeling_mamba_ema.training import differences, load_run_configuration


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run_configuration(path, overrides)


def test_two_starting_points_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"leave out model.pretrained_speech_encoder"):
        load(tmp_path, "model: {pretrained_model: a, pretrained_speech_encoder: b}")


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path):
    with pytest.raises(ValueError, match="larger than"):
        load(tmp_path, "# " + "x" * 1_000_001)


def test_what_is_saved_loads_as_the_same_run(tmp_path):
    run = load(tmp_path, "model: {params: {context: ema}}", "training.learning_rate=1e-5", "data.source=a")
    run.save(tmp_path / "saved.yaml")
    loaded = load_run_configuration(tmp_path / "saved.yaml")
    assert loaded.to_dict() == run.to_dict()
    assert loaded.training_arguments() == run.training_arguments()


def test_a_run_differs_from_a_saved_one_only_in_what_changes_its_weights(tmp_path):
    load(tmp_path, "{}").save(tmp_path / "saved.yaml")
    same = load(tmp_path, "{}", "training.resume_from_checkpoint=null", "training.report_to=tensorboard")
    assert differences(tmp_path / "saved.yaml", same) == []
    other = load(tmp_path, "{}", "training.seed=5")
    assert differences(tmp_path / "saved.yaml", other) == ["training.seed: default -> 5"]
