"""WavLM's attention with its gated relative position bias, over utterances that lie one after another.

The bias of query i and key j depends on their distance j - i, so it is a table of `2 * frames - 1` distances a head.
With the keys in reverse order the distance is a function of i + j: row i of the bias is the table from i on. Rows are
overlapping views of one table, which take no memory. The gate is that of Chi et al. 2022, "XLM-E".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import WavLMModel

from .fused_linear import at_least_float32, linear

# Attention weights computed at a time (8 MB in float32), so that memory is linear in an utterance's length.
ATTENTION_ENTRIES = 2**21
# On other devices, where many small blocks would leave most of the machine idle (128 MB in half precision).
MASK_ENTRIES = 2**26
# Memory-efficient attention on a GPU reads a mask whose rows are a multiple of 8 long; any other is copied into one.
MASK_ALIGNMENT = 8


def position_biases(wavlm: WavLMModel, frames: list[int]) -> dict[int, torch.Tensor]:
    """The position bias for queries and reversed keys, (heads, length, length), by length: views of one table.

    There is one for every length in `frames`, and one for the longest rounded up to [`MASK_ALIGNMENT`].
    """
    first_layer: Any = wavlm.encoder.layers[0]
    attention = first_layer.attention
    widest = _aligned(max(frames))
    distances = torch.arange(widest - 1, -widest, -1, device=attention.rel_attn_embed.weight.device)
    buckets = attention._relative_positions_bucket(distances)
    table = at_least_float32(attention.rel_attn_embed(buckets)).t().contiguous()  # (heads, 2 * widest - 1)
    return {
        length: table[:, widest - length : widest + length - 1].unfold(1, length, 1) for length in {*frames, widest}
    }


def _aligned(length: int) -> int:
    return length + -length % MASK_ALIGNMENT


def unpadded_attention(
    attention: Any, inputs: torch.Tensor, frames: list[int], biases: dict[int, torch.Tensor]
) -> torch.Tensor:
    """Attention of each utterance to itself, before the output projection.

    Args:
        attention: a `WavLMAttention`.
        inputs: (all frames, hidden).
        frames: frames of each utterance.
        biases: from [`position_biases`].

    Returns:
        (all frames, hidden)
    """
    heads, size = attention.num_heads, attention.head_dim
    inputs = inputs.to(attention.q_proj.weight.dtype)
    projections = [linear(inputs, layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    queries, keys, values = (projection.view(-1, heads, size) for projection in projections)
    # The gate sums four outputs of its linear layer; summing their weights first is the same, four times cheaper.
    gate = attention.gru_rel_pos_linear
    weight, bias = gate.weight.view(2, 4, size).sum(dim=1), gate.bias.view(2, 4).sum(dim=1)
    gate_a, gate_b = at_least_float32(F.linear(inputs.view(-1, heads, size), weight, bias)).sigmoid().unbind(dim=-1)
    gates = gate_a * (gate_b * attention.gru_rel_pos_const.view(heads) - 1.0) + 2.0  # (all frames, heads)
    dropout = attention.dropout if attention.training else 0.0
    attend = _attend_one_by_one if inputs.device.type == "cpu" else _attend_together
    return attend(queries, keys, values, gates, frames, biases, dropout)


def _attend_one_by_one(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gates: torch.Tensor,
    frames: list[int],
    biases: dict[int, torch.Tensor],
    dropout: float,
) -> torch.Tensor:
    """Queries, keys, values (all frames, heads, size), gates (all frames, heads) -> (all frames, hidden)"""
    outputs = []
    utterances = zip(queries.split(frames), keys.split(frames), values.split(frames), gates.split(frames))
    for query, key, value, gate in utterances:
        bias = biases[len(query)]
        key, value = key.flip(0).transpose(0, 1), value.flip(0).transpose(0, 1)  # (heads, frames, size), reversed
        query, gate = query.transpose(0, 1), gate.t().unsqueeze(-1)  # (heads, frames, size), (heads, frames, 1)
        rows = max(1, ATTENTION_ENTRIES // (query.shape[0] * query.shape[1]))
        for start in range(0, query.shape[1], rows):
            block = slice(start, start + rows)
            output = F.scaled_dot_product_attention(
                query[None, :, block],
                key[None],
                value[None],
                attn_mask=(gate[:, block] * bias[:, block])[None],
                dropout_p=dropout,
            )
            outputs.append(output[0].transpose(0, 1).flatten(1))  # (rows, hidden)
    return torch.cat(outputs)


def _attend_together(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gates: torch.Tensor,
    frames: list[int],
    biases: dict[int, torch.Tensor],
    dropout: float,
) -> torch.Tensor:
    """The same in one padded batch, for devices where starting a kernel costs more than some padding of attention.

    Nothing here reads a tensor's values or copies from the CPU: either would wait for the device, in every layer.
    """
    padded = _aligned(max(frames))
    query, key, value, gate = (_pad(rows, frames, padded).transpose(1, 2) for rows in (queries, keys, values, gates))
    # Reversing the padded rows puts the padding first and every key where an utterance of this length has its distance.
    key, value = key.flip(2), value.flip(2)  # (batch, heads, padded, size)
    absent = _pad(gates.new_zeros(len(gates)), frames, padded, -torch.inf).flip(1)[:, None, None]
    bias = biases[padded]  # padded keys are absent, and the outputs of padded queries are left out
    outputs = []
    rows = max(1, MASK_ENTRIES // (query.shape[0] * query.shape[1] * padded))
    for start in range(0, padded, rows):
        block = slice(start, start + rows)
        mask = torch.addcmul(absent, gate[:, :, block, None], bias[:, block])  # (batch, heads, rows, padded)
        output = F.scaled_dot_product_attention(
            query[:, :, block], key, value, attn_mask=mask.to(query.dtype), dropout_p=dropout
        )
        outputs.append(output.transpose(1, 2))
    output = torch.cat(outputs, dim=1).flatten(2)  # (batch, padded, hidden)
    return torch.cat([row[:length] for row, length in zip(output, frames)])


def _pad(rows: torch.Tensor, frames: list[int], length: int, value: float = 0.0) -> torch.Tensor:
    """(all frames, ...) -> (batch, length, ...) in one copy; `pad_sequence` makes one for each utterance."""
    padding = rows.new_full((length, *rows.shape[1:]), value)
    pieces = [piece for row in rows.split(frames) for piece in (row, padding[len(row) :])]
    return torch.cat(pieces).unflatten(0, (len(frames), length))
