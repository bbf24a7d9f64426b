"""Context of each turn from the turns before it: Mamba-2 blocks, an exponential moving average, and their state."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .mamba2 import NORM_EPS, Mamba2Block, Mamba2State, state_dtype, without_autocast
from .pooling import length_mask, values_are_known


class Context(NamedTuple):
    """What carries emotion over the turns: Mamba-2 blocks, a moving average, or the average of the blocks' output."""

    mamba: bool
    ema: bool


CONTEXTS = {
    "none": Context(mamba=False, ema=False),
    "ema": Context(mamba=False, ema=True),
    "mamba": Context(mamba=True, ema=False),
    "mamba_ema": Context(mamba=True, ema=True),
}


class Scope(NamedTuple):
    """Whose turns make the sequence that the context is taken over: all of a conversation, each speaker's own, or both
    side by side."""

    conversation: bool
    speaker: bool


SCOPES = {
    "conversation": Scope(conversation=True, speaker=False),
    "speaker": Scope(conversation=False, speaker=True),
    "both": Scope(conversation=True, speaker=True),
}
UNKNOWN_SPEAKER = -1


def number_speakers(names: Iterable[Any]) -> list[int]:
    """Ids of the speakers of one conversation's turns, from 0 in the order in which they first speak.

    Args:
        names: one a turn; None or blank where unknown, which becomes -1.
    """
    known = ["" if name is None else str(name).strip() for name in names]
    ids = {name: number for number, name in enumerate(dict.fromkeys(name for name in known if name))}
    return [ids.get(name, UNKNOWN_SPEAKER) for name in known]


