"""Poolings against numbers worked out by hand, and against their definitions."""

import itertools
import math

import pytest
import torch

from modeling_mamba_ema.pooling import (
    POOLINGS,
    HeadwiseLinear,
    HiddenScorer,
    pooling_weights,
    weighted_mean,
    weighted_mean_and_deviation,
)

# Three valid frames of width 2 and a fourth that is padding.
FRAMES = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [6.0, 0.0], [99.0, -99.0]]])
MASK = torch.tensor([[True, True, True, False]])


def weights_of(scores):
    return pooling_weights(torch.tensor([scores]), MASK)


def test_equal_scores_give_the_mean_of_the_valid_frames():
    weights = weights_of([[0.0], [0.0], [0.0], [0.0]])
    torch.testing.assert_close(weights, torch.tensor([[[1 / 3, 1 / 3, 1 / 3, 0.0]]]))
    torch.testing.assert_close(weighted_mean(FRAMES, weights, MASK), torch.tensor([[3.0, 10.0]]))


def test_statistics_puts_the_population_standard_deviation_beside_the_mean():
    pooled = weighted_mean_and_deviation(FRAMES, weights_of([[0.0]] * 4), MASK)
    # deviations of (1, 2, 6) from 3: 4 + 1 + 9 over 3; of (10, 20, 0) from 10: 0 + 100 + 100 over 3
    expected = torch.tensor([[3.0, 10.0, math.sqrt(14 / 3), math.sqrt(200 / 3)]])
    torch.testing.assert_close(pooled, expected)


def test_attention_weighs_frames_by_softmax_of_their_scores():
    weights = weights_of(
        [[0.0], [math.log(2.0)], [0.0], [50.0]]
    )  # softmax: 1/4, 1/2, 1/4; the padded frame's 50 is lost
    torch.testing.assert_close(weights, torch.tensor([[[0.25, 0.5, 0.25, 0.0]]]))
    torch.testing.assert_close(weighted_mean(FRAMES, weights, MASK), torch.tensor([[2.75, 12.5]]))


def test_attentive_statistics_weighs_the_deviation_by_the_same_weights():
    pooled = weighted_mean_and_deviation(FRAMES, weights_of([[0.0], [math.log(2.0)], [0.0], [0.0]]), MASK)
    # Okabe et al. 2018, equation 6: sum w h^2 - mean^2 = (1 + 2*4 + 36)/4 - 2.75^2 and (100 + 2*400)/4 - 12.5^2
    expected = torch.tensor([[2.75, 12.5, math.sqrt(45 / 4 - 2.75**2), math.sqrt(225 - 12.5**2)]])
    torch.testing.assert_close(pooled, expected)


def test_each_head_pools_its_own_slice_with_its_own_weights():
    scores = torch.tensor([[[0.0, 30.0], [0.0, 0.0], [30.0, 0.0], [0.0, 0.0]]])  # head 0 takes frame 2, head 1 frame 0
    weights = pooling_weights(scores, MASK)
    assert weights.shape == (1, 2, 4)
    torch.testing.assert_close(weighted_mean(FRAMES, weights, MASK), torch.tensor([[6.0, 10.0]]))


