"""The predicted spread of the raters: in the model, in training, and wherever its values are shown."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import pipeline

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.ccc_loss import MISSING_LABEL
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.data.normal_form import LabelError
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.metrics.confidence import spread_metrics
from modeling_mamba_ema.training import prediction_table
from modeling_mamba_ema.training.evaluation import predict_in_chunks
from tests.support.models import features, predict, tiny_config, tiny_model
from tests.support.programs import call_command, call_program
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import LABELS, make_trainer, write_run

RADII = {label: {"0.5": 0.5, "0.9": 2.0} for label in LABELS}


def waveforms(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(0, 0.1, length).astype(np.float32) for length in lengths]


def without_and_with_it(**fields):
    """Two models with the same weights but for the head of the spread."""
    plain, model = tiny_model(**fields), tiny_model(predict_spread=True, **fields)
    model.load_state_dict(plain.state_dict(), strict=False)
    return plain, model


def test_a_model_without_it_is_as_it_was_and_one_with_it_gives_the_same_values():
    turns = [waveforms(8_000, 4_000), waveforms(6_000, seed=1)]
    plain, model = without_and_with_it()
    assert "spread" not in predict(plain, turns)
    assert not any("spread" in name for name in plain.state_dict())
    outputs = predict(model, turns)
    assert torch.equal(outputs.logits.nan_to_num(), predict(plain, turns).logits.nan_to_num())
    assert outputs.spread.shape == outputs.logits.shape
    assert torch.equal(outputs.spread.isnan(), outputs.logits.isnan())
    given = outputs.spread[~outputs.spread.isnan()]
    assert bool(((given > 0) & (given < 1)).all())
    assert not torch.allclose(given, outputs.logits[~outputs.logits.isnan()])


def test_it_is_kept_by_saving_and_added_to_a_trained_model_without_changing_its_values(tmp_path):
    plain, model = without_and_with_it()
    model.save_pretrained(tmp_path)
    loaded = MambaEMAForRegression.from_pretrained(tmp_path).eval()
    speech = waveforms(8_000)[0]
    assert torch.equal(predict(loaded, speech).spread, predict(model, speech).spread)
    widened = plain.with_changes(predict_spread=True)
    assert torch.equal(predict(widened, speech).logits, predict(plain, speech).logits)
    more = model.with_changes(id2label={0: "arousal", 1: "dominance", 2: "valence"})
    torch.testing.assert_close(predict(more, speech).spread[:, [2, 0]], predict(model, speech).spread)
    model.config.predict_spread = False
    with pytest.raises(ValueError, match="predict_spread of the configuration was True"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("scope", ["conversation", "both"])
def test_turn_by_turn_is_as_the_whole_conversation_on_the_scale_of_the_labels(scope):
    model = tiny_model(predict_spread=True, context_scope=scope, label_ranges={"valence": (20, 120)})
    turns = waveforms(8_000, 4_000, 12_000)
    whole = predict(model, [turns], speaker_ids=torch.tensor([[0, 1, 0]])).spread[0]
    tracker = EmotionTracker(model, MambaEMAFeatureExtractor())
    for turn, speaker, wanted in zip(turns, ("anna", "ben", "anna"), whole.tolist()):
        heard = tracker.update(turn, 16_000, speaker)
        assert list(heard.spread.values()) == pytest.approx(wanted, abs=1e-5)
        assert heard.label_spread == pytest.approx({"valence": 100 * wanted[0], "arousal": wanted[1]}, abs=1e-3)
        row = tracker.row(heard)
        assert row["valence_spread"] == pytest.approx(wanted[0], abs=1e-4)
        assert row["valence_value_spread"] == pytest.approx(100 * wanted[0], abs=1e-2)
        assert "arousal_value_spread" not in row
    torch.testing.assert_close(
        model.to_label_ranges(whole, differences=True), whole * torch.tensor([100.0, 1.0]), atol=1e-5, rtol=0
    )


def test_intervals_reach_as_far_as_the_spread_says_and_confidence_goes_with_them():
    model = tiny_model(predict_spread=True, interval_radii=RADII, scaled_intervals=True, bounded_predictions=False)
    outputs = predict(model, [waveforms(8_000, 4_000)])
    reach = 2.0 * outputs.spread
    torch.testing.assert_close(outputs.intervals[..., 1] - outputs.intervals[..., 0], 2 * reach)
    tiny = torch.full_like(outputs.spread, 1e-6)  # raters who agree: an interval of some width all the same
    low, high = model.intervals(outputs.logits, tiny).unbind(dim=-1)
    torch.testing.assert_close(high - low, torch.full_like(low, 2 * 2.0 * 0.01))
    assert [model.config.confidence("valence", 0.6, spread) for spread in (0.04, 0.1, 0.3)] == [0.9, 0.5, 0.0]
    with pytest.raises(ValueError, match="give outputs.spread, too"):
        model.intervals(outputs.logits)
    with pytest.raises(ValueError, match="needs predict_spread"):
        tiny_config(interval_radii=RADII, scaled_intervals=True)
    changed = model.config.with_changes(predict_spread=False)
    assert (changed.interval_radii, changed.scaled_intervals) == (None, False)


def test_labels_come_with_the_spread_behind_them_or_without():
    plain, model = without_and_with_it(dtype=torch.float64)
    inputs = features([waveforms(8_000, 4_000), waveforms(6_000, 5_000, seed=1)])
    inputs["input_values"] = inputs["input_values"].double()
    values, spreads = torch.rand(2, 2, 2).double(), 0.3 * torch.rand(2, 2, 2).double()
    with_both = model(**inputs, labels=torch.cat([values, spreads], dim=-1))
    alone = plain(**inputs, labels=values)
    assert float(model(**inputs, labels=values).loss.detach()) == pytest.approx(float(alone.loss.detach()), abs=1e-12)
    outputs = with_both.spread.detach().clamp_min(0)
    quotient = (spreads**2 + 1e-4) / (outputs**2 + 1e-4)
    expected = float(alone.loss.detach()) + float(0.5 * (quotient - 1 - quotient.log()).mean())
    assert float(with_both.loss.detach()) == pytest.approx(expected, abs=1e-9)
    with_both.loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "spread_head" in name)
    with pytest.raises(ValueError, match=r"\(2, 2, 4\): one value for each of .*'arousal_sd'"):
        model(**inputs, labels=torch.rand(2, 2, 3))
    with pytest.raises(ValueError, match=r"\(2, 2, 2\)"):
        tiny_model()(**features([waveforms(8_000, 4_000), waveforms(6_000, 5_000)]), labels=torch.rand(2, 2, 4))


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def spread_split(corpus):
    rows = load_emotion_dataset(corpus, LABELS, with_spread=True)["train"]
    return ConversationDataset(rows, tiny_config(predict_spread=True).target_columns)


def test_deviations_are_read_on_the_scale_of_their_labels(corpus):
    table = pd.read_json(corpus / "metadata.jsonl", lines=True)
    table["file_name"] = [str(corpus / name) for name in table["file_name"]]
    for label in LABELS:
        table[label], table[f"{label}_sd"] = 1 + 6 * table[label], 6 * table[f"{label}_sd"]
    table.loc[0, "arousal_sd"] = None
    ranges = dict.fromkeys(LABELS, (1, 7))
    renamed = table.rename(columns={"valence_sd": "EmoValSd"}).drop(columns="arousal_sd")
    rows = load_emotion_dataset(table_of(table), LABELS, ranges, with_spread=True)["train"].to_pandas()
    assert rows["arousal_sd"][0] == MISSING_LABEL
    expected = 0.05 + 0.8 * rows["valence"] * (1 - rows["valence"])
    np.testing.assert_allclose(rows["valence_sd"], expected, atol=1e-3)
    mapping = {"valence_sd": "EmoValSd"}
    rows = load_emotion_dataset(table_of(renamed), LABELS, ranges, mapping, with_spread=True)["train"].to_pandas()
    np.testing.assert_allclose(rows["valence_sd"], expected, atol=1e-3)
    assert (rows["arousal_sd"] == MISSING_LABEL).all()
    table.loc[1, "valence_sd"] = 6.5
    with pytest.raises(LabelError, match=r"valence_sd is 6.5 .*\[1, 7\], from 0 to 6"):
        load_emotion_dataset(table_of(table), LABELS, ranges, with_spread=True)


def table_of(frame):
    from datasets import Dataset, DatasetDict

    splits = frame.groupby("split", sort=False)
    return DatasetDict({name: Dataset.from_pandas(rows.drop(columns="split")) for name, rows in splits})


def test_chunks_give_the_same_as_whole_conversations(tmp_path, spread_split):
    model = tiny_model(predict_spread=True)
    whole = make_trainer(tmp_path, spread_split, model).predict(spread_split)
    chunked = make_trainer(tmp_path, spread_split, model, turns_per_chunk=2).predict(spread_split)
    assert whole.predictions.shape[-1] == 4
    assert chunked.predictions == pytest.approx(whole.predictions, abs=1e-6, nan_ok=True)
    assert chunked.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], abs=1e-6)
    item = make_trainer(tmp_path, spread_split, model).data_collator([spread_split[3]])
    with torch.no_grad():
        assert predict_in_chunks(model, item, 1).shape == (1, 4, 4)
    table = prediction_table(whole.predictions, spread_split, model.config)
    assert table["spread"].between(0, 1).all()
    truth = table["reference_spread"] - (0.05 + 0.8 * table["reference"] * (1 - table["reference"]))
    assert truth.abs().max() < 1e-3


def test_training_learns_it_beside_the_values(tmp_path, spread_split):
    model = MambaEMAForRegression(tiny_config(predict_spread=True, context="none"))
    before = spread_metrics(table_of_predictions(tmp_path, spread_split, model), model.config)
    arguments = {
        "max_steps": 40,
        "learning_rate": 5e-3,
        "max_seconds_per_batch": 100.0,
        "lr_scheduler_type": "constant",
    }
    make_trainer(tmp_path, spread_split, model, **arguments).train()
    after = spread_metrics(table_of_predictions(tmp_path, spread_split, model), model.config)
    assert after["spread_ccc_arousal"] > 0.5 > before["spread_ccc_arousal"]


def table_of_predictions(tmp_path, dataset, model):
    predictions = make_trainer(tmp_path, dataset, model).predict(dataset).predictions
    return prediction_table(predictions, dataset, model.config)


def test_a_run_measures_it_and_every_door_shows_it(corpus, saved_model, tmp_path, capsys):
    run = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    options = ["model.params.predict_spread=true", "model.params.interval_level=0.8", "training.num_train_epochs=1"]
    assert call_program(FINETUNE, run, *options) == 0
    model = tmp_path / "run" / "model"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    table = pd.read_csv(tmp_path / "run" / "predictions_test.csv")
    for label in LABELS:
        rows = table[table["label"] == label]
        ranks = rows[["prediction", "spread"]].assign(error=(rows["reference"] - rows["prediction"]).abs()).rank()
        correlation = np.corrcoef(ranks["error"], ranks["spread"])[0, 1]
        assert results["test"][f"error_with_spread_{label}"] == pytest.approx(correlation, abs=1e-6)
        for name in (f"spread_ccc_{label}", f"error_with_spread_{label}"):
            low, high = results["test"][f"{name}_low"], results["test"][f"{name}_high"]
            assert -1 <= low <= high <= 1
    tracker = EmotionTracker.from_pretrained(model)
    config = tracker.model.config
    assert config.scaled_intervals
    reach = table["label"].map(config.interval_radius) * table["spread"].clip(lower=0.01)
    np.testing.assert_allclose(table["low"], (table["prediction"] - reach).clip(lower=0), atol=1e-6)
    assert results["test"]["coverage_valence"] >= 0
    card = (model / "README.md").read_text()
    assert "outputs.spread" in card
    assert f"valence {results['test']['spread_ccc_valence']:.3f}" in card

    assert call_command("evaluate", "--model", model, corpus, "--output", tmp_path / "evaluation") == 0
    printed = capsys.readouterr().out
    assert f"spread of the raters, CCC valence {results['test']['spread_ccc_valence']:.3f}" in printed
    assert "error of arousal with its spread, rank correlation" in printed
    assert "spread_ccc_arousal_low" in json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    file = table["file_name"].iloc[0]
    heard = tracker.update(file)
    assert call_command("predict", "--model", model, file, "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["valence_spread"] == pytest.approx(heard.spread["valence"], abs=1e-4)
    emotion = pipeline("audio-classification", model=str(model), trust_remote_code=True, revision="main")
    asked = {"return_spread": True, "return_intervals": True, "return_label_values": True, "allow_paths": True}
    for answer in emotion(file, **asked):
        label = answer["label"]
        assert answer["spread"] == pytest.approx(heard.spread[label], abs=1e-5)
        assert answer["value_spread"] == pytest.approx(heard.label_spread[label], abs=1e-5)
        assert answer["interval"] == pytest.approx(heard.intervals[label], abs=1e-5)
        assert answer["confidence"] == heard.confidence[label]
    turns = emotion([Path(file).read_bytes()] * 2, speakers=["a", "b"], return_spread=True)
    assert [sorted(scores["label"] for scores in turn["scores"] if scores["spread"] > 0) for turn in turns] == [
        ["arousal", "valence"]
    ] * 2
    plain = pipeline("audio-classification", model=str(saved_model), trust_remote_code=True, revision="main")
    with pytest.raises(ValueError, match="predicts no spread"):
        plain(file, return_spread=True)


def test_a_corpus_without_deviations_is_refused_before_training(corpus, tmp_path, capsys):
    table = pd.read_json(corpus / "metadata.jsonl", lines=True).drop(columns="arousal_sd")
    table["file_name"] = [str(corpus / name) for name in table["file_name"]]
    table.to_json(tmp_path / "metadata.jsonl", lines=True, orient="records")
    run = write_run(tmp_path / "run.yaml", tmp_path, tmp_path / "run")
    assert call_program(FINETUNE, run, "model.params.predict_spread=true") != 0
    assert "has no arousal_sd: it needs the standard deviation of the raters" in capsys.readouterr().err


@pytest.mark.slow
def test_votes_of_real_listeners_can_be_learned(tmp_path, emodb):
    command = ["prepare", "emodb", emodb / "audio", emodb / "sievers2019_study_5_data.csv"]
    assert call_command(*command, "--output", tmp_path / "data") == 0
    options = [f"data.source={tmp_path / 'data'}", f"data.cache_folder={tmp_path / 'frames'}"]
    options += [f"training.output_dir={tmp_path / 'run'}", "model.params.predict_spread=true"]
    options += ["data.train_split=train", "data.validation_split=validation"]  # which makes the intervals
    assert call_program(FINETUNE, "configuration/emodb.yaml", *options) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    assert {f"spread_ccc_{label}" for label in LABELS} <= results.keys()
    assert 0.7 < results["coverage_arousal"] <= 1
