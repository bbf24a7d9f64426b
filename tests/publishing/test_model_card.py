"""The card of a published model: metadata that the Hub reads, results, snippets that run."""

import re
import shutil

import pytest
import soundfile
from huggingface_hub import ModelCard

from modeling_mamba_ema.publishing import TrainingFacts, prepare_release


@pytest.fixture(scope="module")
def described(saved_model, tmp_path_factory):
    """A release with all that a card can tell."""
    folder = tmp_path_factory.mktemp("described") / "model"
    shutil.copytree(saved_model, folder)
    results = {"test": {"num_turns": 295, "num_conversations": 44}}
    for place, name in enumerate(("ccc_valence", "ccc_arousal", "ccc")):
        results["test"] |= {name: 0.5 + 0.1 * place, f"{name}_low": 0.4, f"{name}_high": 0.8}
    command = "python run_finetune.py configuration/demo.yaml training.seed=3"
    facts = TrainingFacts(
        results, str(folder.parent / "demo"), command, "microsoft/wavlm-large", "cc-by-nc-4.0", ["en", "de"]
    )
    prepare_release(folder, facts)
    return folder


def test_the_model_card_has_metadata_the_hub_reads(described):
    card = ModelCard.load(described / "README.md")
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
    assert "| 0 | valence | unpleasant | pleasant | 1 to 7 |" in card.text
    assert "| test | 295 | 44 | 0.500 (0.400 to 0.800) | 0.600 (0.400 to 0.800) | 0.700 (0.400 to 0.800) |" in card.text
    assert "python run_finetune.py configuration/demo.yaml training.seed=3" in card.text
    for example in card.data.widget:
        samples, rate = soundfile.read(described / example["src"])
        assert example["example_title"]
        assert rate == 16_000
        assert 1 < len(samples) / rate < 5
        assert {row["label"] for row in example["output"]} == {"valence", "arousal"}
        assert all(0 <= row["score"] <= 1 for row in example["output"])
    for line in card.text.splitlines():
        assert "trust_remote_code=True" not in line or "revision=" in line


def test_a_corpus_is_named_by_its_folder_or_by_its_name_on_the_hub(saved_model, tmp_path):
    (tmp_path / "labels.csv").touch()
    assert TrainingFacts({}, str(tmp_path / "labels.csv"), None).corpus == tmp_path.name
    assert TrainingFacts({}, str(tmp_path), None).corpus == tmp_path.name
    shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True)
    prepare_release(tmp_path, TrainingFacts({}, "me/calls, you/talks", None))
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["me/calls", "you/talks"]


def test_a_card_of_an_unknown_training_claims_no_licence_and_no_results(saved_model, tmp_path):
    shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True)
    prepare_release(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "records neither training data nor an evaluation" in card.text
    (tmp_path / "README.md").write_text("My own card.")
    prepare_release(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My own card."


def test_the_snippets_of_the_card_run(described, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(described / "sample_quarrel.wav", "speech.wav")
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", (described / "README.md").read_text(), flags=re.DOTALL):
        exec(snippet.replace("path/or/name-of-this-model", str(described)), names)
    assert "'label': 'arousal'" in capsys.readouterr().out
    assert names["outputs"].logits.shape == (1, 2)