def test_headwise_scores_read_only_their_slice():
    layer = HeadwiseLinear(hidden_size=4, num_heads=2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
    scores = layer(torch.tensor([[[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]]]))
    torch.testing.assert_close(scores, torch.tensor([[[3.5, 6.5], [1.5, 3.5]]]))


@pytest.mark.parametrize(
    ("pooling", "heads"), [("attention", 1), ("attentive_statistics", 1), ("multihead_attention", 2)]
)
def test_a_scorer_with_a_hidden_layer_is_equation_3_of_okabe_et_al(pooling, heads):
    scorer = POOLINGS[pooling].build_scorer(4, 2, scorer_hidden_size=6)
    assert isinstance(scorer, HiddenScorer)
    torch.nn.init.normal_(scorer.hidden.bias)
    scores = scorer(frames := torch.randn(2, 3, 4))
    assert scores.shape == (2, 3, heads)
    v, k = scorer.score.weight.view(heads, -1), scorer.score.bias
    for batch, frame, head in itertools.product(range(2), range(3), range(heads)):
        hidden = torch.tanh(scorer.hidden.weight @ frames[batch, frame] + scorer.hidden.bias)
        expected = v[head] @ hidden.view(heads, -1)[head] + k[head]
        torch.testing.assert_close(scores[batch, frame, head], expected)


def test_linear_scores_are_the_limit_of_a_hidden_layer_that_hardly_bends():
    linear = POOLINGS["attention"].build_scorer(4, 1)
    hidden = POOLINGS["attention"].build_scorer(4, 1, scorer_hidden_size=4)
    with torch.no_grad():
        hidden.hidden.weight.copy_(1e-3 * torch.eye(4))  # tanh(x) = x for small x
        hidden.hidden.bias.zero_()
        hidden.score.weight.copy_(1e3 * linear.weight)
        hidden.score.bias.copy_(linear.bias)
    frames = torch.randn(2, 3, 4)
    torch.testing.assert_close(hidden(frames), linear(frames), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("pooling", "parameters"), [("attention", 128 * 1025 + 129), ("multihead_attention", 128 * 1025 + 132)]
)
def test_parameters_and_operations_of_a_scorer_with_a_hidden_layer(pooling, parameters):
    scorer = POOLINGS[pooling].build_scorer(1024, 4, scorer_hidden_size=128)
    assert sum(p.numel() for p in scorer.parameters()) == parameters
    linear, hidden = (POOLINGS[pooling].flops(10, 1024, 4, size) for size in (None, 128))
    assert hidden - linear == 10 * 2 * (1024 * 128 + 128 - 1024)


def test_a_pooling_that_scores_no_frames_has_no_scorer():
    assert POOLINGS["mean"].build_scorer(1024, 4, scorer_hidden_size=128) is None
    assert POOLINGS["statistics"].flops(10, 1024, 4, 128) == POOLINGS["statistics"].flops(10, 1024, 4)


def test_a_variance_counts_as_at_least_the_least():
    pooled = weighted_mean_and_deviation(FRAMES / 100, weights_of([[0.0]] * 4), MASK, min_variance=0.25)
    assert pooled[0, 2:].tolist() == [0.5, 0.5]
    pooled = weighted_mean_and_deviation(FRAMES, weights_of([[0.0]] * 4), MASK, min_variance=14.0)
    torch.testing.assert_close(pooled[0, 2:], torch.tensor([math.sqrt(14), math.sqrt(200 / 3)]))


@pytest.mark.parametrize(
    ("pooling", "parameters", "size"),
    [
        ("mean", 0, 1024),
        ("attention", 1025, 1024),
        ("multihead_attention", 1028, 1024),
        ("statistics", 0, 2048),
        ("attentive_statistics", 1025, 2048),
    ],
)
def test_parameter_counts_and_widths_at_wavlm_large(pooling, parameters, size):
    kind = POOLINGS[pooling]
    layer = torch.nn.Identity() if kind.linear_scorer is None else kind.build_scorer(1024, 4)
    assert sum(p.numel() for p in layer.parameters()) == parameters
    assert kind.sizes * 1024 == size
    frames, mask = torch.randn(2, 3, 1024), torch.ones(2, 3, dtype=torch.bool)
    scores = torch.zeros(2, 3, 1) if kind.linear_scorer is None else layer(frames)
    assert kind.pool(frames, pooling_weights(scores, mask), mask).shape == (2, size)


@pytest.mark.parametrize("pool", [weighted_mean, weighted_mean_and_deviation])
def test_nan_in_padding_reaches_neither_result_nor_gradient(pool):
    frames = FRAMES.clone()
    frames[0, 3] = torch.nan
    frames.requires_grad_(True)
    pooled = pool(frames, weights_of([[0.0]] * 4), MASK)
    pooled.sum().backward()
    assert torch.isfinite(pooled).all()
    assert torch.isfinite(frames.grad).all()


def test_an_utterance_of_one_frame_has_deviation_zero_and_a_finite_gradient():
    frames = torch.tensor([[[3.0, -1.0]]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    pooled = weighted_mean_and_deviation(frames, pooling_weights(torch.zeros(1, 1, 1), mask), mask)
    pooled.sum().backward()
    torch.testing.assert_close(pooled, torch.tensor([[3.0, -1.0, 0.0, 0.0]]), atol=2e-5, rtol=0)
    assert torch.isfinite(frames.grad).all()


def test_the_deviation_of_a_large_offset_does_not_cancel():
    frames = torch.tensor([[[1000.001], [999.999]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    pooled = weighted_mean_and_deviation(frames, pooling_weights(torch.zeros(1, 2, 1), mask), mask)
    assert pooled[0, 1].item() == pytest.approx(0.001, rel=0.05)
