"""The `ccc` metric: parity with audmetric, torchmetrics and scipy, degenerate input, intervals over conversations."""

import warnings

import audmetric
import evaluate
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchmetrics.functional import concordance_corrcoef

from modeling_mamba_ema.metrics import (
    bootstrap_intervals,
    ccc_metric_path,
    concordance_cc,
    paired_bootstrap_difference,
)


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(ccc_metric_path(), cache_dir=str(tmp_path))


def pairs(turns, seed=0):
    generator = np.random.default_rng(seed)
    truth = generator.uniform(size=turns)
    return 0.3 + 0.5 * truth + generator.normal(0, 0.1, turns), truth


@pytest.mark.promise("B-17", "the CCC metric equals audmetric's, in batches of any size", "1e-12")
@pytest.mark.parametrize("turns", [2, 3, 10, 1_000, 100_000])
def test_equals_audmetric(turns):
    y, t = pairs(turns)
    assert concordance_cc(y, t) == pytest.approx(audmetric.concordance_cc(t, y), abs=1e-12)


@pytest.mark.promise("B-17")
@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, st.tuples(st.just(2), st.integers(2, 40)), elements=st.floats(-5, 5, width=32)))
def test_equals_audmetric_on_any_numbers(values):
    y, t = values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = concordance_cc(y, t), audmetric.concordance_cc(t, y)
    np.testing.assert_allclose(ours, theirs, atol=1e-12, equal_nan=True)


@pytest.mark.promise("B-17")
def test_differs_from_torchmetrics_only_by_sample_moments():
    y, t = pairs(50)
    n = len(y)
    cov, var_y, var_t = np.cov(y, t)[0, 1], y.var(ddof=1), t.var(ddof=1)
    sample_form = 2 * cov / (var_y + var_t + (y.mean() - t.mean()) ** 2)
    theirs = float(concordance_corrcoef(torch.from_numpy(y), torch.from_numpy(t)))
    assert theirs == pytest.approx(sample_form, abs=1e-12)
    scale = (n - 1) / n
    population = 2 * cov * scale / ((var_y + var_t) * scale + (y.mean() - t.mean()) ** 2)
    assert concordance_cc(y, t) == pytest.approx(population, abs=1e-12)


@pytest.mark.promise("B-17")
def test_reports_every_label_and_plain_means(metric):
    y, t = np.stack([*pairs(30)]), np.stack(pairs(30, seed=1))
    predictions, references = np.column_stack([y[0], t[0]]), np.column_stack([y[1], t[1]])
    results = metric.compute(predictions=predictions, references=references, label_names=["valence", "arousal"])
    assert results["ccc_valence"] == pytest.approx(audmetric.concordance_cc(y[1], y[0]), abs=1e-12)
    assert results["ccc"] == pytest.approx((results["ccc_valence"] + results["ccc_arousal"]) / 2, abs=1e-15)
    assert results["pearson_arousal"] == pytest.approx(scipy.stats.pearsonr(t[0], t[1])[0], abs=1e-12)
    assert results["rmse_valence"] == pytest.approx(np.sqrt(np.mean((y[0] - y[1]) ** 2)), abs=1e-15)
    assert results["mae_valence"] == pytest.approx(np.mean(np.abs(y[0] - y[1])), abs=1e-15)
    assert results["num_turns"] == 30


@pytest.mark.promise("B-17")
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_give_the_whole_sets_value_not_a_mean_of_batches(metric, size):
    y, t = pairs(200)
    for start in range(0, 200, size):
        metric.add_batch(predictions=y[start : start + size], references=t[start : start + size])
    assert metric.compute()["ccc"] == pytest.approx(concordance_cc(y, t), abs=1e-12)


def test_missing_labels_equal_leaving_the_turn_out(metric):
    y, t = pairs(30)
    holed = t.copy()
    holed[::3] = -100
    kept = holed != -100
    assert metric.compute(predictions=y, references=holed)["ccc"] == concordance_cc(y[kept], t[kept])


