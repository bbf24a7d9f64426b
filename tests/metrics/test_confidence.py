"""Intervals: what they promise over conversations, and what is left where only confident predictions are kept."""

import json
import re

import audmetric
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.metrics.confidence import (
    add_intervals,
    calibrate,
    conformal_quantile,
    coverage,
    risk_against_coverage,
    spread_metrics,
)
from tests.support.models import tiny_config
from tests.support.programs import call_command, call_program
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import LABELS, write_run


def conversations(seed, count, first=0):
    """Predictions whose error depends on the conversation, and conversations of 1 to 40 turns, the worse the longer."""
    random = np.random.default_rng(seed)
    parts = []
    for conversation in range(first, first + count):
        spread = random.gamma(2.0, 0.04)
        turns = min(40, 1 + int(200 * spread**1.5 * random.random()))
        for label in LABELS:
            truth = random.uniform(0.2, 0.8, turns)
            shift = random.normal(0, spread)  # what the turns of a conversation share
            rows = {"conversation_id": f"c{conversation}", "label": label, "reference": truth}
            parts.append(pd.DataFrame({**rows, "prediction": truth + shift + random.normal(0, spread / 2, turns)}))
    return pd.concat(parts, ignore_index=True)


@pytest.mark.promise("B-26", "intervals hold the share of turns of new conversations that was asked for", "3 points")
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_hold_what_they_were_asked_for_on_new_conversations_over_20_seeds(level, record_property):
    held, by_turns = [], []
    for seed in range(20):
        table = conversations(seed, 160)
        new = table["conversation_id"].str[1:].astype(int) >= 60
        config = tiny_config(interval_level=level, bounded_predictions=False)
        calibrate(config, table[~new])
        found = coverage(add_intervals(table[new], config), config)
        held.append([found[f"coverage_{label}"] for label in LABELS])
        # As if turns were exchangeable: long conversations, which are the worse ones, count more.
        residuals = (table["reference"] - table["prediction"]).abs()
        naive = {label: float(np.quantile(residuals[~new & (table["label"] == label)], level)) for label in LABELS}
        config.interval_radii = {label: {f"{level:g}": radius} for label, radius in naive.items()}
        by_turns.append(list(coverage(add_intervals(table[new], config), config).values()))
    record_property(
        "figure",
        f"asked for {level:.0%}, held {np.mean(held):.1%}, {np.min(held):.0%} to {np.max(held):.0%} after single "
        f"calibrations; {np.mean(by_turns):.1%} with every turn counted alike",
    )
    assert np.mean(held, axis=0) == pytest.approx([level] * 2, abs=0.03)
    assert abs(np.mean(by_turns) - level) > 0.03


def conversations_with_spread(seed, lengths, kind):
    """Predictions whose error has little to do with the predicted spread: `kind` says what that is."""
    random = np.random.default_rng(seed)
    parts = []
    for conversation, turns in enumerate(lengths):
        error = random.standard_t(1.5, turns) * random.gamma(1.0, 0.1)
        spread = {
            "right": np.abs(error) + 0.01,
            "noise": random.gamma(0.5, 0.1, turns),
            "upside down": 0.01 / (np.abs(error) + 0.001),
            "zero": np.zeros(turns),
        }[kind]
        rows = {"conversation_id": f"c{conversation}", "label": "valence", "reference": 0.5}
        parts.append(pd.DataFrame({**rows, "prediction": 0.5 + error, "spread": spread}))
    return pd.concat(parts, ignore_index=True)


def with_spread_of_valence(**fields):
    return tiny_config(id2label={0: "valence"}, bounded_predictions=False, predict_spread=True, **fields)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 12), min_size=10, max_size=12),
    st.sampled_from(["right", "noise", "upside down", "zero"]),
    st.sampled_from([0.5, 0.8, 0.9]),
)
@example(0, [1, 12, 5, 3, 2, 9, 1, 1, 4, 6], "upside down", 0.9)
@example(1, [3] * 10, "zero", 0.8)
def test_scaled_intervals_hold_what_was_asked_for_whatever_the_spread_is_worth(seed, lengths, kind, level):
    # Conversations are exchangeable: each is the new one as likely. So over all that may be it, on average.
    table = conversations_with_spread(seed, lengths, kind)
    config = with_spread_of_valence(interval_level=level)
    held = []
    for new in table["conversation_id"].unique():
        is_new = table["conversation_id"] == new
        calibrate(config, table[~is_new])
        assert config.scaled_intervals
        held.append(coverage(add_intervals(table[is_new], config), config)["coverage_valence"])
    assert np.mean(held) >= level - 1e-9
    if kind == "zero":  # counts as 0.01
        reach = add_intervals(table, config)["high"] - table["prediction"]
        np.testing.assert_allclose(reach, 0.01 * config.interval_radius("valence"), rtol=1e-9)


