"""A speech encoder without padding: the same weights and the same numbers as transformers', in a fraction of the time.

What transformers' WavLM, wav2vec 2.0 and HuBERT spend beyond their matrix products, and what is done here instead:

- A padded batch computes its padding. Here the frames of all utterances lie one after another, `(frames, hidden)`;
  only convolutions and attention look at utterances, one at a time or with zeros between, so that none sees another.
- WavLM's attention copies the relative position bias for every layer and utterance, and always returns the attention
  weights. Here the bias is a view of a table of distances.
- The convolutions work on (channels, time) and transpose around every layer norm. Here they are matrix products over
  (time, channels), where a stride is a view.
- On a CPU oneDNN computes the GELU and adds the residual while it writes a product.
- On other devices, where starting a kernel costs more than some values that are thrown away, utterances are convolved
  as one sequence, and attention works on padded groups of utterances of similar length.

Linear layers that are more than a weight and a bias (adapters, quantised weights, hooks) are called as the modules they
are. `hidden_states_one_by_one` in `speech_encoder.py` is the reference, which the tests compare this file with.
Reference: Chen et al. 2022, "WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing".
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation

try:
    _onednn: Any = torch.ops.mkldnn._linear_pointwise
except AttributeError:
    _onednn = None
# Whether oneDNN multiplies in bfloat16 and torch's attention does not, which has its own products by AMX alone.
_BFLOAT16_PRODUCTS = bool(_onednn) and torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()

# On a CPU utterances are encoded in groups of about this many frames (20 s): enough rows to keep the products busy, few
# enough that memory does not grow with the batch and the allocator can hand out the same blocks again and again.
GROUP_FRAMES = 1000
# Their number is a multiple of this: oneDNN divides rows into equal blocks, and 901 rows take longer than 1,008.
FRAMES_ALIGNMENT = 8
# Narrower encoders spend their time in Python, which one thread runs at a time.
THREADED_WIDTH = 512
# Orders of a batch's utterances that are tried, to find one with which its threads finish together.
ORDERS_TRIED = 50
# Values that a convolution computes at a time (8 MB in float32, 1.3 s of a published WavLM's first one), so that they
# are still in the processor's cache when the next operation reads them.
PIECE_VALUES = 2**21
# SpecAugment's spans of 10 frames would hide most of an utterance shorter than this (1 s at 50 frames a second).
SPEC_AUGMENT_MIN_FRAMES = 50
# Attention weights computed at a time (2 MB in float32), so that memory is linear in an utterance's length and they are
# still in the processor's cache when they are read.
ATTENTION_ENTRIES = 2**19
# On other devices, where many small blocks would leave most of the machine idle (128 MB in half precision).
MASK_ENTRIES = 2**26
# Memory-efficient attention on a GPU reads a mask whose rows begin at multiples of 8; any other is copied into one.
MASK_ALIGNMENT = 8
# The shortest utterance of a padded group has at least this part of the longest one's frames.
SIMILAR_LENGTH = 0.6
# Samples that the front end works on at a time on other devices (60 s; 0.5 GB in half precision).
FRONT_END_SAMPLES = 960_000
# Taps of the position embedding's convolution in one product there; the windows take as many times the frames' memory.
TAPS = 16

# glibc gives freed memory of the size of a layer's values back to the system, which hands it out again a page at a
# time: up to 5 % of a forward pass. A block of nearly 32 MB, freed untouched, lets it keep 64 MB for each thread.
torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")

# Attention of each utterance to itself: queries, keys, values (all frames, heads, size), WavLM's gates (all frames,
# heads) or None, and the probability of dropout -> (all frames, hidden)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]

# Called as modules wherever they are more than a weight and a bias, whatever they are.
_LINEAR_LAYERS = {
    *("projection", "q_proj", "k_proj", "v_proj", "out_proj", "gru_rel_pos_linear"),
    *("intermediate_dense", "output_dense"),
}
_CALLED_MODULES = _LINEAR_LAYERS | {"activation", "intermediate_act_fn"}  # `use_kernels=True` replaces their forward
_KNOWN_MODULES = ("torch.nn.", "transformers.models.", "transformers.activations", __name__.rpartition(".")[0] + ".")


def is_untouched(backbone: nn.Module) -> bool:
    """Whether the weights may be used directly: transformers' own modules, with nothing attached or wrapped around.

    Hooks, offloading and sharding must see every module called; reading the weights past them would ignore what they
    do. Linear layers and activations are not looked at: they are called where they are not plain, see [`product`].
    """
    return not _has_any_global_hook() and _is_untouched(backbone)


def _is_untouched(module: nn.Module) -> bool:
    return (
        type(module).__module__.startswith(_KNOWN_MODULES)
        and not _is_attached_to(module)
        and all(_is_untouched(child) for name, child in module.named_children() if name not in _CALLED_MODULES)
        and all(_has_bias(child) for name, child in module.named_children() if name.endswith("layer_norm"))
    )


def _has_bias(norm: nn.Module) -> bool:
    return isinstance(norm, (nn.LayerNorm, nn.GroupNorm)) and norm.bias is not None


def _is_attached_to(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or getattr(module.forward, "__func__", None) is not type(module).forward
    )


def fast_hidden_states(
    backbone: Any,
    waveforms: torch.Tensor,
    lengths: torch.Tensor,
    layers: Sequence[int],
    next_layer_reads: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Run an encoder's weights on utterances of different lengths, each as if it were alone.

    Args:
        backbone: a `WavLMModel`, `Wav2Vec2Model` or `HubertModel`; its dropout, layer drop and SpecAugment apply.
        waveforms: (batch, samples), right-padded; the padding is not read.
        lengths: (batch,) valid samples of each row.
        layers: hidden states to return: 0 is the input of the first layer, `num_hidden_layers` the model's
            `last_hidden_state`. Layers above the highest are not computed.
        next_layer_reads: called with each state that is returned, if given; the next layer reads its result.

    Returns:
        One (batch, frames, hidden) tensor for each of `layers`, zero past an utterance's end.
    """
    samples = lengths.tolist()

    def encode(group: list[int]) -> list[tuple[torch.Tensor, ...]]:
        return _encode(backbone, [waveforms[index, : samples[index]] for index in group], layers, next_layer_reads)

    groups = [list(range(len(samples)))]
    threaded_groups: list[list[int]] = []
    if waveforms.device.type == "cpu" and next_layer_reads is None:
        groups, threaded_groups = _divide(samples, backbone.config)
    results = [encode(group) for group in groups]
    if threaded_groups:
        results += _in_single_threads(encode, threaded_groups)
    order = [index for group in groups + threaded_groups for index in group]
    rows: list[list[torch.Tensor]] = []
    for states in zip(*results):
        by_index = dict(zip(order, itertools.chain.from_iterable(states)))
        rows.append([by_index[index] for index in range(len(samples))])
    return [nn.utils.rnn.pad_sequence(row, batch_first=True) for row in rows]