@pytest.mark.parametrize(
    ("y", "t", "expected"),
    [
        ([0.5, 0.5, 0.5], [0.1, 0.5, 0.9], 0.0),
        ([0.1, 0.5, 0.9], [0.5, 0.5, 0.5], 0.0),
        ([0.4, 0.4], [0.5, 0.5], 0.0),
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9], 1.0),
        ([0.9, 0.5, 0.1], [0.1, 0.5, 0.9], -1.0),
    ],
)
def test_constants_give_zero_and_agreement_gives_one(y, t, expected):
    assert concordance_cc(y, t) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("y", "t"), [([0.5, 0.5], [0.5, 0.5]), ([0.3], [0.4])])
def test_what_is_not_defined_is_nan_with_a_warning(y, t):
    with pytest.warns(UserWarning, match="not defined"):
        assert np.isnan(concordance_cc(y, t))


@pytest.mark.parametrize(
    ("y", "t", "message"),
    [
        ([], [], "no turns"),
        ([0.1, np.nan, np.nan], [0.1, 0.2, 0.3], "2 of 3 predictions are NaN or infinite, the first at turn 1"),
        ([0.1, 0.2], [np.inf, 0.2], "1 of 2 references are NaN or infinite, the first at turn 0"),
        ([0.1, 0.2], [0.1], "same shape"),
    ],
)
def test_bad_input_is_refused(y, t, message):
    with pytest.raises(ValueError, match=message):
        concordance_cc(y, t)


def clustered(conversations, turns, seed):
    """Turns of a conversation share an offset, in the truth and in the prediction's error."""
    generator = np.random.default_rng(seed)
    ids = np.repeat(np.arange(conversations), turns)
    truth = generator.normal(0, 1, conversations)[ids] + generator.normal(0, 0.3, ids.size)
    guess = truth + generator.normal(0, 1, conversations)[ids] + generator.normal(0, 0.3, ids.size)
    return guess, truth, ids


def test_a_bootstrap_equals_computing_each_resample_anew():
    guess, truth, ids = clustered(6, 5, seed=0)
    low, high = bootstrap_intervals(guess, truth, ids, num_resamples=200, seed=3)
    draws = np.random.default_rng(3).integers(6, size=(200, 6))
    replicates = []
    for draw in draws:
        rows = np.concatenate([np.flatnonzero(ids == group) for group in draw])
        replicates.append(concordance_cc(guess[rows], truth[rows]))
    np.testing.assert_allclose([low[0], high[0]], np.quantile(replicates, [0.025, 0.975]), atol=1e-12)


def test_intervals_over_conversations_cover_the_truth_where_intervals_over_turns_do_not():
    population = concordance_cc(*clustered(20_000, 5, seed=99)[:2])
    covered = {"conversations": 0, "turns": 0}
    for seed in range(100):
        guess, truth, ids = clustered(30, 20, seed)
        for kind, groups in (("conversations", ids), ("turns", np.arange(ids.size))):
            low, high = bootstrap_intervals(guess, truth, groups, num_resamples=300)
            covered[kind] += low[0] <= population <= high[0]
    assert covered["conversations"] >= 80  # about 90, give or take 3
    assert covered["turns"] <= 65


def test_metric_gives_intervals_when_conversations_are_known(metric):
    guess, truth, ids = clustered(10, 5, seed=1)
    results = metric.compute(predictions=guess, references=truth, conversation_ids=[f"c{i}" for i in ids])
    assert results["ccc_low"] < results["ccc"] < results["ccc_high"]
    assert results["num_conversations"] == 10


def test_a_paired_difference_sees_what_single_intervals_hide():
    guess, truth, ids = clustered(20, 10, seed=2)
    better = guess + 0.1 * (truth - guess)
    low, high = paired_bootstrap_difference(better, guess, truth, ids)
    assert low[0] > 0
    a, b = bootstrap_intervals(better, truth, ids), bootstrap_intervals(guess, truth, ids)
    assert a[0][0] < b[1][0], "the single intervals overlap"
    assert high[0] < 1


def test_one_conversation_tells_no_spread():
    guess, truth, _ = clustered(2, 5, seed=0)
    low, high = bootstrap_intervals(guess, truth, ["same"] * 10)
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_names_of_conversations_change_no_interval():
    random = np.random.default_rng(0)
    predictions, references = random.random((2, 300, 2))
    numbers = np.sort(random.integers(30, size=300))
    names = [["a", "zz", "b"][number % 3] + str(1_000 - number) for number in numbers]
    by_number, by_name = (bootstrap_intervals(predictions, references, ids) for ids in (numbers, names))
    np.testing.assert_array_equal(by_number, by_name)