def test_scaled_intervals_are_as_long_as_the_spread_is():
    config = with_spread_of_valence()
    table = conversations_with_spread(0, [5] * 60, "right")
    calibrate(config, table)
    table = add_intervals(table, config)
    assert (table["high"] - table["low"]).corr(table["spread"]) > 0.99


def test_the_worth_of_a_spread_is_its_ccc_and_whether_errors_grow_with_it():
    random = np.random.default_rng(0)
    table = conversations(0, 40)
    errors = (table["reference"] - table["prediction"]).abs()
    table["spread"] = errors * random.uniform(0.2, 1.0, len(table))
    table["reference_spread"] = table["spread"] + random.normal(0, 0.01, len(table))
    table.loc[3, ["reference_spread", "reference"]] = np.nan
    config = tiny_config(predict_spread=True)
    found = spread_metrics(table, config)
    for label in LABELS:
        rows = table[(table["label"] == label) & table["reference"].notna()]
        error = (rows["reference"] - rows["prediction"]).abs()
        expected = scipy.stats.spearmanr(error, rows["spread"]).statistic
        name = f"error_with_spread_{label}"
        assert found[name] == pytest.approx(expected, abs=1e-12)
        assert found[f"{name}_low"] < expected < found[f"{name}_high"]
        expected = audmetric.concordance_cc(rows["reference_spread"].to_numpy(), rows["spread"].to_numpy())
        name = f"spread_ccc_{label}"
        assert found[name] == pytest.approx(expected, abs=1e-12)
        assert found[f"{name}_low"] < expected < found[f"{name}_high"]
    renamed = table.assign(conversation_id=table["conversation_id"].map(lambda name: name[::-1]))
    assert spread_metrics(renamed, config) == found
    unrated = spread_metrics(table.assign(reference_spread=np.nan), config)
    assert set(unrated) == {name for name in found if name.startswith("error")}
    longest = table["conversation_id"].value_counts().index[0]
    single = spread_metrics(table[table["conversation_id"] == longest], config)
    assert "error_with_spread_valence" in single
    assert "error_with_spread_valence_low" not in single
    assert spread_metrics(conversations(0, 2), tiny_config()) == {}


def test_the_quantile_is_the_smallest_reach_of_the_papers_sum():
    random = np.random.default_rng(0)
    groups = random.integers(0, 15, 100)
    residuals = random.exponential(size=100).round(1)  # with ties
    count = len(set(groups))
    for level in (0.05, 0.3, 0.5, 0.85, 0.9, 0.93):
        share = {
            reach: sum(np.mean(residuals[groups == group] <= reach) for group in set(groups)) / (count + 1)
            for reach in sorted(set(residuals))
        }
        expected = next((reach for reach, held in share.items() if held >= level - 1e-12), np.inf)
        assert conformal_quantile(residuals, groups, level) == expected
    # Conversations of one turn: the quantile of Lei et al. 2018, the ceil((n + 1) q)-th smallest of n.
    single = random.normal(size=19) ** 2
    for level in (0.1, 0.5, 0.9, 0.95):
        assert conformal_quantile(single, range(19), level) == np.sort(single)[round(20 * level) - 1]
    assert conformal_quantile(single, range(19), 0.96) == np.inf


def test_too_few_conversations_give_no_intervals_and_say_so(caplog):
    config = tiny_config(interval_radii={label: {"0.9": 0.1} for label in LABELS})
    calibrate(config, conversations(0, 8))
    assert config.interval_radii is None
    assert "8 conversations have a label for valence, too few for intervals that hold 0.9" in caplog.text
    calibrate(config, conversations(0, 9))
    assert set(config.interval_radii) == set(LABELS)


