"""Where a conversation stands, as a file: safetensors with JSON metadata, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..conversation_encoder import ConversationState
from ..modeling_mamba_ema import MambaEMAForRegression

FORMAT = "mamba-ema conversation state 1"
_TURNS = "tracker.num_turns"


def write_state(path: Path, model: MambaEMAForRegression, state: ConversationState | None, num_turns: int) -> None:
    """Write a state, of one conversation, so that a reader sees the old file or the new one, never half of it.

    Args:
        path: the file; one that is there is replaced.
        model: that the state belongs to; a digest of its weights is written with it.
        state: None where nothing has been heard, or the model keeps no context.
        num_turns: turns heard.
    """
    tensors = {} if state is None else {name: tensor.cpu() for name, tensor in state.state_dict().items()}
    tensors[_TURNS] = torch.tensor(num_turns)
    about = {"format": FORMAT, "labels": model.config.labels, "weights_sha256": _digest(model)}
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, metadata={"mamba_ema": json.dumps(about)})
    os.replace(unfinished, path)


def read_state(path: Path, model: MambaEMAForRegression) -> tuple[ConversationState | None, int]:
    """Read what [`write_state`] wrote, onto the model's device.

    Returns:
        The state and the number of turns heard.

    Raises:
        ValueError: the file is missing, no state, damaged, or of another model.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is not there (looked in {path.parent})")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {}).get("mamba_ema", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is no conversation state, or is damaged: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT or _TURNS not in tensors:
        raise ValueError(f"{path.name} is no conversation state; give a file that EmotionTracker.save wrote")
    if about.get("weights_sha256") != _digest(model):
        raise ValueError(
            f"{path.name} was written with another model (its labels: {about.get('labels')}); a state means something "
            "only to the weights that made it: load the model it was saved with"
        )
    num_turns = int(tensors.pop(_TURNS))
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(f"{path.name} holds values that are not finite; it is damaged")
    if not tensors:
        return None, num_turns
    return ConversationState.from_state_dict(tensors).to(model.device), num_turns


def _digest(model: MambaEMAForRegression) -> str:
    """SHA-256 of every weight after the speech encoder; two trained models do not share these."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".speech_encoder." not in name:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
