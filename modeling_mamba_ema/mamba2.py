"""Mamba-2 over the turns of a conversation: a state-space mixer that can stop and continue at any turn.

Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality". Parameter names and shapes are those of `mamba_ssm.Mamba2`, so weights interchange with it.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .pooling import length_mask

try:
    # Versions without the second name do not decorate functions.
    from transformers.integrations.hub_kernels import (
        use_kernel_forward_from_hub,
        use_kernel_func_from_hub_with_fallback,  # noqa: F401
        use_kernelized_func,
    )
except ImportError:

    def use_kernel_forward_from_hub(name):  # type: ignore[misc]
        return lambda function: function

    use_kernelized_func = use_kernel_forward_from_hub  # type: ignore[assignment]


# Initial ranges of the decay rates and of the step sizes, and the smallest step size (mamba_ssm's values).
A_INIT_RANGE = (1.0, 16.0)
DT_INIT_RANGE = (1e-3, 1e-1)
DT_INIT_FLOOR = 1e-4
NORM_EPS = 1e-5


class Mamba2State(NamedTuple):
    """What one Mamba-2 mixer remembers of the turns it has seen, in float32 (float64 for a float64 model).

    Attributes:
        conv: last inputs of the convolution, oldest first, (batch, d_conv - 1, conv_dim).
        ssm: state of the recurrence, (batch, heads, headdim, d_state).
    """

    conv: torch.Tensor
    ssm: torch.Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and scans: float64 for float64, float32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Products keep the dtype of their factors within this context; nothing where autocast is off anyway."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def check_head_dim(d_model: int, expand: int, headdim: int) -> None:
    """Raise `ValueError` where the heads do not fill the inner width."""
    if expand * d_model % headdim:
        raise ValueError(f"head_dim is {headdim}, but must divide expand * hidden_size = {expand * d_model}")


def ssd_step(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One turn of the recurrence: h = exp(dt A) h + dt x B^T, y = h C.

    Args:
        x: (batch, heads, headdim). dt: (batch, heads). A: (heads,). B, C: (batch, d_state).
        state: (batch, heads, headdim, d_state).

    Returns:
        y (batch, heads, headdim) and the new state.
    """
    decay = torch.exp(dt * A)[..., None, None]  # (batch, heads, 1, 1)
    state = decay * state + (dt[..., None] * x)[..., None] * B[:, None, None, :]
    return (state * C[:, None, None, :]).sum(-1), state


def ssd_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence turn by turn: the specification that `ssd_chunked` is tested against.

    Args:
        x: (batch, turns, heads, headdim). dt: (batch, turns, heads), positive, 0 where a turn is padding.
        A: (heads,), negative. B, C: (batch, turns, d_state). initial_state: (batch, heads, headdim, d_state).

    Returns:
        y (batch, turns, heads, headdim) and the state after the last turn.
    """
    state, outputs = initial_state, []
    for turn in range(x.shape[1]):
        y, state = ssd_step(x[:, turn], dt[:, turn], A, B[:, turn], C[:, turn], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def ssd_chunked(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `ssd_reference` by matrix products within chunks (Dao & Gu 2024, section 6).

    Only the states at the chunk borders are computed one after the other. Memory grows by a few times
    heads * chunk_size numbers a turn.

    Args:
        chunk_size: turns in a chunk; changes the speed, not the result. The others as in `ssd_reference`.

    Returns:
        As `ssd_reference`.
    """
    batch, turns, heads, headdim = x.shape
    length = min(chunk_size, turns)
    num_chunks = math.ceil(turns / length)

    def chunked(tensor: torch.Tensor) -> torch.Tensor:
        # Appended turns are zero, so dt is 0 there and they change neither state nor outputs.
        pad = (0, 0) * (tensor.dim() - 2) + (0, num_chunks * length - turns)
        return F.pad(tensor, pad).reshape(batch, num_chunks, length, *tensor.shape[2:])

    values = chunked(x * dt[..., None]).permute(0, 1, 3, 2, 4)  # (batch, chunks, heads, length, headdim)
    log_decay = chunked(dt * A).transpose(2, 3)  # (batch, chunks, heads, length)
    B, C = chunked(B)[:, :, None], chunked(C)[:, :, None]  # (batch, chunks, 1, length, d_state)

    # 1. decay[l, s]: what is left at turn l of an input of turn s, exp(sum of log_decay over s+1..l). Each
    # sum runs over its own terms; a difference of two running sums would cancel where the decay is strong.
    lower = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    terms = log_decay[..., None].expand(*log_decay.shape, length).masked_fill(~lower.tril(-1), 0.0)
    decay = torch.exp(terms.cumsum(-2).masked_fill(~lower, -torch.inf))  # (batch, chunks, heads, length, length)

    # 2. outputs from the inputs of the same chunk
    outputs = ((C @ B.transpose(-1, -2)) * decay) @ values  # (batch, chunks, heads, length, headdim)

    # 3. states at the chunk borders
    to_end = decay[..., -1, :, None]  # (batch, chunks, heads, length, 1)
    chunk_states = (values * to_end).transpose(-1, -2) @ B  # (batch, chunks, heads, headdim, d_state)
    from_start = torch.exp(log_decay.cumsum(-1))[..., None]  # (batch, chunks, heads, length, 1)
    state, entering = initial_state, []
    for chunk in range(num_chunks):
        entering.append(state)
        state = from_start[:, chunk, :, -1:] * state + chunk_states[:, chunk]

    # 4. outputs from the state that entered the chunk
    entering_states = torch.stack(entering, dim=1)  # (batch, chunks, heads, headdim, d_state)
    outputs = outputs + (C @ entering_states.transpose(-1, -2)) * from_start
    outputs = outputs.transpose(2, 3).reshape(batch, num_chunks * length, heads, headdim)
    return outputs[:, :turns], state


