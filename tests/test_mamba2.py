"""Mamba-2 against transformers' mixer, against the recurrence, and for every way to cut a conversation."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import Mamba2Config
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from modeling_mamba_ema.mamba2 import Mamba2, Mamba2Block, Mamba2State, chunk_scan, ssd, ssd_chunked, ssd_reference

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
D_MODEL, D_STATE, D_CONV, EXPAND, HEADDIM = 8, 5, 4, 2, 4

both_dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))


def make_mixer(dtype=torch.float64, seed=0, chunk_size=4, **changes):
    torch.manual_seed(seed)
    numbers = {"d_model": D_MODEL, "d_state": D_STATE, "d_conv": D_CONV, "expand": EXPAND, "headdim": HEADDIM}
    return Mamba2(**(numbers | changes), chunk_size=chunk_size).to(dtype)


def make_scan_inputs(batch, turns, heads, headdim, d_state, dtype, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(batch, turns, heads, headdim, dtype=dtype)
    dt = F.softplus(torch.randn(batch, turns, heads, dtype=dtype))
    A = -torch.empty(heads, dtype=dtype).uniform_(0.05, 4)
    B, C = torch.randn(2, batch, turns, d_state, dtype=dtype) / math.sqrt(d_state)
    return x, dt, A, B, C, torch.randn(batch, heads, headdim, d_state, dtype=dtype)


def whole(mixer, hidden_states, state=None):
    return mixer(hidden_states, torch.full((hidden_states.shape[0],), hidden_states.shape[1]), state)


def in_pieces(mixer, hidden_states, sizes, state=None):
    outputs = []
    for piece in hidden_states.split(sizes, dim=1):
        output, state = whole(mixer, piece, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def assert_states_close(state, other, tolerance):
    for tensor, expected in zip(state, other, strict=True):
        torch.testing.assert_close(tensor, expected, atol=tolerance, rtol=0)


def literal_mixer(mixer, hidden_states):
    """Mamba-2 turn by turn: projection, convolution, recurrence, gate, norm, projection."""
    inner, state_size = mixer.d_inner, mixer.d_state
    window = [torch.zeros(hidden_states.shape[0], mixer.conv_dim, dtype=hidden_states.dtype)] * mixer.d_conv
    state = torch.zeros(hidden_states.shape[0], mixer.nheads, mixer.headdim, state_size, dtype=hidden_states.dtype)
    outputs = []
    for turn in hidden_states.unbind(1):
        projected = turn @ mixer.in_proj.weight.T
        z, xBC, dt = projected[:, :inner], projected[:, inner : -mixer.nheads], projected[:, -mixer.nheads :]
        window = [*window[1:], xBC]
        xBC = F.silu((torch.stack(window, -1) * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias)
        x, B, C = xBC[:, :inner], xBC[:, inner : inner + state_size], xBC[:, -state_size:]
        x, dt = x.unflatten(-1, (mixer.nheads, mixer.headdim)), F.softplus(dt + mixer.dt_bias)
        state = torch.exp(-dt * mixer.A_log.exp())[..., None, None] * state + torch.einsum("bh,bhp,bn->bhpn", dt, x, B)
        y = torch.einsum("bhpn,bn->bhp", state, C) + mixer.D[:, None] * x
        y = y.flatten(1) * F.silu(z)
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight
        outputs.append(y @ mixer.out_proj.weight.T)
    return torch.stack(outputs, 1)


# Parity


@pytest.mark.parametrize("turns", [1, 3, 4, 17])
@pytest.mark.parametrize(("d_state", "headdim", "expand", "d_conv"), [(5, 4, 2, 4), (16, 8, 1, 2), (3, 16, 2, 3)])
def test_equals_the_mixer_of_transformers_with_the_same_weights(turns, d_state, headdim, expand, d_conv):
    config = Mamba2Config(
        hidden_size=D_MODEL,
        state_size=d_state,
        head_dim=headdim,
        num_heads=expand * D_MODEL // headdim,
        expand=expand,
        conv_kernel=d_conv,
        n_groups=1,
        num_hidden_layers=1,
        chunk_size=4,
    )
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    ours = make_mixer(torch.float32, d_state=d_state, headdim=headdim, expand=expand, d_conv=d_conv)
    theirs.load_state_dict(ours.state_dict())
    hidden_states = torch.randn(2, turns, D_MODEL)
    torch.testing.assert_close(whole(ours, hidden_states)[0], theirs(hidden_states), atol=1e-5, rtol=0)


@both_dtypes
@pytest.mark.parametrize("d_conv", [1, 4])
def test_equals_the_mixer_written_out_turn_by_turn(dtype, d_conv):
    mixer = make_mixer(dtype, d_conv=d_conv)
    hidden_states = torch.randn(3, 11, D_MODEL, dtype=dtype)
    torch.testing.assert_close(
        whole(mixer, hidden_states)[0], literal_mixer(mixer, hidden_states), atol=TOLERANCE[dtype], rtol=0
    )


def test_parameters_have_the_names_and_shapes_of_mamba_ssm():
    heads, inner = EXPAND * D_MODEL // HEADDIM, EXPAND * D_MODEL
    conv_dim = inner + 2 * D_STATE
    assert {name: tuple(p.shape) for name, p in make_mixer().named_parameters()} == {
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "in_proj.weight": (2 * inner + 2 * D_STATE + heads, D_MODEL),
        "conv1d.weight": (conv_dim, 1, D_CONV),
        "conv1d.bias": (conv_dim,),
        "norm.weight": (inner,),
        "out_proj.weight": (D_MODEL, inner),
    }


@both_dtypes
@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5, 8, 13, 40])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 64])
@pytest.mark.parametrize(("heads", "headdim", "d_state"), [(1, 1, 1), (3, 4, 5)])
@pytest.mark.parametrize("zero_initial_state", [True, False])
def test_chunked_scan_equals_the_recurrence(dtype, turns, chunk_size, heads, headdim, d_state, zero_initial_state):
    *inputs, initial_state = make_scan_inputs(2, turns, heads, headdim, d_state, dtype)
    initial_state = initial_state * (not zero_initial_state)
    expected = ssd_reference(*inputs, initial_state)
    for found in (ssd_chunked(*inputs, initial_state, chunk_size), ssd(*inputs, initial_state, chunk_size, False)):
        assert_states_close(found, expected, TOLERANCE[dtype])


@pytest.mark.skipif(not hasattr(modeling_mamba2, "mamba2_chunk_scan"), reason="transformers decorates no functions")
def test_the_scan_has_the_parameters_and_numbers_of_the_one_that_the_same_kernel_replaces_in_transformers():
    """The kernels library refuses to replace a function whose parameters are not the kernel's."""
    functions = chunk_scan, inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)
    own, theirs = (list(inspect.signature(function).parameters.values())[1:] for function in functions)
    assert [(one.name, one.kind) for one in own] == [(one.name, one.kind) for one in theirs]
    x, dt, A, B, C, state = make_scan_inputs(2, 70, 4, 8, 16, torch.float32)
    arguments = x, dt, A, B[:, :, None], C[:, :, None], 64
    found, expected = (function(*arguments, initial_states=state, return_final_states=True) for function in functions)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_chunked_scan_keeps_its_precision_where_the_decay_is_strong():
    x, dt, A, B, C, initial_state = make_scan_inputs(1, 64, 2, 4, 5, torch.float64)
    dt = dt * torch.where(torch.arange(64) % 2 == 0, 300.0, 1e-3)[:, None]
    inputs = (x, dt, A, B, C, initial_state)
    expected, _ = ssd_reference(*inputs)
    found, _ = ssd_chunked(*(tensor.float() for tensor in inputs), chunk_size=64)
    assert ((found - expected).abs().max() / expected.abs().max()) < 1e-6