@dataclass(eq=False)
class ConversationState:
    """Everything the model remembers of a batch of conversations; constant in size however long they get.

    A value: it goes into a forward call and a new one comes out. No call changes the state it was given.

    Attributes:
        num_turns: turns seen, (batch,) int64.
        mamba: one state a Mamba block; empty when the context has no blocks.
        ema: moving average, (batch, hidden) float32 (float64 for a float64 model), zeros in rows that have
            seen no turn; None when the context has no moving average.
        speakers: the same of each speaker's own turns, with a dimension for the speakers after the first: row 0 of it
            is for turns of unknown speakers, row i + 1 for speaker i; None when speakers have no context of their own.
    """

    num_turns: torch.Tensor
    mamba: tuple[Mamba2State, ...] = ()
    ema: torch.Tensor | None = None
    speakers: "ConversationState | None" = None

    def __eq__(self, other: object) -> bool:
        """Whether the other state has the same tensors, value by value."""
        if not isinstance(other, ConversationState):
            return NotImplemented
        own, others = self.state_dict(), other.state_dict()
        return own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)

    @property
    def batch_size(self) -> int:
        return self.num_turns.shape[0]

    def copy(self) -> "ConversationState":
        """A state that shares no memory with this one."""
        return self._map(torch.clone)

    def to(self, device: torch.device | str) -> "ConversationState":
        """The state on another device."""
        return self._map(lambda tensor: tensor.to(device=device))

    def detach(self) -> "ConversationState":
        """The state cut from the graph: gradients of later turns stop here (truncated backpropagation)."""
        return self._map(torch.Tensor.detach)

    def select(self, index: Any) -> "ConversationState":
        """The conversations at these rows, in this order, as a batch of their own.

        Args:
            index: a row (a batch of one), or a list, an array or a tensor of rows; negative ones count from the end.

        Raises:
            IndexError: a row is outside the batch, or no whole number.
        """
        rows = torch.as_tensor(index).flatten()
        whole = not (rows.is_floating_point() or rows.dtype == torch.bool) or not rows.numel()  # [] is float32
        rows = rows.long()  # torch takes uint8 for a mask
        if not whole or bool(((rows < -self.batch_size) | (rows >= self.batch_size)).any()):
            raise IndexError(f"rows to select are {index}; allowed are whole numbers below {self.batch_size}")
        rows = rows.to(self.num_turns.device)
        return self._map(lambda tensor: tensor[rows])

    @staticmethod
    def stack(states: Sequence["ConversationState"]) -> "ConversationState":
        """Put the rows of several states below each other: conversations of several streams as one batch. Raises
        `ValueError` for no states, something else among them, or states of different models."""
        if not states:
            raise ValueError("stack needs at least one ConversationState, got an empty list.")
        for position, state in enumerate(states):
            if not isinstance(state, ConversationState):
                raise ValueError(
                    f"state {position} is {state!r}, no ConversationState; a model returns one with "
                    "use_conversation_state=True, unless its context is 'none'"
                )
        flat = [state.state_dict() for state in states]
        shapes = [{name: tensor.shape[1:] for name, tensor in tensors.items()} for tensors in flat]
        for position, other in enumerate(shapes):
            if other != shapes[0]:
                raise ValueError(
                    f"state {position} is of another model than state 0: {other} against {shapes[0]}. "
                    "Stack only states that one model returned."
                )
        return ConversationState.from_state_dict(
            {name: torch.cat([tensors[name] for tensors in flat]) for name in flat[0]}
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Flat names to tensors, fit for `safetensors.torch.save_file`; `from_state_dict` is the way back."""
        tensors = {"num_turns": self.num_turns}
        if self.ema is not None:
            tensors["ema"] = self.ema
        for block, state in enumerate(self.mamba):
            tensors[f"mamba.{block}.conv"] = state.conv
            tensors[f"mamba.{block}.ssm"] = state.ssm
        if self.speakers is not None:
            tensors |= {SPEAKERS + name: tensor for name, tensor in self.speakers.state_dict().items()}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @staticmethod
    def from_state_dict(tensors: dict[str, torch.Tensor]) -> "ConversationState":
        """Rebuild a state from what `state_dict` gave; `ValueError` where names are missing or unknown."""
        speakers = {name.removeprefix(SPEAKERS): tensors[name] for name in tensors if name.startswith(SPEAKERS)}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(SPEAKERS)}
        num_blocks = sum(name.endswith(".ssm") for name in tensors)
        names = {f"mamba.{block}.{part}" for block in range(num_blocks) for part in Mamba2State._fields} | {"num_turns"}
        if names != set(tensors) - {"ema"}:
            raise ValueError(
                f"these tensors are no ConversationState: missing {sorted(names - set(tensors))}, "
                f"unknown {sorted(set(tensors) - names - {'ema'})}. Pass what state_dict() returned."
            )
        return ConversationState(
            num_turns=tensors["num_turns"],
            mamba=tuple(
                Mamba2State(tensors[f"mamba.{block}.conv"], tensors[f"mamba.{block}.ssm"])
                for block in range(num_blocks)
            ),
            ema=tensors.get("ema"),
            speakers=ConversationState.from_state_dict(speakers) if speakers else None,
        )

    def forget_speaker(self, speaker: int) -> "ConversationState":
        """The state as if a speaker, an id from 0 or -1 for turns of unknown ones, had said nothing yet, in every
        conversation of the batch. Raises `ValueError` for an id that the state has no place for."""
        if self.speakers is None:
            return self
        places = self.speakers.num_turns.shape[1] - 1
        if not UNKNOWN_SPEAKER <= speaker < places:
            raise ValueError(f"speaker is {speaker}; allowed are 0 to {places - 1}, and {UNKNOWN_SPEAKER} for unknown")
        new = self.speakers.copy()
        new._map(lambda tensor: tensor[:, speaker + 1].zero_())
        return ConversationState(self.num_turns, self.mamba, self.ema, new)

    def _map(self, function: Callable[..., torch.Tensor], *others: "ConversationState") -> "ConversationState":
        """A state of the function's results for each tensor, with those of other states of the same model beside it."""
        return ConversationState(
            num_turns=function(self.num_turns, *(other.num_turns for other in others)),
            mamba=tuple(
                Mamba2State(*(function(*tensors) for tensors in zip(*blocks)))
                for blocks in zip(self.mamba, *(other.mamba for other in others))
            ),
            ema=None if self.ema is None else function(self.ema, *(other.ema for other in others)),
            speakers=None
            if self.speakers is None
            else self.speakers._map(function, *(other.speakers for other in others if other.speakers is not None)),
        )


SPEAKERS = "speakers."  # before the names of the tensors of speakers, in a state's dictionary


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


def check_ema_decay(decay: float) -> None:
    """Raise `ValueError` where the decay is not strictly between 0 and 1."""
    if not 0.0 < decay < 1.0:
        raise ValueError(
            f"ema_decay must lie between 0 and 1 (both excluded), got {decay}. "
            'For no moving average choose context="mamba" or "none".'
        )


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
        check_ema_decay(decay)
        self.decay = decay
        self.chunk_size = chunk_size
        self.decay_logit = nn.Parameter(torch.empty(hidden_size)) if learnable else None
        if self.decay_logit is not None:
            self.decay_logit._no_weight_decay = True  # type: ignore[attr-defined]  # 0 would mean alpha = 0.5
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the learned alpha to `decay`."""
        if self.decay_logit is not None:
            nn.init.constant_(self.decay_logit, math.log(self.decay) - math.log1p(-self.decay))

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
        dtype = state_dtype(values.dtype)
        _, turns, hidden = values.shape
        valid = length_mask(lengths, turns)  # (batch, turns)
        values = torch.where(valid[..., None], values.to(dtype), 0.0)
        with without_autocast(values.device):
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
        if context not in CONTEXTS or context == "none":
            raise ValueError(
                f"a ConversationEncoder has no context {context!r}; allowed are 'ema', 'mamba', 'mamba_ema'"
            )
        parts = CONTEXTS[context]
        if parts.mamba and num_hidden_layers < 1:
            raise ValueError(
                f"context={context!r} needs num_hidden_layers of at least 1, got {num_hidden_layers}. "
                'Without Mamba blocks choose context="ema".'
            )
        self.hidden_size = hidden_size
        num_blocks = num_hidden_layers if parts.mamba else 0
        self.layers = nn.ModuleList(
            Mamba2Block(hidden_size, state_size, conv_kernel, expand, head_dim, dropout) for _ in range(num_blocks)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=NORM_EPS) if num_blocks else None
        self.ema = None
        if parts.ema:
            self.ema = ExponentialMovingAverage(hidden_size, ema_decay, ema_decay_learnable)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ConversationState:
        """The state of conversations that have not begun."""
        mixers = [layer.mixer for layer in self.layers]
        ema = torch.zeros(batch_size, self.hidden_size, device=device, dtype=state_dtype(dtype))
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
        return self._encode(observations, turn_mask, self._checked(state, observations))

    def _checked(self, state: ConversationState | None, observations: torch.Tensor) -> ConversationState:
        batch, device, dtype = observations.shape[0], observations.device, observations.dtype
        if state is None:
            return self.initial_state(batch, device, dtype)
        check_state(state, self.initial_state(batch, torch.device("meta"), dtype), device)
        return state

    def _encode(
        self, observations: torch.Tensor, turn_mask: torch.Tensor, state: ConversationState
    ) -> tuple[torch.Tensor, ConversationState]:
        # 1. valid turns to the left, so that padding is on the right only, up to the longest row
        turn_mask = turn_mask.to(torch.bool)
        lengths = turn_mask.sum(dim=1)  # (batch,)
        turns = turn_mask.shape[1]
        longest = turns
        if turns > 1 and values_are_known(lengths):  # a stream's step need not wait for a GPU's answer
            longest = max(int(lengths.max()), 1)
        order = torch.argsort(~turn_mask, dim=1, stable=True)[:, :longest]  # (batch, longest)
        valid = length_mask(lengths, longest)
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
        context = torch.where(turn_mask[..., None], context, 0.0).to(observations.dtype)
        return context, ConversationState(state.num_turns + lengths, tuple(mamba_states), ema_state)


class SpeakerEncoder(ConversationEncoder):
    """The same over each speaker's own turns: what others say in between changes nothing. Speakers have the ids 0 to
    max_speakers - 1, in any order."""

    def __init__(self, max_speakers: int, **sizes: Any):
        super().__init__(**sizes)
        self.max_speakers = max_speakers

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ConversationState:
        """The state of conversations that have not begun, with a dimension for the speakers after the first."""
        rows = self.max_speakers + 1  # the first for turns of unknown speakers
        flat = super().initial_state(batch_size * rows, device, dtype)
        return flat._map(lambda tensor: tensor.unflatten(0, (batch_size, rows)))

    def forward(
        self,
        observations: torch.Tensor,
        turn_mask: torch.Tensor,
        state: ConversationState | None = None,
        speaker_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ConversationState]:
        """As `ConversationEncoder.forward`, all speakers of all conversations at once.

        Args:
            observations, turn_mask, state: as there.
            speaker_ids: (batch, turns), who speaks, -1 for unknown; None: nobody is known.
        """
        batch, turns, _ = observations.shape
        state = self._checked(state, observations)
        rows = torch.zeros_like(turn_mask, dtype=torch.long) if speaker_ids is None else speaker_ids.long() + 1
        if turns == 1:  # a stream: only the state of who speaks is touched
            conversation, row = torch.arange(batch, device=rows.device), rows[:, 0]
            before = state._map(lambda tensor: tensor[conversation, row])
            context, after = self._encode(observations, turn_mask, before)
            return context, state._map(lambda old, new: old.index_put((conversation, row), new), after)
        speaks = rows[:, None] == torch.arange(self.max_speakers + 1, device=rows.device)[:, None]
        speaks = speaks & turn_mask.bool()[:, None]  # (batch, speakers, turns)
        present = torch.arange(self.max_speakers + 1, device=rows.device)
        if values_are_known(rows):
            present = speaks.any(dim=2).any(dim=0).nonzero().flatten()  # (speakers,)
        speaks, before = speaks[:, present], state._map(lambda tensor: tensor[:, present])
        # Every speaker is a conversation of its own, in which the turns of others are not there.
        context, after = self._encode(
            observations[:, None].expand(-1, len(present), -1, -1).flatten(0, 1),
            speaks.flatten(0, 1),
            before._map(lambda tensor: tensor.flatten(0, 1)),
        )
        # A turn has one speaker: of the contexts of all speakers at a turn, all but one are 0.
        context = context.unflatten(0, (batch, len(present))).sum(dim=1)
        after = after._map(lambda tensor: tensor.unflatten(0, (batch, len(present))))
        return context, state._map(lambda old, new: old.index_copy(1, present, new), after)


def _over_hidden(index: torch.Tensor, hidden_size: int) -> torch.Tensor:
    return index[..., None].expand(-1, -1, hidden_size)


def check_state(state: ConversationState, expected: ConversationState, device: torch.device) -> None:
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


# So that `torch.load` reads a saved state with its default, `weights_only=True`.
torch.serialization.add_safe_globals([ConversationState, Mamba2State])