@use_kernel_forward_from_hub("mamba_chunk_scan_combined")
def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: None = None,
    dt_bias: None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ssd_chunked` by the name and the parameters of mamba-ssm's kernel, which `use_kernels=True` puts in its place.

    The kernels library takes only a function with all parameters of the kernel, in the same order.

    Args:
        B, C: (batch, turns, groups = 1, d_state); x, dt, A and initial_states (required) are as in `ssd_chunked`.
        return_final_states: must be True. The other parameters must keep their defaults.
    """
    return ssd_chunked(x, dt, A, B[:, :, 0], C[:, :, 0], initial_states, chunk_size)  # type: ignore[arg-type]


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor,
    chunk_size: int,
    half_precision: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the scan the cheapest way: a single step, else chunks.

    Args:
        half_precision: x, B and C were computed in half precision. Only then `use_kernels=True` has an effect: the
            kernel rounds the factors of its products to TF32, 11 bits, and in float32 a conversation would not equal
            its turns one by one.

    The other arguments and the results are as in `ssd_chunked`.
    """
    if x.shape[1] == 1:
        y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], initial_state)
        return y[:, None], state
    if x.is_cuda and half_precision:
        B, C = B[:, :, None], C[:, :, None]  # (batch, turns, groups, d_state)
        return chunk_scan(x, dt, A, B, C, chunk_size, initial_states=initial_state, return_final_states=True)
    return ssd_chunked(x, dt, A, B, C, initial_state, chunk_size)


class GatedRMSNorm(nn.Module):
    """weight * rms_norm(y * silu(gate)), computed in the dtype of y (gate first, then norm)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """y, gate: (..., size) -> (..., size)."""
        return F.rms_norm(y * F.silu(gate), self.weight.shape, self.weight.to(y.dtype), NORM_EPS)


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution over turns, as a sum over its few taps; the weights are those of `nn.Conv1d`."""

    def __init__(self, channels: int, taps: int):
        super().__init__(channels, channels, taps, groups=channels)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """(batch, taps - 1 + turns, channels) -> (batch, turns, channels), in the dtype of the window"""
        taps = self.kernel_size[0]
        turns = window.shape[1] - taps + 1
        weight = self.weight[:, 0].to(window.dtype)  # (channels, taps)
        outputs = self.bias.to(window.dtype)  # type: ignore[union-attr]
        for tap in range(taps):
            outputs = outputs + window[:, tap : tap + turns] * weight[:, tap]
        return outputs


@use_kernelized_func(chunk_scan)
class Mamba2(nn.Module):
    """Mamba-2 mixer with one group of B and C, whose state goes in and comes out as a value.

    Projections run in the dtype of the weights or of autocast, everything between them in float32 (float64).

    Args:
        d_model: width of the turns.
        d_state: width of the recurrent state of each channel.
        d_conv: length of the causal convolution, in turns.
        expand: inner width / d_model.
        headdim: channels that share one decay rate.
        chunk_size: turns per chunk of the scan; changes the speed, not the result.

    Raises:
        ValueError: expand * d_model is no multiple of headdim.
    """

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, headdim: int, chunk_size: int = 64):
        super().__init__()
        check_head_dim(d_model, expand, headdim)
        d_inner = expand * d_model
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.d_inner = d_inner
        self.headdim = headdim
        self.nheads = d_inner // headdim
        self.conv_dim = d_inner + 2 * d_state
        self.chunk_size = chunk_size

        self.in_proj = nn.Linear(d_model, d_inner + self.conv_dim + self.nheads, bias=False)  # z, x, B, C, dt
        self.conv1d = CausalConv1d(self.conv_dim, d_conv)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        self.D = nn.Parameter(torch.empty(self.nheads))
        # Not weights of a linear map: weight decay on them would change how long the mixer remembers.
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.norm = GatedRMSNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter as mamba_ssm does."""
        for projection in (self.in_proj, self.out_proj):
            nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.d_conv)
        nn.init.uniform_(self.conv1d.bias, -bound, bound)  # type: ignore[arg-type]

        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*A_INIT_RANGE).log())
        nn.init.ones_(self.D)
        log_dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(*map(math.log, DT_INIT_RANGE))
        dt = log_dt.exp().clamp(min=DT_INIT_FLOOR)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        nn.init.ones_(self.norm.weight)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Mamba2State:
        """The state before the first turn: zeros."""
        dtype = state_dtype(dtype)
        conv = torch.zeros(batch_size, self.d_conv - 1, self.conv_dim, device=device, dtype=dtype)
        ssm = torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, device=device, dtype=dtype)
        return Mamba2State(conv, ssm)

    def forward(
        self, hidden_states: torch.Tensor, lengths: torch.Tensor, state: Mamba2State | None = None
    ) -> tuple[torch.Tensor, Mamba2State]:
        """Mix each turn with the turns before it.

        Args:
            hidden_states: (batch, turns, d_model), rows right-padded; padded turns may hold anything.
            lengths: (batch,) valid turns of each row, 0 allowed.
            state: what an earlier call returned, or None at the start of a conversation. Not changed.

        Returns:
            output (batch, turns, d_model), finite but meaningless at padded turns, and the state after the
            last valid turn of each row.
        """
        batch, turns, _ = hidden_states.shape
        dtype = state_dtype(hidden_states.dtype)
        if state is None:
            state = self.initial_state(batch, hidden_states.device, dtype)
        state = Mamba2State(state.conv.to(dtype), state.ssm.to(dtype))
        valid = length_mask(lengths, turns)  # (batch, turns)

        # 1. projection; `where` and not a product, because a padded turn may hold NaN
        hidden_states = torch.where(valid[..., None], hidden_states, 0.0)
        projected = self.in_proj(hidden_states)

        with without_autocast(hidden_states.device):
            z, xBC, dt = projected.to(dtype).split([self.d_inner, self.conv_dim, self.nheads], dim=-1)

            # 2. causal convolution
            xBC, conv_state = self._convolve(xBC, lengths, state.conv)
            x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
            x = x.reshape(batch, turns, self.nheads, self.headdim)

            # 3. recurrence; a step of size 0 neither decays nor feeds the state, so padding freezes it
            dt = torch.where(valid[..., None], F.softplus(dt + self.dt_bias.to(dtype)), 0.0)
            A = -torch.exp(self.A_log.to(dtype))
            half_precision = projected.dtype != dtype
            y, ssm_state = ssd(x, dt, A, B, C, state.ssm, self.chunk_size, half_precision)
            y = (y + self.D.to(dtype)[:, None] * x).reshape(batch, turns, self.d_inner)

            # 4. gate and norm
            y = self.norm(y, z)

        # 5. projection
        return self.out_proj(y.to(projected.dtype)), Mamba2State(conv_state, ssm_state)

    def _convolve(
        self, inputs: torch.Tensor, lengths: torch.Tensor, conv_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SiLU of the causal convolution of inputs (batch, turns, conv_dim), and its new state."""
        window = torch.cat([conv_state, inputs], dim=1)  # (batch, d_conv - 1 + turns, conv_dim)
        outputs = self.conv1d(window)
        # The last d_conv - 1 inputs of a row end at its own last valid turn.
        last = lengths[:, None] + torch.arange(self.d_conv - 1, device=lengths.device)  # (batch, d_conv - 1)
        return F.silu(outputs), window.gather(1, last[..., None].expand(-1, -1, self.conv_dim))


class Mamba2Block(nn.Module):
    """Pre-norm residual block, h + dropout(mixer(norm(h))), with the sum in float32 (float64).

    Args:
        dropout: probability in training; the others as in `Mamba2`.
    """

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, headdim: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=NORM_EPS)
        self.mixer = Mamba2(d_model, d_state, d_conv, expand, headdim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_states: torch.Tensor, lengths: torch.Tensor, state: Mamba2State | None = None
    ) -> tuple[torch.Tensor, Mamba2State]:
        """As `Mamba2.forward`, but padded turns must be finite and the output is float32 (float64)."""
        residual = hidden_states.to(state_dtype(hidden_states.dtype))  # (batch, turns, d_model)
        mixed, state = self.mixer(self.norm(residual.to(self.norm.weight.dtype)), lengths, state)
        return residual + self.dropout(mixed), state