# Streaming and padding


@both_dtypes
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16])
def test_pieces_of_one_size_equal_the_whole(dtype, size):
    mixer = make_mixer(dtype)
    hidden_states = torch.randn(2, 37, D_MODEL, dtype=dtype)
    expected, expected_state = whole(mixer, hidden_states)
    output, state = in_pieces(mixer, hidden_states, size)
    torch.testing.assert_close(output, expected, atol=TOLERANCE[dtype], rtol=0)
    assert_states_close(state, expected_state, TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch=st.integers(1, 3),
    d_state=st.integers(1, 6),
    d_conv=st.integers(1, 5),
    headdim=st.sampled_from([1, 2, 8]),
    chunk_size=st.integers(1, 8),
)
def test_any_split_equals_the_whole(sizes, batch, d_state, d_conv, headdim, chunk_size):
    mixer = make_mixer(d_state=d_state, d_conv=d_conv, headdim=headdim, chunk_size=chunk_size)
    hidden_states = torch.randn(batch, sum(sizes), D_MODEL, dtype=torch.float64)
    expected, expected_state = whole(mixer, hidden_states)
    output, state = in_pieces(mixer, hidden_states, sizes)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    assert_states_close(state, expected_state, 1e-12)


@both_dtypes
@pytest.mark.parametrize("filler", [0.0, 1e4, math.nan, math.inf])
def test_ragged_rows_equal_unpadded_rows_and_so_do_their_states(dtype, filler):
    mixer = make_mixer(dtype)
    lengths = torch.tensor([9, 1, 2, 5])
    rows = [torch.randn(1, length + 6, D_MODEL, dtype=dtype) for length in lengths]
    padded = torch.full((4, 9, D_MODEL), filler, dtype=dtype)
    for row, length, target in zip(rows, lengths, padded, strict=True):
        target[:length] = row[0, :length]
    output, state = mixer(padded, lengths)
    assert output.isfinite().all()
    continued, _ = whole(mixer, torch.cat([row[:, -6:] for row in rows]), state)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        expected, _ = whole(mixer, row)
        torch.testing.assert_close(output[index, :length], expected[0, :length], atol=TOLERANCE[dtype], rtol=0)
        torch.testing.assert_close(continued[index], expected[0, length:], atol=TOLERANCE[dtype], rtol=0)


