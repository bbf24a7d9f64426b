"""Optimizer groups: a learning rate for the speech encoder and one for the rest, decay for matrices only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..speech_encoder import BACKBONES


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rate: float, encoder_learning_rate: float
) -> list[dict[str, Any]]:
    """Optimizer groups that hold every trainable parameter exactly once; `ValueError` where there is none.

    The speech encoder's parameters get their own learning rate. Vectors (biases, norms) and what is marked
    `_no_weight_decay` (the decay rates and step sizes of Mamba-2) are not decayed.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_encoder = any(f".speech_encoder.{backbone}." in f".{name}" for backbone in BACKBONES)
            decayed = parameter.dim() > 1 and not getattr(parameter, "_no_weight_decay", False)
            groups.setdefault((in_encoder, decayed), []).append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter; is everything frozen?")
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "lr": encoder_learning_rate if in_encoder else learning_rate,
        }
        for (in_encoder, decayed), parameters in groups.items()
    ]


def check_parameter_groups(model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    """Raise `ValueError`, with the name of the first, where a trainable parameter is not in exactly one group; a layer
    left out would stay at its random start."""
    counts: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    wrong = [name for name, p in model.named_parameters() if counts.get(id(p), 0) != int(p.requires_grad)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} parameters are not in exactly one optimizer group (or are frozen and in one), the first is "
            f"{wrong[0]}"
        )


def require_finite_gradient(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Raise `ValueError` before a step along a gradient that is NaN or infinite; for
    `Optimizer.register_step_pre_hook`.

    In fp16, torch's GradScaler skips such steps itself, as part of looking for the right scale.
    """
    if getattr(optimizer, "found_inf", None) is not None:  # set by GradScaler around the step of a fused optimizer
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if not bool(torch.isfinite(norm)):
        raise ValueError(
            f"step {step}: the gradient's norm is {float(norm)}; the weights are still as before this step. A smaller "
            "learning rate, or training without bf16, helps most often"
        )
