"""Pooling: the frames of an utterance become one vector.

Every pooling is a weighted mean over time. Poolings differ in where the weights come from (uniform, one learned score a
frame, one learned score a frame and head) and in whether the standard deviation is kept beside the mean. A score is
linear in the frame, or that of [`HiddenScorer`], which has a hidden layer.

| pooling                | weights                    | pooled size | parameters |
| ---------------------- | -------------------------- | ----------- | ---------- |
| `mean`                 | uniform                    | D           | 0          |
| `attention`            | softmax over time          | D           | D + 1      |
| `multihead_attention`  | softmax over time per head | D           | D + heads  |
| `statistics`           | uniform                    | 2 D         | 0          |
| `attentive_statistics` | softmax over time          | 2 D         | D + 1      |

A hidden layer of A units has A (D + 1) parameters, and the linear layer after it reads A values instead of D.

A new pooling is an entry of `POOLINGS`; nothing else names poolings one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

try:
    from torch._C._functorch import is_functorch_wrapped_tensor
except ImportError:  # private to torch

    def is_functorch_wrapped_tensor(tensor: torch.Tensor) -> bool:
        return False


MIN_VARIANCE = 1e-10  # of a value over the frames of an utterance
SOFTMAX_OPERATIONS = 5  # for each weight: maximum, difference, exponential, sum, quotient


class HeadwiseLinear(nn.Module):
    """One score per frame and head, each of the K heads reading its own slice of a frame of width D: D + K
    parameters."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        check_num_heads(hidden_size, num_heads)
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_size // num_heads))
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, mean=0.0, std=self.weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(batch, frames, hidden) -> scores (batch, frames, heads)"""
        slices = frames.unflatten(-1, self.weight.shape)  # (batch, frames, heads, hidden / heads)
        return (slices * self.weight).sum(dim=-1) + self.bias


class HiddenScorer(nn.Module):
    r"""A score with a hidden layer: e_t = v^T tanh(W h_t + b) + k.

    Okabe, Koshinaka & Shinoda 2018, "Attentive Statistics Pooling for Deep Speaker Embedding", equation 3, with tanh as
    its f. Linear scores, e_t = v^T h_t + k, are the special case W = I, b = 0 with the identity as f. The softmax over
    time (equation 4) does not depend on k.

    Args:
        hidden_size: D, width of a frame.
        scorer_hidden_size: A, rows of W.
        score: the linear layer that holds v and k, from A to the heads.
    """

    def __init__(self, hidden_size: int, scorer_hidden_size: int, score: nn.Module):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, scorer_hidden_size)
        self.score = score

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(batch, frames, hidden) -> scores (batch, frames, heads)"""
        return self.score(torch.tanh(self.hidden(frames)))


def check_num_heads(hidden_size: int, num_heads: int) -> None:
    """Raise `ValueError` where the heads do not divide the width of a frame."""
    if hidden_size % num_heads:
        raise ValueError(f"the number of pooling heads is {num_heads}, but must divide hidden_size {hidden_size}")


