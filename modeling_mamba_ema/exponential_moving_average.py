"""Exponential moving average over the turns of a conversation, continued from any turn."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .mamba2 import at_least_float32


def ema_reference(values: torch.Tensor, decay: torch.Tensor | float, state: torch.Tensor | None) -> torch.Tensor:
    """c_t = decay c_{t-1} + (1 - decay) u_t turn by turn: the specification of `ExponentialMovingAverage`.

    Args:
        values: u, (batch, turns, hidden), no padding.
        decay: one number or (hidden,).
        state: c_0, (batch, hidden); None starts at the first value, c_1 = u_1.

    Returns:
        c, (batch, turns, hidden).
    """
    averages = []
    for value in values.unbind(dim=1):
        state = value if state is None else decay * state + (1 - decay) * value
        averages.append(state)
    return torch.stack(averages, dim=1)


class ExponentialMovingAverage(nn.Module):
    """c_t = alpha c_{t-1} + (1 - alpha) u_t with c_1 = u_1, always in float32 (float64 for float64).

    Started at the first value, because a start at zero would pull the first turns towards zero. In bfloat16
    the average would stop moving: updates get smaller than half its last digit. Within a chunk of turns the
    sum is one product with the matrix of weights alpha^(t - s); chunks follow each other, so memory is linear
    in turns.

    Args:
        hidden_size: width of the values.
        decay: alpha, 0 < alpha < 1; the start value when learned.
        learnable: one alpha a dimension, learned as sigmoid(decay_logit); else alpha is fixed.
        chunk_size: turns in a chunk; changes the speed, not the result.

    Raises:
        ValueError: decay outside (0, 1).
    """

    def __init__(self, hidden_size: int, decay: float, learnable: bool, chunk_size: int = 32):
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise ValueError(
                f"ema_decay must lie between 0 and 1 (both excluded), got {decay}. "
                'For no moving average choose context="mamba" or "none".'
            )
        self.decay = decay
        self.chunk_size = chunk_size
        self.decay_logit = nn.Parameter(torch.empty(hidden_size)) if learnable else None
        if self.decay_logit is not None:
            self.decay_logit._no_weight_decay = True  # type: ignore[attr-defined]  # 0 would mean alpha = 0.5
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the learned alpha to `decay`, unless a checkpoint has filled it."""
        if self.decay_logit is not None:
            init.constant_(self.decay_logit, math.log(self.decay) - math.log1p(-self.decay))

    def forward(
        self, values: torch.Tensor, lengths: torch.Tensor, state: torch.Tensor, num_turns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Average each row over its valid turns.

        Args:
            values: u, (batch, turns, hidden), rows right-padded; padded turns may hold anything.
            lengths: valid turns of each row, (batch,), 0 allowed.
            state: average so far, (batch, hidden); ignored in rows whose num_turns is 0. Not changed.
            num_turns: turns that the state has seen, (batch,).

        Returns:
            averages (batch, turns, hidden) in float32 (float64), finite but meaningless at padded turns, and
            the average after the last valid turn of each row (batch, hidden).
        """
        dtype = at_least_float32(values.dtype)
        _, turns, hidden = values.shape
        valid = torch.arange(turns, device=lengths.device) < lengths[:, None]  # (batch, turns)
        values = torch.where(valid[..., None], values.to(dtype), 0.0)
        with maybe_autocast(values.device.type, enabled=False):
            # Averaging u_1 with itself gives c_1 = u_1.
            started = (num_turns > 0)[:, None]
            state = torch.where(started | (lengths == 0)[:, None], state.to(dtype), values[:, 0])
            averages = self._average(values, state)
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden)
        new_state = torch.where((lengths > 0)[:, None], averages.gather(1, last)[:, 0], state)
        return averages, new_state

    def _average(self, values: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        turns, dtype, device = values.shape[1], values.dtype, values.device
        length = min(self.chunk_size, turns)
        log_decay, gain = self._log_decay_and_gain(dtype, device)  # (hidden,) or (1,)

        lags = torch.arange(length, device=device, dtype=dtype)
        lags = lags[:, None] - lags  # (length, length): turn - source turn
        weights = torch.exp(lags.clamp(min=0)[..., None] * log_decay) * gain  # (length, length, hidden or 1)
        weights = torch.where(lags[..., None] >= 0, weights, 0.0)
        remaining = torch.exp(torch.arange(1, length + 1, device=device, dtype=dtype)[:, None] * log_decay)

        averages = []
        for chunk in values.split(length, dim=1):
            size = chunk.shape[1]
            if self.decay_logit is None:
                recent = weights[:size, :size, 0] @ chunk  # (batch, size, hidden)
            else:
                recent = torch.einsum("tsh,bsh->bth", weights[:size, :size], chunk)
            averages.append(recent + remaining[:size] * state[:, None])
            state = averages[-1][:, -1]
        return torch.cat(averages, dim=1)

    def _log_decay_and_gain(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """log(alpha) and 1 - alpha, both without cancellation for alpha near 0 and 1."""
        if self.decay_logit is None:
            # Filled on the device: copying numbers to a GPU would wait for it, and cannot be part of a CUDA graph.
            numbers = (math.log(self.decay), 1 - self.decay)
            log_decay, gain = (torch.full((1,), number, dtype=dtype, device=device) for number in numbers)
            return log_decay, gain
        logit = self.decay_logit.to(dtype)
        return F.logsigmoid(logit), torch.sigmoid(-logit)
