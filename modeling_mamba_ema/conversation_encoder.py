"""Context of each turn from the turns before it: Mamba-2 blocks and an exponential moving average."""

import torch
from torch import nn

from .conversation_state import ConversationState
from .exponential_moving_average import ExponentialMovingAverage
from .mamba2 import NORM_EPS, Mamba2Block, at_least_float32

CONTEXTS = ("ema", "mamba", "mamba_ema")


class ConversationEncoder(nn.Module):
    """Context of each turn from the turns up to it: c = EMA(norm(Mamba(z))), or either of the two alone.

    Args:
        hidden_size: width of observations and context.
        context: "ema" (average of z), "mamba" (blocks only) or "mamba_ema" (average of the blocks' output).
        num_hidden_layers: Mamba-2 blocks.
        state_size, conv_kernel, expand, head_dim: d_state, d_conv, expand, headdim of `Mamba2`.
        ema_decay, ema_decay_learnable: of `ExponentialMovingAverage`.
        dropout: after each mixer, in training.

    Raises:
        ValueError: unknown context, or numbers that `Mamba2` or `ExponentialMovingAverage` refuse.
    """

    def __init__(
        self,
        hidden_size: int,
        context: str,
        num_hidden_layers: int,
        state_size: int,
        conv_kernel: int,
        expand: int,
        head_dim: int,
        ema_decay: float,
        ema_decay_learnable: bool,
        dropout: float,
    ):
        super().__init__()
        if context not in CONTEXTS:
            raise ValueError(
                f"context must be one of {', '.join(CONTEXTS)} for a ConversationEncoder, got {context!r}."
            )
        if context != "ema" and num_hidden_layers < 1:
            raise ValueError(
                f"context={context!r} needs num_hidden_layers of at least 1, got {num_hidden_layers}. "
                'Without Mamba blocks choose context="ema".'
            )
        self.hidden_size = hidden_size
        num_blocks = 0 if context == "ema" else num_hidden_layers
        self.layers = nn.ModuleList(
            Mamba2Block(hidden_size, state_size, conv_kernel, expand, head_dim, dropout) for _ in range(num_blocks)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=NORM_EPS) if num_blocks else None
        self.ema = None
        if context != "mamba":
            self.ema = ExponentialMovingAverage(hidden_size, ema_decay, ema_decay_learnable)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ConversationState:
        """The state of conversations that have not begun."""
        mixers = [layer.mixer for layer in self.layers]
        ema = torch.zeros(batch_size, self.hidden_size, device=device, dtype=at_least_float32(dtype))
        return ConversationState(
            num_turns=torch.zeros(batch_size, dtype=torch.int64, device=device),
            mamba=tuple(mixer.initial_state(batch_size, device, dtype) for mixer in mixers),  # type: ignore
            ema=None if self.ema is None else ema,
        )

    def forward(
        self, observations: torch.Tensor, turn_mask: torch.Tensor, state: ConversationState | None = None
    ) -> tuple[torch.Tensor, ConversationState]:
        """Encode the next turns of a batch of conversations.

        Args:
            observations: z, (batch, turns, hidden), turns > 0; masked turns may hold anything.
            turn_mask: (batch, turns), True where a turn exists. A masked turn, in the middle too, is skipped:
                the state does not change and later turns are as if it had never been there.
            state: what an earlier call returned, or None at the start. Not changed.

        Returns:
            context (batch, turns, hidden) in the dtype of observations, 0 at masked turns, and the new state.

        Raises:
            ValueError: the state does not fit this model or this batch.
        """
        batch, device, dtype = observations.shape[0], observations.device, observations.dtype
        if state is None:
            state = self.initial_state(batch, device, dtype)
        else:
            _check_state(state, self.initial_state(batch, torch.device("meta"), dtype), device)

        # 1. valid turns to the left, so that padding is on the right only, up to the longest row
        turn_mask = turn_mask.to(torch.bool)
        lengths = turn_mask.sum(dim=1)  # (batch,)
        turns = turn_mask.shape[1]
        longest = 1 if turns == 1 else max(int(lengths.max()), 1)  # a stream's step need not wait for a GPU's answer
        order = torch.argsort(~turn_mask, dim=1, stable=True)[:, :longest]  # (batch, longest)
        valid = torch.arange(longest, device=lengths.device) < lengths[:, None]
        hidden_states = observations.gather(1, _over_hidden(order, self.hidden_size))  # (batch, longest, hidden)
        hidden_states = torch.where(valid[..., None], hidden_states, 0.0)

        # 2. Mamba blocks
        mamba_states = []
        for layer, layer_state in zip(self.layers, state.mamba, strict=True):
            hidden_states, layer_state = layer(hidden_states, lengths, layer_state)
            mamba_states.append(layer_state)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states.to(self.norm.weight.dtype))

        # 3. moving average
        ema_state = None
        if self.ema is not None:
            hidden_states, ema_state = self.ema(hidden_states, lengths, state.ema, state.num_turns)

        # 4. back to the places the turns came from
        place = (turn_mask.cumsum(dim=1) - 1).clamp(min=0)  # (batch, turns)
        context = hidden_states.gather(1, _over_hidden(place, self.hidden_size))
        context = torch.where(turn_mask[..., None], context, 0.0).to(dtype)
        return context, ConversationState(state.num_turns + lengths, tuple(mamba_states), ema_state)


def _over_hidden(index: torch.Tensor, hidden_size: int) -> torch.Tensor:
    return index[..., None].expand(-1, -1, hidden_size)


def _check_state(state: ConversationState, expected: ConversationState, device: torch.device) -> None:
    """Raise ValueError unless the state has the tensors and shapes of the expected one, on this device."""
    if state.batch_size != expected.batch_size:
        raise ValueError(
            f"conversation_state holds {state.batch_size} conversations, the batch {expected.batch_size}. "
            "Pass the state that was returned for the same conversations, choose rows with "
            "state.select(rows), or join streams with ConversationState.stack(states)."
        )
    given = {name: tuple(tensor.shape) for name, tensor in state.state_dict().items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}
    if given != wanted:
        name = min(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
        raise ValueError(
            f"conversation_state is of another model: {name} is {given.get(name, 'absent')}, this model "
            f"needs {wanted.get(name, 'no such tensor')}. Start with conversation_state=None, or load the "
            "model that returned the state."
        )
    if state.num_turns.device != device:
        raise ValueError(
            f"conversation_state is on {state.num_turns.device}, the observations on {device}. "
            f'Move it with state.to("{device}").'
        )
