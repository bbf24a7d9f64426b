"""Poolings against numbers worked out by hand, and against their definitions."""

import math

import pytest
import torch

from modeling_mamba_ema.pooling import (
    POOLINGS,
    HeadwiseLinear,
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
    layer = torch.nn.Identity() if kind.build_scorer is None else kind.build_scorer(1024, 4)
    assert sum(p.numel() for p in layer.parameters()) == parameters
    assert kind.sizes * 1024 == size
    frames, mask = torch.randn(2, 3, 1024), torch.ones(2, 3, dtype=torch.bool)
    scores = torch.zeros(2, 3, 1) if kind.build_scorer is None else layer(frames)
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