def test_risk_is_that_of_the_predictions_that_are_kept():
    config = tiny_config(interval_radii={label: {"0.5": 0.1, "0.9": 0.3} for label in LABELS})
    table = pd.DataFrame(
        {
            "conversation_id": ["a", "a", "b", "b", "b"],
            "label": "valence",
            "reference": [0.4, 0.2, 0.9, 0.7, np.nan],
            "prediction": [0.55, 0.65, 0.85, 0.62, 0.9],
        }
    )
    table = add_intervals(table, config)
    assert table["confidence"].tolist() == [0, 0.5, 0.9, 0.5, 0.9]
    assert table["high"].tolist() == pytest.approx([0.85, 0.95, 1.0, 0.92, 1.0])
    assert coverage(table, config) == {"coverage_valence": pytest.approx((0.5 + 1) / 2)}
    risk = risk_against_coverage(table, config).set_index("min_confidence")
    assert risk.loc[0.0, ["kept", "wrong_side"]].tolist() == [1, 0.5]
    assert risk.loc[0.5, ["kept", "wrong_side", "mae"]].tolist() == pytest.approx(
        [0.75, 1 / 3, (0.45 + 0.05 + 0.08) / 3]
    )
    assert risk.loc[0.9, ["kept", "wrong_side"]].tolist() == [0.25, 0]
    assert 0.95 not in risk.index


def test_a_run_measures_intervals_which_evaluation_prediction_and_card_show(corpus, tmp_path, capsys):
    run = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    options = ["training.num_train_epochs=1", "model.params.interval_level=0.8"]  # five conversations, four needed
    assert call_program(FINETUNE, run, *options) == 0
    model, results = tmp_path / "run" / "model", json.loads((tmp_path / "run" / "results.json").read_text())
    table = pd.read_csv(tmp_path / "run" / "predictions_test.csv")
    held = table["reference"].between(table["low"], table["high"])[table["label"] == "valence"]
    by_conversation = held.groupby(table["conversation_id"]).mean()
    assert results["test"]["coverage_valence"] == pytest.approx(by_conversation.mean())
    assert "coverage_valence" not in results["validation"]  # it made the intervals
    card = (model / "README.md").read_text()
    assert f"`test`: valence {100 * results['test']['coverage_valence']:.1f} %" in card
    assert "about 80 % of the labels lie between them" in card

    assert call_command("evaluate", "--model", model, corpus, "--output", tmp_path / "evaluation") == 0
    assert "coverage of the 80 % intervals: valence" in capsys.readouterr().out
    risk = pd.read_csv(tmp_path / "evaluation" / "risk_coverage.csv")
    assert risk.groupby("label")["kept"].apply(lambda kept: kept.is_monotonic_decreasing).all()
    assert (tmp_path / "evaluation" / "risk_coverage.png").stat().st_size > 5_000

    files = table["file_name"].drop_duplicates()[:3]
    tracker = EmotionTracker.from_pretrained(model)
    config = tracker.model.config
    assert call_command("predict", "--model", model, *files, "--json") == 0
    for line, file in zip(capsys.readouterr().out.splitlines(), files):
        row, value = json.loads(line), tracker.update(file).values["valence"]
        radius = config.interval_radius("valence")
        assert row["valence_low"] == pytest.approx(max(0, value - radius), abs=1e-4)
        assert row["valence_high"] == pytest.approx(min(1, value + radius), abs=1e-4)
        assert row["valence_confidence"] == config.confidence("valence", value)
        tracker.reset()
    for option, kept in (("--min-confidence=0", True), ("--max-width=0.01", False), ("--min-confidence=1", False)):
        assert call_command("predict", "--model", model, files.iloc[0], "--json", option) == 0
        row = json.loads(capsys.readouterr().out)
        for name in ("valence", "valence_low", "valence_high"):
            assert (row[name] is not None) is kept
        assert row["valence_confidence"] is not None
        assert kept or row["reading"] == ""


def test_the_program_measures_coverage_over_random_splits_of_conversations(corpus, tmp_path, capsys):
    run = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    options = ["training.num_train_epochs=1", "model.params.interval_level=0.8", "model.params.predict_spread=true"]
    assert call_program("benchmarks/coverage.py", run, *options, "--splits", "2") == 0
    printed = capsys.readouterr().out
    singles = re.findall(r"split \d, (.*): valence held ([\d.]+)%", printed)
    assert [kind for kind, _ in singles] == ["scaled by the spread", "of one length"] * 2
    mean = np.mean([float(held) for kind, held in singles if kind == "of one length"])
    found = re.search(r"intervals of one length, valence: held ([\d.]+)% on average", printed)
    assert float(found[1]) == pytest.approx(mean, abs=0.11)
    assert "asked for 80%, over 2 splits" in printed
    assert "error_with_spread_arousal" in printed


def test_a_model_without_intervals_cannot_be_filtered_by_them(saved_model, tmp_path, capsys):
    assert call_command("predict", "--model", saved_model, "x.wav", "--max-width", "0.5") == 1
    assert "has no intervals, which --min-confidence and --max-width need" in capsys.readouterr().err