def length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """(batch,) lengths -> (batch, size) bool, True before each row's end"""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def values_are_known(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can be looked at: not while torch compiles, exports, or maps a function (`vmap`)."""
    return not (torch.compiler.is_compiling() or is_functorch_wrapped_tensor(tensor))


def pooling_weights(scores: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Weights over time that sum to 1 over the valid frames and are exactly 0 elsewhere.

    Args:
        scores: (batch, frames, heads); zeros give uniform weights.
        frame_mask: (batch, frames) bool, True at valid frames; each row needs at least one.

    Returns:
        (batch, heads, frames), in float32 (float64 for float64 scores).
    """
    scores = scores.transpose(1, 2)  # (batch, heads, frames)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(~frame_mask.unsqueeze(1), -torch.inf).softmax(dim=-1)


def weighted_mean(frames: torch.Tensor, weights: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Weighted mean over time. With several heads, head k pools slice k of the frame.

    Args:
        frames: (batch, frames, hidden); what stands at invalid frames does not matter, NaN included.
        weights: (batch, heads, frames) from [`pooling_weights`].
        frame_mask: (batch, frames) bool.

    Returns:
        (batch, hidden), in the weights' dtype.
    """
    _, mean = _slices_and_mean(frames, weights, frame_mask)
    return mean.flatten(1)


def weighted_mean_and_deviation(
    frames: torch.Tensor, weights: torch.Tensor, frame_mask: torch.Tensor, min_variance: float = MIN_VARIANCE
) -> torch.Tensor:
    """Weighted mean and weighted standard deviation over time, side by side.

    Okabe, Koshinaka & Shinoda 2018, "Attentive Statistics Pooling for Deep Speaker Embedding", equations 5 and 6,
    computed around the mean rather than as a difference of moments, which cancels in float32.

    Args:
        frames, weights, frame_mask: as in [`weighted_mean`].
        min_variance: a variance below it counts as this much: its square root has no finite gradient at 0, the variance
            of an utterance of one frame.

    Returns:
        (batch, 2 hidden), in the weights' dtype.
    """
    slices, mean = _slices_and_mean(frames, weights, frame_mask)
    variance = weights.unsqueeze(2) @ (slices - mean).square()
    deviation = variance.clamp_min(min_variance).sqrt()
    return torch.cat([mean.flatten(1), deviation.flatten(1)], dim=-1)


def _slices_and_mean(
    frames: torch.Tensor, weights: torch.Tensor, frame_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames cut into one slice a head, (batch, heads, frames, hidden / heads), and their means, with frames = 1"""
    frames = frames.masked_fill(~frame_mask.unsqueeze(-1), 0.0).to(weights.dtype)
    slices = frames.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
    return slices, weights.unsqueeze(2) @ slices


@dataclass(frozen=True)
class Pooling:
    """What one pooling is made of.

    Attributes:
        linear_scorer: (hidden_size, num_heads) -> the layer that scores frames, from (batch, frames, hidden) to (batch,
            frames, heads); None: every frame counts the same.
        pool: (frames, weights, frame_mask) -> (batch, pooled size), as [`weighted_mean`]; with `deviation` it takes
            `min_variance` too, as [`weighted_mean_and_deviation`].
        sizes: pooled size in multiples of the width of a frame.
        operations: additions and multiplications of `pool` for each value of a frame.
        headwise: whether it has several heads.
        deviation: whether the standard deviation stands beside the mean.
    """

    linear_scorer: Callable[[int, int], nn.Module] | None
    pool: Callable[..., torch.Tensor]
    sizes: int
    operations: int
    headwise: bool = False
    deviation: bool = False

    def build_scorer(self, hidden_size: int, num_heads: int, scorer_hidden_size: int | None = None) -> nn.Module | None:
        """The layer that scores frames, linear or with a hidden layer; None: every frame counts the same."""
        if self.linear_scorer is None:
            return None
        if scorer_hidden_size is None:
            return self.linear_scorer(hidden_size, num_heads)
        return HiddenScorer(hidden_size, scorer_hidden_size, self.linear_scorer(scorer_hidden_size, num_heads))

    def flops(self, frames: int, hidden_size: int, num_heads: int, scorer_hidden_size: int | None = None) -> int:
        """Operations for one utterance, those of the scorer and the softmax included."""
        heads = num_heads if self.headwise else 1
        scoring = 0
        if self.linear_scorer is not None:  # of each weight: a product and a sum
            scoring = 2 * (hidden_size if scorer_hidden_size is None else (hidden_size + 1) * scorer_hidden_size)
        return frames * (SOFTMAX_OPERATIONS * heads + self.operations * hidden_size + scoring)


def _frame_scorer(hidden_size: int, num_heads: int) -> nn.Module:
    return nn.Linear(hidden_size, 1)


POOLINGS: dict[str, Pooling] = {
    "mean": Pooling(None, weighted_mean, sizes=1, operations=2),
    "attention": Pooling(_frame_scorer, weighted_mean, sizes=1, operations=2),
    "multihead_attention": Pooling(HeadwiseLinear, weighted_mean, sizes=1, operations=2, headwise=True),
    "statistics": Pooling(None, weighted_mean_and_deviation, sizes=2, operations=6, deviation=True),
    "attentive_statistics": Pooling(_frame_scorer, weighted_mean_and_deviation, sizes=2, operations=6, deviation=True),
}