def test_a_row_without_turns_keeps_its_state_bitwise():
    mixer = make_mixer(torch.float32)
    _, state = whole(mixer, torch.randn(2, 5, D_MODEL))
    _, new_state = mixer(torch.randn(2, 7, D_MODEL), torch.tensor([7, 0]), state)
    for new, old in zip(new_state, state, strict=True):
        assert torch.equal(new[1], old[1])
        assert not torch.equal(new[0], old[0])


def test_later_turns_do_not_change_earlier_outputs():
    mixer = make_mixer(torch.float32)
    hidden_states = torch.randn(1, 13, D_MODEL)
    expected, _ = whole(mixer, hidden_states)
    for turn in range(12):
        changed = hidden_states.clone()
        changed[:, turn + 1 :] = torch.randn(1, 12 - turn, D_MODEL) * 100
        assert torch.equal(whole(mixer, changed)[0][:, : turn + 1], expected[:, : turn + 1])


def test_given_state_is_not_changed():
    mixer = make_mixer(torch.float32)
    _, state = whole(mixer, torch.randn(2, 5, D_MODEL))
    before = [tensor.clone() for tensor in state]
    whole(mixer, torch.randn(2, 5, D_MODEL), state)
    assert all(torch.equal(tensor, old) for tensor, old in zip(state, before, strict=True))