def _works_together(device: torch.device) -> bool:
    """Whether starting a kernel costs more than computing some values that are thrown away."""
    return device.type != "cpu"


def _divide(samples: list[int], config: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of indices of utterances: those that all threads compute together, and those that one thread each does.

    Threads that share each product wait for one another after each, thousands of times, and all wait for one that is
    interrupted. So every thread gets utterances of its own, but for the longest of a batch, which would keep one thread
    busy when the others have nothing left.
    """
    threads = torch.get_num_threads()
    longest_first = sorted(range(len(samples)), key=lambda index: -samples[index])
    left, together = sum(samples), 0
    # Gradients, autocast and compilation belong to the thread they were begun in.
    alone = threads > 1 and not (
        torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or config.hidden_size < THREADED_WIDTH
    )
    while together < len(samples) and (not alone or samples[longest_first[together]] * threads > left):
        left -= samples[longest_first[together]]
        together += 1
    limit = GROUP_FRAMES * math.prod(config.conv_stride)
    return (
        list(_groups(sorted(longest_first[:together]), samples, limit)),
        _evenly(longest_first[together:], samples, min(limit, left // (2 * threads)), threads),
    )


def _evenly(longest_first: list[int], samples: list[int], limit: int, threads: int) -> list[list[int]]:
    """Groups that threads, each taking the next one when it has nothing left, finish at nearly the same time.

    The longest first is good for many utterances; for few a random order often leaves less to wait for.
    """
    shuffled = random.Random(0)
    orders = [longest_first, *(shuffled.sample(longest_first, len(longest_first)) for _ in range(ORDERS_TRIED))]

    def finished(groups: list[list[int]]) -> int:
        ends = [0] * threads
        for group in groups:
            heapq.heapreplace(ends, ends[0] + sum(samples[index] for index in group))
        return max(ends)

    return min((list(_groups(order, samples, limit)) for order in orders), key=finished)


def _groups(indices: list[int], samples: list[int], limit: int) -> Iterator[list[int]]:
    """Consecutive indices of utterances that have no more than `limit` samples together, or of one that has more."""
    group: list[int] = []
    for index in indices:
        if group and sum(samples[other] for other in group) + samples[index] > limit:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _in_single_threads(function: Callable[[list[int]], Any], groups: list[list[int]]) -> list[Any]:
    """The function of each group, computed without gradients by threads with one core each."""
    inference = torch.is_inference_mode_enabled()

    def call(group: list[int]) -> Any:
        with torch.inference_mode() if inference else torch.no_grad():
            return function(group)

    try:
        results = _single_threads(torch.get_num_threads()).map(call, groups)
    except RuntimeError:  # no thread can be begun, as when Python is ending and this thread still works
        return [function(group) for group in groups]
    return list(results)


@functools.lru_cache(maxsize=1)
def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in each of which torch computes with one thread; they live as long as the process."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # when first asked in a thread torch takes the process' number, which would undo ours
        torch.set_num_threads(1)
        started.wait()

    threads = ThreadPoolExecutor(count, thread_name_prefix="speech-encoder", initializer=start)
    for _ in range(count):
        threads.submit(int)
    started.wait()
    torch.set_num_threads(count)  # also the number for threads to come, which `start` has changed
    return threads


if hasattr(os, "register_at_fork"):  # threads do not live on in a forked process
    os.register_at_fork(after_in_child=_single_threads.cache_clear)


def _encode(
    backbone: Any,
    utterances: list[torch.Tensor],
    layers: Sequence[int],
    next_layer_reads: Callable[[torch.Tensor], torch.Tensor] | None,
) -> list[tuple[torch.Tensor, ...]]:
    """Waveforms -> for each of `layers` the utterances' hidden states, (frames, hidden) each"""
    config, encoder = backbone.config, backbone.encoder
    dtype = encoder.layer_norm.weight.dtype
    # 1. convolution front end and projection
    features = _front_end(backbone.feature_extractor, [utterance.to(dtype) for utterance in utterances])
    frames = [len(utterance) for utterance in features]
    missing = -sum(frames) % FRAMES_ALIGNMENT
    if missing and not (_works_together(features[0].device) or torch.is_grad_enabled() or next_layer_reads):
        features.append(features[0].new_zeros(missing, features[0].shape[1]))  # another utterance; it is not returned
        frames.append(missing)
    hidden = _project(backbone.feature_projection, torch.cat(features))  # (all frames, hidden)
    if backbone.training and config.apply_spec_augment:
        hidden = _spec_augment(backbone, hidden, frames)
    # 2. positions; in half precision only the products are, the residual stream is float32
    hidden = _at_least_float32(hidden)
    hidden = hidden + _positions(encoder.pos_conv_embed, hidden, frames)
    if not config.do_stable_layer_norm:
        hidden = _norm(encoder.layer_norm, hidden)
    hidden = encoder.dropout(hidden)
    # 3. transformer layers up to the highest that is read
    states: dict[int, torch.Tensor] = {}  # only what is asked for: every other layer's memory is free again
    hidden = _keep(states, 0, hidden, frames, layers, next_layer_reads)
    attend: Any = attention_over(backbone, frames, hidden.device) if max(layers) else None
    layer: Any
    wide_norms = _norms(encoder.layers[: max(layers)], hidden.dtype)
    for index, (layer, norms) in enumerate(zip(encoder.layers, wide_norms), start=1):
        dropped = backbone.training and index > 1 and config.layerdrop > 0 and torch.rand([]) < config.layerdrop
        if not dropped:
            hidden = _checkpointed(layer, _layer)(layer, norms, hidden, attend, config.do_stable_layer_norm)
        if index == config.num_hidden_layers and config.do_stable_layer_norm:
            hidden = _norm(encoder.layer_norm, hidden)
        hidden = _keep(states, index, hidden, frames, layers, next_layer_reads)
    return [states[index].to(dtype).split(frames)[: len(utterances)] for index in layers]


def _keep(
    states: dict[int, torch.Tensor],
    index: int,
    hidden: torch.Tensor,
    frames: list[int],
    layers: Sequence[int],
    next_layer_reads: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Note a state that is returned; what the next layer reads."""
    if index not in layers:
        return hidden
    if next_layer_reads is not None:
        padded = next_layer_reads(nn.utils.rnn.pad_sequence(hidden.split(frames), batch_first=True))
        hidden = torch.cat([row[:length] for row, length in zip(padded, frames)])
    states[index] = hidden
    return hidden


def _checkpointed(layer: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose activations are computed again for the gradient where the layer says so."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        return functools.partial(layer._gradient_checkpointing_func, function)
    return function


def _project(projection: Any, features: torch.Tensor) -> torch.Tensor:
    """(all frames, channels) -> (all frames, hidden)"""
    if getattr(projection, "feat_proj_layer_norm", True):  # HuBERT may go without
        features = _norm(projection.layer_norm, features)
    return projection.dropout(linear(features, projection.projection))


def _front_end(feature_extractor: Any, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
    """Waveforms (samples,) -> features (frames, channels): convolutions as matrix products over (time, channels)"""
    layers = list(feature_extractor.conv_layers)
    weights = [layer.conv.weight.transpose(1, 2).flatten(1) for layer in layers]  # (out, kernel * in)
    if not _works_together(utterances[0].device):
        convolve = _checkpointed(layers[0], _convolve_all)
        return [convolve(layers, weights, utterance.unsqueeze(1)) for utterance in utterances]
    together = _checkpointed(layers[0], _convolve_together)
    samples = [len(utterance) for utterance in utterances]
    groups = _groups(list(range(len(samples))), samples, FRONT_END_SAMPLES)
    return [frames for group in groups for frames in together(layers, weights, [utterances[i] for i in group])]


def _convolve_all(layers: list[Any], weights: list[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """All convolutions of one utterance, (samples, 1) -> (frames, channels), in pieces of time.

    A frame depends on its receptive field alone, so that each piece is computed from the samples of its own frames and
    everything between stays in the processor's cache. What depends on the whole utterance, the group norm of base-sized
    encoders, is taken into the first convolution's weights beforehand.
    """
    biases, norms = [layer.conv.bias for layer in layers], [getattr(layer, "layer_norm", None) for layer in layers]
    if isinstance(norms[0], nn.GroupNorm):
        first, biases[0] = _with_norm_over_time(layers[0].conv, norms[0], weights[0], features[:, 0])
        weights, norms[0] = [first, *weights[1:]], None
    field, hop = _field_and_hop(layers)
    frames = (len(features) - field) // hop + 1
    # Where gradients are wanted all of it is kept in any case. In inference mode a view of a weight still says that it
    # requires a gradient.
    size = frames
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (features, *weights))):
        conv = layers[0].conv
        size = max(1, PIECE_VALUES // (hop // conv.stride[0] * conv.out_channels))
    pieces = []
    for start in range(0, frames, size):
        last = min(start + size, frames) - 1
        piece = features[start * hop : last * hop + field]
        for layer, weight, bias, norm in zip(layers, weights, biases, norms):
            piece = _convolve(layer, weight, bias, norm, piece)
        pieces.append(piece)
    return torch.cat(pieces)


def _convolve_together(
    layers: list[Any], weights: list[torch.Tensor], utterances: list[torch.Tensor]
) -> list[torch.Tensor]:
    """All convolutions of all utterances as one sequence, (samples,) each -> (frames, channels) each.

    Every utterance begins at a multiple of the hop, so that it has the frames that it has alone; those between, which
    see the end of one and the beginning of the next, are left out.
    """
    field, hop = _field_and_hop(layers)
    first, norm = layers[0], getattr(layers[0], "layer_norm", None)
    if isinstance(norm, nn.GroupNorm):  # another weight for each utterance
        stride, convolved = first.conv.stride[0], []
        for utterance in utterances:
            weight, bias = _with_norm_over_time(first.conv, norm, weights[0], utterance)
            features = _convolve(first, weight, bias, None, utterance.unsqueeze(1))
            length = math.ceil(len(utterance) / hop) * (hop // stride)
            convolved.append(F.pad(features, (0, 0, 0, length - len(features))))
        sequence = torch.cat(convolved)
    else:
        samples = torch.cat([F.pad(utterance, (0, -len(utterance) % hop)) for utterance in utterances])
        sequence = _convolve(first, weights[0], first.conv.bias, norm, samples.unsqueeze(1))
    for layer, weight in zip(layers[1:], weights[1:]):
        sequence = _convolve(layer, weight, layer.conv.bias, getattr(layer, "layer_norm", None), sequence)
    frames, start = [], 0
    for utterance in utterances:
        frames.append(sequence[start : start + (len(utterance) - field) // hop + 1])
        start += math.ceil(len(utterance) / hop)
    return frames


def _field_and_hop(layers: list[Any]) -> tuple[int, int]:
    """Samples that a frame of the front end sees, and from one frame to the next."""
    field = hop = 1
    for layer in reversed(layers):
        field = (field - 1) * layer.conv.stride[0] + layer.conv.kernel_size[0]
        hop *= layer.conv.stride[0]
    return field, hop


def _convolve(
    layer: Any, weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.LayerNorm | None, features: torch.Tensor
) -> torch.Tensor:
    """A strided convolution with its norm and activation, (time, channels) -> (new time, new channels)"""
    windows = features.unfold(0, layer.conv.kernel_size[0], layer.conv.stride[0])  # (new time, channels, kernel)
    windows = windows.transpose(1, 2).flatten(1)
    if norm is None:
        return product(windows, weight, bias, layer.activation)
    return layer.activation(_norm(norm, product(windows, weight, bias)))


def _with_norm_over_time(
    conv: nn.Conv1d, norm: nn.GroupNorm, weight: torch.Tensor, samples: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution of one channel that give its outputs normalised over the utterance.

    With the windows' mean m and covariance C, an output channel of weight w has the mean w·m and the variance w·C·w, so
    that the norm is an affine map of the weight, known before anything is convolved. Neighbouring samples are nearly
    equal and high-pass weights cancel them: hence float64.

    Args:
        conv: (out, 1, kernel); its bias cancels.
        norm: one group for each channel.
        weight: (out, kernel).
        samples: (samples,) of one utterance.
    """
    device = torch.device("cpu") if samples.device.type == "mps" else samples.device  # Apple's GPUs have no float64
    values, wide, gain, offset = (
        tensor.to(device, torch.float64) for tensor in (samples, weight, norm.weight, norm.bias)
    )
    windows = values.unfold(0, conv.kernel_size[0], conv.stride[0])  # (time, kernel)
    mean = windows.mean(dim=0)
    centred = windows - mean
    variance = (wide @ (centred.t() @ centred / len(windows)) * wide).sum(dim=1)
    scale = gain / (variance + norm.eps).sqrt()  # (out,)
    return (wide * scale.unsqueeze(1)).to(weight), (offset - scale * (wide @ mean)).to(weight)


def _positions(embedding: Any, hidden: torch.Tensor, frames: list[int]) -> torch.Tensor:
    """The convolutional position embedding of each utterance, (all frames, hidden) -> the same"""
    conv = embedding.conv
    weight, bias = conv.weight, conv.bias  # the weight is computed from its norm and its direction: read it only once
    if weight.shape[1] % 16:  # oneDNN 3.12 errs on bfloat16 groups of 8 channels; no published WavLM has them
        weight, bias = _at_least_float32(weight), _at_least_float32(bias)
    hidden = hidden.to(weight.dtype)
    # One sequence with zeros between the utterances, as many as each is padded with.
    gap = hidden.new_zeros(int(conv.padding[0]), hidden.shape[1])
    sequence = torch.cat([gap, *(piece for utterance in hidden.split(frames) for piece in (utterance, gap))])
    if _works_together(hidden.device):
        output = _convolve_in_groups(conv, weight, bias, sequence)
    else:
        output = F.conv1d(sequence.t().unsqueeze(0), weight, bias, groups=conv.groups)[0].t()
    starts = itertools.accumulate((length + len(gap) for length in frames), initial=0)
    return embedding.activation(torch.cat([output[start : start + length] for start, length in zip(starts, frames)]))


def _convolve_in_groups(
    conv: nn.Conv1d, weight: torch.Tensor, bias: torch.Tensor, sequence: torch.Tensor
) -> torch.Tensor:
    """A convolution of many taps in groups of channels as few matrix products, (time, hidden) -> (less time, hidden)"""
    (groups, taps), count = (conv.groups, conv.kernel_size[0]), math.gcd(conv.kernel_size[0], TAPS)
    sequence = sequence.unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, time, channels)
    windows = sequence.unfold(1, count, 1).flatten(2)  # (groups, time, channels * count)
    weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # (groups, channels, out, taps)
    length = sequence.shape[1] - taps + 1
    output = bias.view(groups, 1, -1).expand(-1, length, -1)
    for tap in range(0, taps, count):
        factor = weight[..., tap : tap + count].transpose(2, 3).flatten(1, 2)  # (groups, channels * count, out)
        output = torch.baddbmm(output, windows[:, tap : tap + length], factor)
    return output.transpose(0, 1).flatten(1)


def _layer(
    layer: Any, norms: Sequence[torch.Tensor], hidden: torch.Tensor, attend: Attend, norm_first: bool
) -> torch.Tensor:
    """One transformer layer, (all frames, hidden) -> the same; `norms` are from [`_norms`]."""
    attention, feed_forward = layer.attention, layer.feed_forward
    inputs = _norm(layer.layer_norm, hidden, norms[:2]) if norm_first else hidden
    attended = unpadded_attention(attention, inputs, attend)
    hidden = add_linear(hidden, attended, attention.out_proj, layer.dropout)
    if not norm_first:
        hidden = _norm(layer.layer_norm, hidden, norms[:2])
    inputs = _norm(layer.final_layer_norm, hidden, norms[2:]) if norm_first else hidden
    inner = linear(inputs, feed_forward.intermediate_dense, feed_forward.intermediate_act_fn)
    inner = feed_forward.intermediate_dropout(inner)
    hidden = add_linear(hidden, inner, feed_forward.output_dense, feed_forward.output_dropout)
    return hidden if norm_first else _norm(layer.final_layer_norm, hidden, norms[2:])


def _norms(layers: Sequence[Any], dtype: torch.dtype) -> list[Sequence[torch.Tensor]]:
    """Weight and bias of both layer norms of each layer, converted to this dtype in one go, as each takes a kernel.

    Nothing where the layers do it themselves: with gradients, which may be of recomputed layers, one at a time.
    """
    norms = [norm for layer in layers for norm in (layer.layer_norm, layer.final_layer_norm)]
    if torch.is_grad_enabled() or not norms or norms[0].weight.dtype == dtype:
        return [()] * len(layers)
    tensors = torch.stack([tensor for norm in norms for tensor in (norm.weight, norm.bias)]).to(dtype)
    return [tensors[start : start + 4].unbind() for start in range(0, len(tensors), 4)]


def _spec_augment(backbone: Any, hidden: torch.Tensor, frames: list[int]) -> torch.Tensor:
    """SpecAugment on the utterances that are long enough for it, (all frames, hidden) -> the same"""
    return torch.cat(
        [
            backbone._mask_hidden_states(utterance.unsqueeze(0).clone())[0]
            if len(utterance) >= SPEC_AUGMENT_MIN_FRAMES
            else utterance
            for utterance in hidden.split(frames)
        ]
    )


def _norm(norm: nn.LayerNorm, hidden: torch.Tensor, affine: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
    """Layer norm in the dtype of `hidden`, which may be wider than the weights'; `affine`: these in that dtype."""
    weight, bias = affine or (norm.weight.to(hidden.dtype), norm.bias.to(hidden.dtype))
    return F.layer_norm(hidden, norm.normalized_shape, weight, bias, norm.eps)


# Attention. The bias of query i and key j depends on their distance j - i, so it is a table of `2 * frames - 1`
# distances a head. With the keys in reverse order the distance is a function of i + j: row i of the bias is the table
# from i on. Rows are overlapping views of one table, which take no memory. Gate: Chi et al. 2022, "XLM-E".


def position_biases(wavlm: Any, lengths: Sequence[int], dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """The position bias for queries and reversed keys, (heads, length, length), by length: views of one table."""
    first_layer: Any = wavlm.encoder.layers[0]
    attention = first_layer.attention
    widest = max(lengths)
    distances = torch.arange(widest - 1, -widest, -1, device=attention.rel_attn_embed.weight.device)
    buckets = attention._relative_positions_bucket(distances)
    table = attention.rel_attn_embed(buckets).to(dtype).t().contiguous()  # (heads, 2 * widest - 1)
    return {length: table[:, widest - length : widest + length - 1].unfold(1, length, 1) for length in set(lengths)}


def attention_over(backbone: Any, frames: list[int], device: torch.device) -> Attend:
    """How the utterances of a batch attend to themselves, in all layers.

    Args:
        backbone: a `WavLMModel`, `Wav2Vec2Model` or `HubertModel`.
        frames: frames of each utterance.
        device: of the frames.
    """
    if _works_together(device):
        return _together(backbone, frames, device)
    dtype, attend = backbone.encoder.layer_norm.weight.dtype, _attend_in_bfloat16
    if dtype != torch.bfloat16 or not _BFLOAT16_PRODUCTS or torch.is_grad_enabled():
        dtype, attend = torch.promote_types(dtype, torch.float32), _attend_fused
    biases = position_biases(backbone, frames, dtype) if backbone.config.model_type == "wavlm" else {}
    # Without gradients the masks of all blocks take the same place: memory stays in the cache and does not grow.
    place = None if torch.is_grad_enabled() else torch.empty(max(ATTENTION_ENTRIES, *frames), dtype=dtype)
    return functools.partial(_attend_one_by_one, frames, attend, biases, place)


def unpadded_attention(attention: Any, inputs: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Attention of each utterance to itself, before the output projection.

    Args:
        attention: a `WavLMAttention`, `Wav2Vec2Attention` or `HubertAttention`.
        inputs: (all frames, hidden).
        attend: from [`attention_over`].

    Returns:
        (all frames, hidden)
    """
    heads, size = attention.num_heads, attention.head_dim
    if _is_plain(attention.q_proj):
        inputs = inputs.to(attention.q_proj.weight.dtype)  # once for all that read them
    projections = [linear(inputs, layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    queries, keys, values = (projection.view(-1, heads, size) for projection in projections)
    gates = _gates(attention, inputs) if hasattr(attention, "gru_rel_pos_linear") else None
    return attend(queries, keys, values, gates, attention.dropout if attention.training else 0.0)


def _gates(attention: Any, inputs: torch.Tensor) -> torch.Tensor:
    """By how much each query weighs its position bias, (all frames, hidden) -> (all frames, heads)"""
    heads, size, gate = attention.num_heads, attention.head_dim, attention.gru_rel_pos_linear
    inputs = inputs.view(-1, heads, size)
    if _is_plain(gate) and gate.bias is not None:
        # Four outputs of the layer are summed; summing their weights first is the same, four times cheaper.
        weight, bias = gate.weight.view(2, 4, size).sum(dim=1), gate.bias.view(2, 4).sum(dim=1)
        summed = F.linear(inputs.to(weight.dtype), weight, bias)
    else:
        summed = _call(gate, inputs).unflatten(-1, (2, 4)).sum(dim=-1)
    gate_a, gate_b = _at_least_float32(summed).sigmoid().unbind(dim=-1)  # (all frames, heads) each
    return gate_a * (gate_b * attention.gru_rel_pos_const.view(heads) - 1.0) + 2.0


def _attend_one_by_one(
    frames: list[int],
    attend: Callable[..., torch.Tensor],
    biases: dict[int, torch.Tensor],
    place: torch.Tensor | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gates: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """By a function for blocks; `biases` are WavLM's, from [`position_biases`]; masks go into `place`, if given."""
    output = torch.empty_like(queries)
    for length, end in zip(frames, itertools.accumulate(frames)):
        query, key, value, into = (rows[end - length : end] for rows in (queries, keys, values, output))
        if biases:
            key, value = key.flip(0), value.flip(0)
        query, key, value = (rows.transpose(0, 1).contiguous() for rows in (query, key, value))  # (heads, frames, size)
        heads, rows = len(query), length  # a gradient needs all of it in any case
        if place is not None:
            heads, rows = max(1, ATTENTION_ENTRIES // length**2), max(1, ATTENTION_ENTRIES // length)
        for first, start in itertools.product(range(0, len(query), heads), range(0, length, rows)):
            head, row = slice(first, first + heads), slice(start, start + rows)
            mask = None
            if gates is not None:
                block, gate = biases[length][head, row], gates[end - length : end].t().unsqueeze(-1)[head, row]
                out = None if place is None else place[: block.numel()].view(block.shape)
                mask = torch.mul(gate.to(block.dtype), block, out=out)
            into[row, head] = attend(query[head, row], key[head], value[head], mask, dropout).transpose(0, 1)
    return output.flatten(1)


def _attend_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """(heads, queries, size), twice (heads, keys, size), (heads, queries, keys) -> (heads, queries, size)"""
    mask = None if mask is None else mask[None]
    return F.scaled_dot_product_attention(query[None], key[None], value[None], mask, dropout)[0]


def _attend_in_bfloat16(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """As [`_attend_fused`], by two products of oneDNN, in place of the mask; scores are rounded, as WavLM's are."""
    query, key, value = (rows.to(torch.bfloat16) for rows in (query * query.shape[-1] ** -0.5, key, value))
    scores = query @ key.transpose(1, 2) if mask is None else mask.baddbmm_(query, key.transpose(1, 2))
    return F.dropout(scores.softmax(dim=-1), dropout) @ value


@dataclass
class _PaddedGroup:
    """Utterances of similar length as a padded batch.

    Attributes:
        shape: utterances, and frames of each with padding.
        rows: (batch * padded,) the frame at each place, the first one where there is padding; None where the utterances
            of the batch are as long as each other and lie as they come.
        absent: (batch, 1, 1, padded) minus infinity where a key is padding, 0 elsewhere; None without padding.
        bias: (heads, padded, padded or more) WavLM's position bias; None for others.
    """

    shape: tuple[int, int]
    rows: torch.Tensor | None
    absent: torch.Tensor | None
    bias: torch.Tensor | None


def _together(backbone: Any, frames: list[int], device: torch.device) -> Attend:
    """[`_attend_together`] with all that does not change between layers, so that none of them waits for the device."""
    dtype = backbone.encoder.layer_norm.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    members: list[list[int]] = []
    for index in sorted(range(len(frames)), key=lambda index: -frames[index]):
        if not members or frames[index] < SIMILAR_LENGTH * frames[members[-1][0]]:
            members.append([])
        members[-1].append(index)
    with_bias = backbone.config.model_type == "wavlm"
    equal = len(set(frames)) == 1
    alignment = MASK_ALIGNMENT if with_bias and not equal else 1
    padded = [frames[group[0]] + -frames[group[0]] % alignment for group in members]
    biases = position_biases(backbone, padded, dtype) if with_bias else {}
    biases = {width: F.pad(bias.flip(2), (0, -width % MASK_ALIGNMENT)) for width, bias in biases.items()}
    if equal:
        batch = _PaddedGroup((len(frames), frames[0]), None, None, biases.get(frames[0]))
        return functools.partial(_attend_together, [batch], None)
    starts = torch.tensor([0, *itertools.accumulate(frames)])
    lengths = torch.tensor(frames)
    groups, places, offset = [], torch.empty(int(starts[-1]), dtype=torch.long), 0
    for group, width in zip(members, padded):
        within = torch.arange(width)
        present = within < lengths[group].unsqueeze(1)  # (batch, width)
        rows = (starts[group].unsqueeze(1) + within).where(present, 0)
        places[rows[present]] = offset + present.flatten().nonzero()[:, 0]
        offset += present.numel()
        absent = None
        if not bool(present.all()):
            absent = torch.zeros(present.shape).masked_fill(~present, -torch.inf)[:, None, None].to(device, dtype)
        groups.append(_PaddedGroup((len(group), width), rows.flatten().to(device), absent, biases.get(width)))
    return functools.partial(_attend_together, groups, places.to(device))


def _padded(values: torch.Tensor, group: _PaddedGroup) -> torch.Tensor:
    """(all frames, heads, ...) -> (batch, heads, padded, ...)"""
    if group.rows is not None:
        values = values.index_select(0, group.rows)
    return values.unflatten(0, group.shape).transpose(1, 2)


def _attend_together(
    groups: list[_PaddedGroup],
    places: torch.Tensor | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gates: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """In padded groups; `places` (all frames,) is where among all their rows each frame is, None where it is there."""
    heads, outputs = queries.shape[1], []
    for group in groups:
        batch, padded = group.shape
        query, key, value = (_padded(rows, group) for rows in (queries, keys, values))
        gate = None if gates is None else _padded(gates.to(query.dtype), group).unsqueeze(-1).contiguous()
        # A position bias is made for so many queries at a time.
        size = padded if gate is None else max(1, MASK_ENTRIES // (batch * heads * padded))
        blocks = []
        for start in range(0, padded, size):
            block, mask = slice(start, start + size), group.absent
            if gate is not None and group.bias is not None:
                bias = group.bias[:, block]
                mask = gate[:, :, block] * bias if mask is None else torch.addcmul(mask, gate[:, :, block], bias)
                mask = mask[..., :padded]
            blocks.append(F.scaled_dot_product_attention(query[:, :, block], key, value, mask, dropout))
        output = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)  # (batch, heads, padded, size)
        outputs.append(output.transpose(1, 2).flatten(2).flatten(0, 1))
    return outputs[0] if places is None else torch.cat(outputs).index_select(0, places)


# Linear layers with what follows them, a GELU or the addition to a residual, written by oneDNN in one pass on a CPU.


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


def _fuses(hidden: torch.Tensor) -> bool:
    """Whether oneDNN's operator may run: it has no gradient and does not know autocast."""
    inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return inference and hidden.device.type == "cpu" and hidden.dtype in _FUSED_DTYPES


def _is_plain(layer: Any) -> bool:
    """Whether a linear layer is nothing but a weight and a bias."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not _is_attached_to(layer)


def linear(hidden: torch.Tensor, layer: Any, activation: nn.Module | None = None) -> torch.Tensor:
    """activation(layer(hidden)), (rows, in) -> (rows, out), in the dtype of the layer's weights."""
    if _is_plain(layer):
        return product(hidden, layer.weight, layer.bias, activation)
    output = _call(layer, hidden)
    return output if activation is None else activation(output)


def _call(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A layer as the module it is; its weights' dtype is not always a dtype of inputs."""
    weight = getattr(layer, "weight", None)
    dtype = weight.dtype if isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point else hidden.dtype
    return layer(hidden.to(dtype))


def product(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: nn.Module | None = None
) -> torch.Tensor:
    """activation(hidden @ weight.T + bias), (rows, in) -> (rows, out), in the dtype of the weight, (out, in)."""
    hidden = hidden.to(weight.dtype)
    if _fuses(hidden):
        if activation is None:
            return _onednn(hidden, weight, bias, "none", [], "")
        if type(activation) is GELUActivation and not _is_attached_to(activation):
            return _onednn(hidden, weight, bias, "gelu", [], "none")
    output = F.linear(hidden, weight, bias)
    return output if activation is None else activation(output)


def add_linear(residual: torch.Tensor, hidden: torch.Tensor, layer: Any, dropout: nn.Module) -> torch.Tensor:
    """residual + dropout(layer(hidden)), (rows, out) and (rows, in) -> (rows, out), in the dtype of the residual."""
    if _is_plain(layer):
        hidden = hidden.to(layer.weight.dtype)
        if residual.dtype == hidden.dtype and not dropout.training and _fuses(hidden):
            return _onednn.binary(hidden, residual, layer.weight, layer.bias, "add")
    return residual + dropout(linear(hidden, layer))


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Int8Linear(nn.Module):
    """A linear layer whose products are of 8-bit integers, for inference on a CPU.

    Each output's weights are divided by their largest magnitude / 127 and rounded, once; each input row likewise, as it
    comes. The product of integers is exact, so that rounding is the only difference. Reference: Dettmers et al. 2022,
    "LLM.int8()", section 2.1 (vector-wise quantisation).
    """

    weight: torch.Tensor  # (out, in), int8
    scale: torch.Tensor  # (out,)

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight, scale = _rounded_to_8_bits(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0])
        self.bias = layer.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in the dtype of `hidden`

        Raises:
            RuntimeError: a gradient is wanted, or the layer is not on a CPU.
        """
        if hidden.device.type != "cpu":
            raise RuntimeError(f"a speech encoder in 8 bits runs on a CPU, not on {hidden.device}")
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise RuntimeError("a speech encoder in 8 bits gives no gradient: train the model, then quantise it")
        rows, scale = _rounded_to_8_bits(hidden.flatten(0, -2))
        products = torch._int_mm(rows, self.weight.t()).to(torch.float32)  # (rows, out)
        output = products.mul_(scale).mul_(self.scale)
        if self.bias is not None:
            output += self.bias
        return output.to(hidden.dtype).unflatten(0, hidden.shape[:-1])


def _rounded_to_8_bits(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, values) -> integers from -127 to 127 of the same shape, and (rows, 1) by which they are multiplied"""
    rows = rows.float()
    scale = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True).clamp_min(1e-30) / 127
    return (rows / scale).round_().to(torch.int8), scale


def quantize_linear_layers(backbone: nn.Module) -> None:
    """Put an [`Int8Linear`] in the place of each linear layer of the transformer but WavLM's gates, which are tiny.

    Raises:
        ValueError: a linear layer is more than a weight and a bias (an adapter, say), or not on a CPU.
    """
    layers = {
        name: layer
        for name, layer in backbone.get_submodule("encoder").named_modules()
        if name.rpartition(".")[2] in _LINEAR_LAYERS - {"gru_rel_pos_linear"}
    }
    for name, layer in layers.items():
        if not _is_plain(layer) or layer.weight.device.type != "cpu":
            raise ValueError(
                f"{name} of the speech encoder is {type(layer).__name__}, on {layer.weight.device}; what can be "
                "quantised are linear layers on a CPU without adapters (merge them), hooks or quantised weights"
            )
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(backbone.get_submodule(f"encoder.{parent}"), own, Int8Linear(layer))
