"""A linear layer with what follows it, a GELU or the addition to a residual, written by oneDNN in one pass on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation

try:
    _onednn: Any = torch.ops.mkldnn._linear_pointwise
except AttributeError:
    _onednn = None


def _dtypes_of_this_processor() -> frozenset[torch.dtype]:
    """The operator is private to torch and may change or miss a dtype: it is tried on a product with a known result."""
    works = set()
    ones = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16) if _onednn is not None else ():
        hidden, bias = ones.to(dtype), ones[0].to(dtype)
        try:
            gelu, added = _onednn(hidden, hidden, bias, "gelu", [], "none"), _onednn.binary(*[hidden] * 3, bias, "add")
        except (RuntimeError, TypeError):
            continue
        if torch.allclose(gelu.float(), F.gelu(3 * ones), atol=2e-2) and torch.equal(added.float(), 4 * ones):
            works.add(dtype)
    return frozenset(works)


_FUSED_DTYPES = _dtypes_of_this_processor()


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Half precision -> float32; wider types stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _fuses(hidden: torch.Tensor) -> bool:
    """Whether oneDNN's operator may run: it has no gradient and does not know autocast."""
    inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return inference and hidden.device.type == "cpu" and hidden.dtype in _FUSED_DTYPES


def linear(hidden: torch.Tensor, layer: nn.Linear, activation: nn.Module | None = None) -> torch.Tensor:
    """activation(layer(hidden)), (rows, in) -> (rows, out), in the dtype of the layer's weights."""
    return product(hidden, layer.weight, layer.bias, activation)


def product(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: nn.Module | None = None
) -> torch.Tensor:
    """activation(hidden @ weight.T + bias), (rows, in) -> (rows, out), in the dtype of the weight, (out, in)."""
    hidden = hidden.to(weight.dtype)
    if _fuses(hidden):
        if activation is None:
            return _onednn(hidden, weight, bias, "none", [], "")
        if isinstance(activation, GELUActivation):
            return _onednn(hidden, weight, bias, "gelu", [], "none")
    output = F.linear(hidden, weight, bias)
    return output if activation is None else activation(output)


def add_linear(residual: torch.Tensor, hidden: torch.Tensor, layer: nn.Linear, dropout: nn.Module) -> torch.Tensor:
    """residual + dropout(layer(hidden)), (rows, out) and (rows, in) -> (rows, out), in the dtype of the residual."""
    hidden = hidden.to(layer.weight.dtype)
    if residual.dtype == hidden.dtype and not dropout.training and _fuses(hidden):
        return _onednn.binary(hidden, residual, layer.weight, layer.bias, "add")
    return residual + dropout(linear(hidden, layer))
