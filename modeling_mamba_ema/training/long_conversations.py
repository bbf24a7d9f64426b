"""Conversations longer than a batch can hold at once: turns go through the model in chunks that hand on the state.

In evaluation, chunk by chunk gives the numbers of the whole conversation. In training, the turns before a window only
make the state it starts from: they cost no memory for gradients, and no gradient flows into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..ccc_loss import MISSING_LABEL
from ..conversation_encoder import ConversationState

# Inputs of the model with turns in their second dimension.
_BY_TURN = ("input_values", "attention_mask", "turn_mask", "frame_values", "frame_mask")


def predict_in_chunks(model: nn.Module, inputs: Mapping[str, torch.Tensor], turns_per_chunk: int) -> torch.Tensor:
    """Logits of whole conversations, with the memory of a few turns.

    Args:
        model: `MambaEMAForRegression`.
        inputs: a batch of conversations as the collator makes it, with `turn_mask` (batch, turns); labels are ignored.
        turns_per_chunk: turns of each conversation that go through the model at once.

    Returns:
        (batch, turns, labels), NaN at turns that are not there.
    """
    logits, _ = _run(model, inputs, turns_per_chunk)
    return logits


def state_after(model: nn.Module, inputs: Mapping[str, torch.Tensor], turns_per_chunk: int) -> ConversationState | None:
    """The detached state of each conversation after all its turns; None for a model without context.

    Args:
        model, turns_per_chunk: as for [`predict_in_chunks`].
        inputs: as there; a row of `turn_mask` may be all zeros, and has the state of a conversation that has not begun.
    """
    with torch.no_grad():
        _, states = _run(model, inputs, turns_per_chunk)
    known = next((state for state in states if state is not None), None)
    if known is None:
        return None
    empty = ConversationState.from_state_dict(
        {name: torch.zeros_like(value) for name, value in known.state_dict().items()}
    )
    return ConversationState.stack([empty if state is None else state for state in states]).detach()


def start_from_context(
    model: nn.Module, inputs: Mapping[str, Any], context_turns: torch.Tensor, turns_per_chunk: int
) -> dict[str, Any]:
    """Inputs in which the first turns of each row are no longer there, but the state they leave behind is.

    Args:
        model, turns_per_chunk: as for [`predict_in_chunks`].
        inputs: a batch with `turn_mask` and `labels`.
        context_turns: (batch,), how many turns of each row come before its window.
    """
    present = inputs["turn_mask"].bool()
    before = present & (torch.arange(present.shape[1], device=present.device) < context_turns[:, None])
    window = {**inputs, "turn_mask": (present & ~before).to(inputs["turn_mask"].dtype)}
    window["labels"] = inputs["labels"].masked_fill(before.unsqueeze(-1), MISSING_LABEL)
    if bool(before.any()):
        window["conversation_state"] = state_after(model, {**inputs, "turn_mask": before}, turns_per_chunk)
    return window


def _run(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], turns_per_chunk: int
) -> tuple[torch.Tensor, list[ConversationState | None]]:
    present = inputs["turn_mask"].bool()
    logits: Any = None
    states: list[ConversationState | None] = [None] * len(present)
    for start in range(0, present.shape[1], turns_per_chunk):
        chunk = slice(start, start + turns_per_chunk)
        rows = present[:, chunk].any(dim=1).nonzero().flatten()  # the conversations that go on
        if not len(rows):
            continue
        before = [state for state in (states[row] for row in rows.tolist()) if state is not None]
        outputs = model(
            **{name: inputs[name][rows, chunk] for name in _BY_TURN if name in inputs},
            conversation_state=ConversationState.stack(before) if before else None,
            use_conversation_state=True,
        )
        if logits is None:
            logits = outputs.logits.new_full((*present.shape, outputs.logits.shape[-1]), torch.nan)
        logits[rows, chunk] = outputs.logits
        for position, row in enumerate(rows.tolist()):
            if outputs.conversation_state is not None:
                states[row] = outputs.conversation_state.select(position)
    return logits, states
