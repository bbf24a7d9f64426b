"""What a model remembers of a conversation between two calls, as a value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .mamba2 import Mamba2State


@dataclass
class ConversationState:
    """Everything the model remembers of a batch of conversations; constant in size however long they get.

    A value: it goes into a forward call and a new one comes out. No call changes the state it was given.

    Attributes:
        num_turns: turns seen, (batch,) int64.
        mamba: one state a Mamba block; empty when the context has no blocks.
        ema: moving average, (batch, hidden) float32 (float64 for a float64 model), zeros in rows that have
            seen no turn; None when the context has no moving average.
    """

    num_turns: torch.Tensor
    mamba: tuple[Mamba2State, ...] = ()
    ema: torch.Tensor | None = None

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

    def select(self, index: int | Sequence[int] | torch.Tensor) -> "ConversationState":
        """The conversations at these rows, in this order, as a batch of their own (an int: a batch of one).

        Raises:
            IndexError: a row is outside the batch.
        """
        rows = torch.as_tensor([index] if isinstance(index, int) else index, device=self.num_turns.device)
        return self._map(lambda tensor: tensor[rows])

    @staticmethod
    def stack(states: Sequence["ConversationState"]) -> "ConversationState":
        """Put the rows of several states below each other: conversations of several streams as one batch.

        Raises:
            ValueError: no states, or states of different models.
        """
        if not states:
            raise ValueError("stack needs at least one ConversationState, got an empty list.")
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
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @staticmethod
    def from_state_dict(tensors: dict[str, torch.Tensor]) -> "ConversationState":
        """Rebuild a state from what `state_dict` gave.

        Raises:
            ValueError: names are missing or unknown.
        """
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
        )

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ConversationState":
        return ConversationState(
            num_turns=function(self.num_turns),
            mamba=tuple(Mamba2State(function(state.conv), function(state.ssm)) for state in self.mamba),
            ema=None if self.ema is None else function(self.ema),
        )