# Precision, gradients, initialisation


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_state_and_residual_stay_float32_in_bfloat16(how):
    torch.manual_seed(0)
    block = Mamba2Block(D_MODEL, D_STATE, D_CONV, EXPAND, HEADDIM)
    hidden_states = torch.randn(2, 9, D_MODEL)
    expected, _ = whole(block, hidden_states)
    if how == "weights":
        block, hidden_states = block.to(torch.bfloat16), hidden_states.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output, state = whole(block, hidden_states)
        streamed, _ = in_pieces(block, hidden_states, 1)
    assert output.dtype == state.conv.dtype == state.ssm.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=5e-2, rtol=0)
    torch.testing.assert_close(streamed, output, atol=1e-2, rtol=0)


def test_scan_is_computed_in_float32_under_autocast(monkeypatch):
    mixer, dtypes = make_mixer(torch.float32), set()

    def recording_scan(*arguments):
        y, state = ssd(*arguments)
        dtypes.update({y.dtype, state.dtype, (y @ y.transpose(-1, -2)).dtype})
        return y, state

    monkeypatch.setattr("modeling_mamba_ema.mamba2.ssd", recording_scan)
    with torch.autocast("cpu", torch.bfloat16):
        whole(mixer, torch.randn(2, 9, D_MODEL))
    assert dtypes == {torch.float32}


def test_gradients_reach_every_parameter_and_the_initial_state():
    mixer = make_mixer()
    state = Mamba2State(*(torch.randn_like(t).requires_grad_() for t in mixer.initial_state(2, "cpu", torch.float64)))
    output, new_state = mixer(torch.randn(2, 7, D_MODEL, dtype=torch.float64), torch.tensor([7, 4]), state)
    (output.square().sum() + new_state.ssm.square().sum()).backward()
    for name, tensor in [*mixer.named_parameters(), *state._asdict().items()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0, name


def test_gradients_stay_finite_with_nan_in_padded_turns():
    mixer = make_mixer()
    hidden_states = torch.randn(2, 6, D_MODEL, dtype=torch.float64)
    hidden_states[1, 3:] = math.nan
    hidden_states.requires_grad_()
    output, _ = mixer(hidden_states, torch.tensor([6, 3]))
    output[0].sum().backward(retain_graph=True)
    output[1, :3].sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in [hidden_states, *mixer.parameters()])


@pytest.mark.parametrize("turns", [1, 5])
def test_gradcheck(turns):
    mixer = make_mixer(d_model=2, headdim=2, d_state=2, chunk_size=2)
    state = mixer.initial_state(2, "cpu", torch.float64)
    inputs = [torch.randn(2, turns, 2, dtype=torch.float64), *map(torch.randn_like, state)]

    def run(hidden_states, conv, ssm):
        output, new_state = mixer(hidden_states, torch.tensor([turns, turns // 2]), Mamba2State(conv, ssm))
        return output[0], output[1, : turns // 2], *new_state

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs])


def test_initialisation_has_the_ranges_of_mamba_ssm():
    mixer = Mamba2(64, 8, 4, 2, 1)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert A.min() >= 1
    assert A.max() <= 16 + 1e-4
    assert A.min() < 3
    assert A.max() > 14
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    assert dt.min() < 2e-3
    assert dt.max() > 0.05
    assert (mixer.D == 1).all()
    assert (mixer.norm.weight == 1).all()
    assert all(getattr(mixer, name)._no_weight_decay for name in ("A_log", "D", "dt_bias"))


def test_reset_fills_every_parameter_built_on_the_meta_device():
    with torch.device("meta"):
        mixer = Mamba2(D_MODEL, D_STATE, D_CONV, EXPAND, HEADDIM)
    assert all(parameter.is_meta for parameter in mixer.parameters())
    mixer.to_empty(device="cpu")
    for parameter in mixer.parameters():
        parameter.data.fill_(math.nan)
    mixer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())


def test_head_size_that_does_not_divide_the_width_is_refused():
    with pytest.raises(ValueError, match="head_dim is 3, but must divide expand \\* hidden_size = 16"):
        Mamba2(8, 4, 4, 2, 3)
