"""Pooling: the frames of an utterance become one vector.

All five poolings are weighted moments over time. They differ in two choices only: where the weights come from (uniform,
one learned score per frame, one learned score per frame and head) and whether the standard deviation is kept beside
the mean.

| pooling                | weights                    | pooled size | parameters |
| ---------------------- | -------------------------- | ----------- | ---------- |
| `mean`                 | uniform                    | D           | 0          |
| `attention`            | softmax over time          | D           | D + 1      |
| `multihead_attention`  | softmax over time per head | D           | D + heads  |
| `statistics`           | uniform                    | 2 D         | 0          |
| `attentive_statistics` | softmax over time          | 2 D         | D + 1      |
"""

from __future__ import annotations

import torch
from torch import nn

WITH_ATTENTION = ("attention", "multihead_attention", "attentive_statistics")
WITH_STANDARD_DEVIATION = ("statistics", "attentive_statistics")


class HeadwiseLinear(nn.Module):
    """One score per frame and head, each head reading its own slice of the frame.

    Args:
        hidden_size: D, width of a frame.
        num_heads: K, number of heads; must divide D. The layer has D + K parameters.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads is {num_heads}, but must divide hidden_size {hidden_size}")
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden_size // num_heads))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(batch, frames, hidden) -> scores (batch, frames, heads)"""
        slices = frames.unflatten(-1, self.weight.shape)  # (batch, frames, heads, hidden / heads)
        return (slices * self.weight).sum(dim=-1) + self.bias


def build_attention(pooling: str, hidden_size: int, num_heads: int) -> nn.Module | None:
    """The layer that scores frames for `pooling`, or None where every frame counts the same."""
    if pooling not in WITH_ATTENTION:
        return None
    if pooling == "multihead_attention":
        return HeadwiseLinear(hidden_size, num_heads)
    return nn.Linear(hidden_size, 1)


def pooled_size(pooling: str, hidden_size: int) -> int:
    """Width of the pooled vector."""
    return 2 * hidden_size if pooling in WITH_STANDARD_DEVIATION else hidden_size


def pooling_weights(scores: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Weights over time that sum to 1 over the valid frames and are exactly 0 elsewhere.

    Args:
        scores: (batch, frames, heads); zeros give uniform weights.
        frame_mask: (batch, frames) bool, True at valid frames; each row needs at least one.

    Returns:
        (batch, heads, frames), in float32 (float64 for float64 scores).
    """
    scores = scores.transpose(1, 2)  # (batch, heads, frames)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.masked_fill(~frame_mask.unsqueeze(1), -torch.inf).softmax(dim=-1)


def pool_frames(
    frames: torch.Tensor, weights: torch.Tensor, frame_mask: torch.Tensor, with_standard_deviation: bool = False
) -> torch.Tensor:
    """Weighted mean over time, and the weighted standard deviation beside it if asked for.

    With several heads, head k pools slice k of the frame. The attention-weighted standard deviation is that of Okabe,
    Koshinaka & Shinoda 2018, "Attentive Statistics Pooling for Deep Speaker Embedding", equations 5 and 6, computed
    around the mean rather than as a difference of moments, which cancels in float32.

    Args:
        frames: (batch, frames, hidden); what stands at invalid frames does not matter, NaN included.
        weights: (batch, heads, frames) from [`pooling_weights`].
        frame_mask: (batch, frames) bool.

    Returns:
        (batch, hidden), or (batch, 2 hidden) with the standard deviation; in the weights' dtype.
    """
    frames = frames.masked_fill(~frame_mask.unsqueeze(-1), 0.0).to(weights.dtype)
    heads = weights.shape[1]
    slices = frames.unflatten(-1, (heads, -1)).transpose(1, 2)  # (batch, heads, frames, hidden / heads)
    mean = weights.unsqueeze(2) @ slices  # (batch, heads, 1, hidden / heads)
    if not with_standard_deviation:
        return mean.flatten(1)
    variance = weights.unsqueeze(2) @ (slices - mean).square()
    # The square root has no finite gradient at 0, where an utterance of one frame stands.
    deviation = variance.clamp_min(1e-10).sqrt()
    return torch.cat([mean.flatten(1), deviation.flatten(1)], dim=-1)
