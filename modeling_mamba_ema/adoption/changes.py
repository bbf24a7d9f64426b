"""Which weights of a model a changed one starts from; behind `MambaEMAForRegression.with_changes`."""

from collections.abc import Collection

import torch
from transformers.utils import logging

from ..modeling_mamba_ema import MambaEMAForRegression
from ..pooling import POOLINGS

logger = logging.get_logger(__name__)


@torch.no_grad()
def keep_what_fits(old: MambaEMAForRegression, new: MambaEMAForRegression) -> None:
    """Copy the weights of a model into another one; log which are new there and which found no place."""
    source, target = old.state_dict(), new.state_dict()
    parts, new_parts = _parts_of_weights(old), _parts_of_weights(new)
    # Weights that may have the same shape and yet another meaning.
    same_meaning = {
        **dict.fromkeys(("head.", "spread_head."), old.config.head_hidden_layers == new.config.head_hidden_layers),
        "mamba_ema.speech_encoder.layer_weights": old.speech_encoder.layers == new.speech_encoder.layers,
    }
    kept: set[str] = set()
    in_part: set[str] = set()
    for name in target.keys() & source.keys():
        if not all(same for prefix, same in same_meaning.items() if name.startswith(prefix)):
            continue
        if name in parts and name in new_parts:
            if _copy_parts(source[name], target[name], parts[name], new_parts[name]):
                (kept if parts[name] == new_parts[name] else in_part).add(name)
        elif source[name].shape == target[name].shape:
            target[name].copy_(source[name])
            kept.add(name)
    lists = {
        "new": target.keys() - kept - in_part,
        "new in part": in_part,
        "dropped": source.keys() - kept - in_part,
    }
    text = "; ".join(f"{title}: {_modules_of(names)}" for title, names in lists.items() if names)
    if text:
        logger.warning(f"weights of the changed model that are not those of the old one: {text}")


def _parts_of_weights(model: MambaEMAForRegression) -> dict[str, tuple[list[str], list[str]]]:
    """For weights that are made of parts which another model may have or not: names of their parts, along the rows and
    along the columns."""
    config = model.config
    labels, contexts = config.labels, model.mamba_ema.contexts
    moments = ["mean", "deviation"] if POOLINGS[config.speech_encoder_pooling].deviation else ["mean"]
    of_head = {
        "dense.weight": (["all"], ["observation", *contexts]),
        "context_proj.weight": (labels, contexts),
        "out_proj.weight": (labels, ["all"]),
        "out_proj.bias": (labels, ["all"]),
    }
    heads = {f"{head}.{name}": parts for head in ("head", "spread_head") for name, parts in of_head.items()}
    return {"mamba_ema.projection.weight": (["all"], moments), **heads}


def _copy_parts(
    source: torch.Tensor,
    target: torch.Tensor,
    parts: tuple[list[str], list[str]],
    new_parts: tuple[list[str], list[str]],
) -> bool:
    """Copy the parts that both have. Columns that are new become zero: what they read changes nothing at first. Returns
    whether parts of the two have the same size, so that anything was copied."""
    blocks, new_blocks = (
        weight.view(len(rows), weight.shape[0] // len(rows), len(columns), -1)
        for weight, (rows, columns) in ((source, parts), (target, new_parts))
    )  # (row parts, rows of a part, column parts, columns of a part)
    if (blocks.shape[1], blocks.shape[3]) != (new_blocks.shape[1], new_blocks.shape[3]):
        return False
    for column, name in enumerate(new_parts[1]):
        if name not in parts[1]:
            new_blocks[:, :, column] = 0.0
            continue
        for row, label in enumerate(new_parts[0]):
            if label in parts[0]:
                new_blocks[row, :, column] = blocks[parts[0].index(label), :, parts[1].index(name)]
    return True


def _modules_of(names: Collection[str]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))
