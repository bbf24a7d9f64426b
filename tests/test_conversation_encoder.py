"""Conversation encoder: streaming equals offline, holes are skipped, state is a value, the EMA is exact."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from modeling_mamba_ema.conversation_encoder import (
    CONTEXTS,
    ConversationEncoder,
    ConversationState,
    ExponentialMovingAverage,
    ema_reference,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
HIDDEN = 8

both_dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))
KINDS = [context for context in CONTEXTS if context != "none"]
every_context = pytest.mark.parametrize("context", KINDS)


def make_encoder(context="mamba_ema", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    numbers = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "state_size": 4,
        "conv_kernel": 4,
        "expand": 2,
        "head_dim": 4,
        "ema_decay": 0.8,
        "ema_decay_learnable": False,
        "dropout": 0.0,
    }
    return ConversationEncoder(context=context, **(numbers | changes)).to(dtype).eval()


def make_observations(batch, turns, dtype=torch.float64, seed=1):
    return torch.randn(batch, turns, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def whole(encoder, observations, state=None):
    return encoder(observations, torch.ones(observations.shape[:2], dtype=torch.bool), state)


def in_pieces(encoder, observations, sizes, state=None):
    contexts = []
    for piece in observations.split(sizes, dim=1):
        context, state = whole(encoder, piece, state)
        contexts.append(context)
    return torch.cat(contexts, dim=1), state


def assert_close(found, expected, dtype=torch.float64):
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)


def assert_states_close(state, other, dtype=torch.float64):
    found, expected = state.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name in found:
        assert_close(found[name], expected[name], dtype)


def assert_states_equal(state, other):
    found, expected = state.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


# Streaming equals offline


@every_context
@both_dtypes
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16])
def test_pieces_of_one_size_equal_the_whole(context, dtype, size):
    encoder, observations = make_encoder(context, dtype, ema_decay_learnable=True), make_observations(2, 37, dtype)
    expected, expected_state = whole(encoder, observations)
    found, state = in_pieces(encoder, observations, size)
    assert_close(found, expected, dtype)
    assert_states_close(state, expected_state, dtype)
    assert state.num_turns.tolist() == [37, 37]


@pytest.mark.promise("B-07")
@every_context
@both_dtypes
def test_split_at_every_turn_equals_the_whole(context, dtype):
    encoder, observations = make_encoder(context, dtype), make_observations(1, 12, dtype)
    expected, _ = whole(encoder, observations)
    for turn in range(1, 12):
        assert_close(in_pieces(encoder, observations, [turn, 12 - turn])[0], expected, dtype)


@settings(max_examples=40, deadline=None)
@given(
    mask=st.lists(st.lists(st.booleans(), min_size=14, max_size=14), min_size=1, max_size=4),
    sizes=st.sampled_from([[14], [1, 13], [5, 5, 4], [13, 1], [2] * 7]),
    context=st.sampled_from(KINDS),
)
def test_any_mask_in_any_pieces_equals_each_conversation_alone_and_shortened(mask, sizes, context):
    encoder, turn_mask = make_encoder(context), torch.tensor(mask)
    observations = make_observations(len(mask), 14)
    noisy = torch.where(turn_mask[..., None], observations, math.nan)
    state, contexts = None, []
    for piece, piece_mask in zip(noisy.split(sizes, 1), turn_mask.split(sizes, 1), strict=True):
        piece_context, state = encoder(piece, piece_mask, state)
        contexts.append(piece_context)
    found = torch.cat(contexts, 1)
    assert (found[~turn_mask] == 0).all()
    for row in range(len(mask)):
        assert state.num_turns[row] == turn_mask[row].sum()
        if turn_mask[row].any():
            expected, expected_state = whole(encoder, observations[row, turn_mask[row]][None])
            assert_close(found[row, turn_mask[row]], expected[0])
            assert_states_close(state.select(row), expected_state)


@pytest.mark.promise("B-10")
@every_context
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_hole_gives_the_same_bits_as_the_shortened_conversation(context, dtype):
    encoder, observations = make_encoder(context, dtype), make_observations(1, 12, dtype)
    for hole in range(12):
        mask = torch.arange(12)[None] != hole
        found, state = encoder(observations, mask)
        expected, expected_state = whole(encoder, observations[mask][None])
        assert torch.equal(found[mask][None], expected)
        assert_states_equal(state, expected_state)


@pytest.mark.promise("B-05")
@every_context
def test_later_turns_do_not_change_earlier_contexts(context):
    encoder, observations = make_encoder(context, torch.float32), make_observations(1, 40, torch.float32)
    expected, _ = whole(encoder, observations)
    for turn in range(39):
        changed = observations.clone()
        changed[:, turn + 1 :] = 100 * torch.randn(1, 39 - turn, HIDDEN)
        assert torch.equal(whole(encoder, changed)[0][:, : turn + 1], expected[:, : turn + 1])


@every_context
def test_a_conversation_without_turns_keeps_its_state_bitwise(context):
    encoder = make_encoder(context, torch.float32)
    _, state = whole(encoder, make_observations(2, 5, torch.float32))
    mask = torch.tensor([[False] * 6, [True] * 6])
    found, new_state = encoder(make_observations(2, 6, torch.float32, seed=2), mask, state)
    assert_states_equal(new_state.select(0), state.select(0))
    assert (found[0] == 0).all()


@every_context
def test_a_conversation_may_begin_after_its_batch_mates(context):
    encoder, observations = make_encoder(context), make_observations(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    _, state = encoder(observations[:, :4], mask[:, :4])
    found, _ = encoder(observations[:, 4:], mask[:, 4:], state)
    assert_close(found[1:], whole(encoder, observations[1:, 4:])[0])


# The state is a value


@every_context
def test_given_state_is_neither_changed_nor_kept(context):
    encoder, observations = make_encoder(context, torch.float32), make_observations(2, 5, torch.float32)
    _, state = whole(encoder, observations)
    before = state.copy()
    first, _ = whole(encoder, observations, state)
    second, _ = whole(encoder, observations, state)
    assert torch.equal(first, second)
    assert_states_equal(state, before)
    fresh, _ = whole(encoder, observations)
    assert not torch.equal(fresh, first)
    assert_states_equal(whole(encoder, observations)[1], state)


@pytest.mark.promise("B-09")
def test_interleaved_streams_equal_their_own_runs_bitwise():
    encoder = make_encoder(dtype=torch.float32)
    streams = [make_observations(1, 9, torch.float32, seed=seed) for seed in (3, 4)]
    alone = [in_pieces(encoder, stream, 1)[0] for stream in streams]
    states, contexts = [None, None], [[], []]
    for turn in range(9):
        for index, stream in enumerate(streams):
            context, states[index] = whole(encoder, stream[:, turn : turn + 1], states[index])
            contexts[index].append(context)
    for found, expected in zip(contexts, alone, strict=True):
        assert torch.equal(torch.cat(found, 1), expected)


@pytest.mark.promise("B-09")
@every_context
def test_copy_shares_no_memory(context):
    _, state = whole(make_encoder(context), make_observations(2, 5))
    duplicate = state.copy()
    assert_states_equal(duplicate, state)
    with torch.no_grad():
        for tensor in duplicate.state_dict().values():
            tensor.add_(1)
    for name, tensor in state.state_dict().items():
        assert (tensor != duplicate.state_dict()[name]).all(), name


@pytest.mark.promise("B-09")
@every_context
@both_dtypes
def test_saved_and_loaded_state_continues_bitwise(context, dtype, tmp_path):
    encoder, observations = make_encoder(context, dtype), make_observations(2, 9, dtype)
    _, state = whole(encoder, observations[:, :5])
    save_file(state.detach().state_dict(), tmp_path / "state.safetensors")
    loaded = ConversationState.from_state_dict(load_file(tmp_path / "state.safetensors"))
    assert_states_equal(loaded, state)
    assert torch.equal(whole(encoder, observations[:, 5:], loaded)[0], whole(encoder, observations[:, 5:], state)[0])


@every_context
def test_streams_are_joined_and_separated(context):
    encoder = make_encoder(context)
    first, second = make_observations(2, 8, seed=5), make_observations(1, 8, seed=6)
    _, first_state = whole(encoder, first[:, :3])
    _, second_state = whole(encoder, second[:, :4])
    joined = ConversationState.stack([first_state, second_state])
    assert joined.num_turns.tolist() == [3, 3, 4]
    found, new_state = whole(encoder, torch.cat([first[:, 3:7], second[:, 4:]]), joined)
    assert_close(found[:2], whole(encoder, first[:, :7])[0][:, 3:])
    assert_close(found[2:], whole(encoder, second)[0][:, 4:])
    assert_states_equal(new_state.select([2, 0]).select(1), new_state.select(torch.tensor([0])))


def test_state_is_detached_and_moved():
    encoder, observations = make_encoder(ema_decay_learnable=True), make_observations(2, 5)
    _, state = whole(encoder, observations)
    assert state.ema.requires_grad
    assert not state.detach().ema.requires_grad
    assert all(tensor.is_meta for tensor in state.to(device="meta").state_dict().values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda state: state.select([0]), "holds 1 conversations, the batch 2"),
        (lambda _: whole(make_encoder("ema"), make_observations(2, 3))[1], r"mamba.0.conv is absent"),
        (lambda _: whole(make_encoder("mamba"), make_observations(2, 3))[1], r"ema is absent"),
        (
            lambda state: whole(make_encoder(num_hidden_layers=3), make_observations(2, 3))[1],
            "no such tensor",
        ),
        (lambda _: whole(make_encoder(state_size=5), make_observations(2, 3))[1], r"needs \(2, 3, 24\)"),
        (lambda state: state.to(device="meta"), "is on meta"),
    ],
)
def test_state_that_does_not_fit_is_refused(wrong, message):
    encoder, observations = make_encoder(), make_observations(2, 3)
    _, state = whole(encoder, observations)
    with pytest.raises(ValueError, match=message):
        whole(encoder, observations, wrong(state))


def test_states_of_different_models_are_not_stacked():
    states = [whole(make_encoder(context), make_observations(1, 2))[1] for context in ("ema", "mamba_ema")]
    with pytest.raises(ValueError, match="state 1 is of another model"):
        ConversationState.stack(states)
    with pytest.raises(ValueError, match="empty list"):
        ConversationState.stack([])
    with pytest.raises(ValueError, match="state 1 is None, no ConversationState"):
        ConversationState.stack([states[0], None])


@pytest.mark.parametrize(
    "index", [np.int64(1), np.array([1]), torch.tensor(1), torch.tensor([1], dtype=torch.uint8), -1]
)
def test_rows_are_chosen_by_numbers_of_any_kind(index):
    _, state = whole(make_encoder(), make_observations(2, 3))
    assert_states_equal(state.select(index), state.select([1]))


def test_an_empty_choice_is_an_empty_batch():
    _, state = whole(make_encoder(), make_observations(2, 3))
    assert state.select([]).batch_size == 0


@pytest.mark.parametrize("index", [2, -3, [0, 2], 0.5, np.array([True, False])])
def test_rows_that_are_not_there_are_refused(index):
    _, state = whole(make_encoder(), make_observations(2, 3))
    with pytest.raises(IndexError, match="rows to select are .*; allowed are whole numbers below 2"):
        state.select(index)


@pytest.mark.parametrize("change", ["drop", "add"])
def test_tensors_that_are_no_state_are_refused(change):
    tensors = whole(make_encoder(), make_observations(1, 2))[1].state_dict()
    if change == "drop":
        del tensors["mamba.1.conv"]
    else:
        tensors["weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"mamba.1.conv|weight"):
        ConversationState.from_state_dict(tensors)


# Exponential moving average


def run_ema(ema, values, lengths=None, state=None, num_turns=None):
    batch, turns, hidden = values.shape
    lengths = torch.full((batch,), turns) if lengths is None else lengths
    state = torch.zeros(batch, hidden) if state is None else state
    num_turns = torch.zeros(batch, dtype=torch.int64) if num_turns is None else num_turns
    return ema(values, lengths, state, num_turns)


@pytest.mark.promise("B-11")
@both_dtypes
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("decay", [1e-6, 0.3, 0.8, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("turns", [1, 2, 5, 7, 40])
def test_ema_equals_the_recurrence(dtype, learnable, decay, turns):
    ema = ExponentialMovingAverage(HIDDEN, decay, learnable, chunk_size=5).to(dtype)
    ema.reset_parameters()  # the start value in full precision
    values = make_observations(2, turns, dtype)
    averages, state = run_ema(ema, values)
    assert_close(averages, ema_reference(values, decay, None), dtype)
    assert torch.equal(state, averages[:, -1])


@pytest.mark.parametrize("learnable", [False, True])
def test_ema_with_given_state_equals_the_recurrence(learnable):
    ema = ExponentialMovingAverage(HIDDEN, 0.7, learnable, chunk_size=4).double()
    if learnable:
        ema.decay_logit.data.uniform_(-3, 3)
    decay = torch.sigmoid(ema.decay_logit) if learnable else 0.7
    values, state = make_observations(2, 11), torch.randn(2, HIDDEN, dtype=torch.float64)
    averages, _ = run_ema(ema, values, state=state, num_turns=torch.tensor([1, 9]))
    assert_close(averages, ema_reference(values, decay, state))


@pytest.mark.promise(
    "B-11",
    "the EMA has its closed form, starts at the first value, keeps float32, and does not drift in 1e5 turns",
    "1e-12 float64, 1e-5 float32; 1e-4 in bfloat16 and 1e-7 from an end of its range",
)
def test_ema_has_its_closed_form():
    values, decay = make_observations(1, 6), 0.8
    averages, _ = run_ema(ExponentialMovingAverage(HIDDEN, decay, False), values)
    weights = [decay**5] + [(1 - decay) * decay ** (5 - turn) for turn in range(1, 6)]
    assert_close(averages[0, 5], sum(weight * values[0, turn] for turn, weight in enumerate(weights)))


@pytest.mark.parametrize("filler", [0.0, 1e4, math.nan])
def test_ema_of_ragged_rows_equals_that_of_unpadded_rows(filler):
    ema = ExponentialMovingAverage(HIDDEN, 0.8, False, chunk_size=4)
    lengths, state, num_turns = torch.tensor([7, 3, 0]), make_observations(3, 1)[:, 0], torch.tensor([2, 0, 5])
    values = make_observations(3, 7, seed=2)
    values[torch.arange(7) >= lengths[:, None]] = filler
    averages, new_state = run_ema(ema, values, lengths, state, num_turns)
    assert averages.isfinite().all()
    assert_close(averages[0], ema_reference(values[:1], 0.8, state[:1])[0])
    assert_close(averages[1, :3], ema_reference(values[1:2, :3], 0.8, None)[0])
    assert torch.equal(new_state, torch.stack([averages[0, -1], averages[1, 2], state[2]]))


@pytest.mark.promise("B-11")
@pytest.mark.parametrize(("decay", "expected"), [(1e-7, "current"), (1 - 1e-7, "first")])
def test_ema_at_the_ends_of_its_range(decay, expected):
    values = make_observations(1, 50, torch.float32)
    averages, _ = run_ema(ExponentialMovingAverage(HIDDEN, decay, False), values)
    limit = values if expected == "current" else values[:, :1].expand_as(values)
    torch.testing.assert_close(averages, limit, atol=1e-4, rtol=0)


@pytest.mark.promise("B-11")
@pytest.mark.parametrize("decay", [1e-3, 0.8, 0.99, 0.9999])
@pytest.mark.parametrize("learnable", [False, True])
def test_ema_of_1e5_turns_does_not_drift(decay, learnable):
    ema = ExponentialMovingAverage(2, decay, learnable)
    values = torch.randn(1, 100_000, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        averages, _ = run_ema(ema, values)
        exact, _ = run_ema(copy.deepcopy(ema).double(), values.double())
    assert averages.isfinite().all()
    assert (averages - exact).abs().max() < 1e-5


@pytest.mark.promise("B-11")
@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("decay", [0.99, 0.999])
@pytest.mark.parametrize("size", [1, 500])
def test_ema_in_bfloat16_keeps_a_float32_state_and_does_not_stall(how, decay, size):
    ema = ExponentialMovingAverage(HIDDEN, decay, False)
    values = torch.ones(1, 5000 + 1, HIDDEN, dtype=torch.bfloat16)
    values[:, 0] = 0
    if how == "weights":
        ema = ema.to(torch.bfloat16)
    state, num_turns = torch.zeros(1, HIDDEN), torch.zeros(1, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.no_grad():
        for piece in values.split(size, dim=1):
            averages, state = run_ema(ema, piece, state=state, num_turns=num_turns)
            num_turns = num_turns + piece.shape[1]
    assert averages.dtype == state.dtype == torch.float32
    torch.testing.assert_close(state, torch.full_like(state, 1 - decay**5000), atol=1e-4, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, math.nan])
def test_ema_refuses_a_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match="ema_decay must lie between 0 and 1"):
        ExponentialMovingAverage(HIDDEN, decay, False)


# Precision, gradients, construction


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_keeps_a_float32_state(how):
    encoder, observations = make_encoder(dtype=torch.float32), make_observations(2, 9, torch.float32)
    expected, _ = whole(encoder, observations)
    if how == "weights":
        encoder, observations = encoder.to(torch.bfloat16), observations.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        context, state = whole(encoder, observations)
    assert context.dtype == observations.dtype
    assert {tensor.dtype for tensor in state.state_dict().values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(context.float(), expected, atol=5e-2, rtol=0)


@every_context
@pytest.mark.parametrize("with_nan", [False, True])
def test_gradients_reach_every_parameter_and_the_initial_state(context, with_nan):
    encoder = make_encoder(context, ema_decay_learnable=True)
    _, state = whole(encoder, make_observations(2, 3))
    tensors = {name: t.detach().clone() for name, t in state.state_dict().items()}
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    observations, mask = make_observations(2, 7), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 2], mask[1, 5:] = False, False
    if with_nan:
        observations[~mask] = math.nan
    found, _ = encoder(observations, mask, ConversationState.from_state_dict(tensors))
    found.square().sum().backward()
    for name, tensor in [*encoder.named_parameters(), *leaves.items()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0, name


@every_context
def test_gradcheck(context):
    encoder = make_encoder(context, hidden_size=2, num_hidden_layers=1, head_dim=2, ema_decay_learnable=True)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    parameters = dict(encoder.named_parameters())

    def run(observations, *values):
        context, state = torch.func.functional_call(
            encoder, dict(zip(parameters, values, strict=True)), (observations, mask)
        )
        return context, *(tensor for name, tensor in state.state_dict().items() if name != "num_turns")

    observations = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (observations, *parameters.values()))


def test_construction_on_the_meta_device_needs_no_data():
    with torch.device("meta"):
        encoder = ConversationEncoder(HIDDEN, "mamba_ema", 2, 4, 4, 2, 4, 0.8, True, 0.1)
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert not list(encoder.buffers())


@pytest.mark.parametrize(
    ("context", "parts"),
    [("ema", {"ema"}), ("mamba", {"layers", "norm"}), ("mamba_ema", {"layers", "norm", "ema"})],
)
def test_context_chooses_the_parts(context, parts):
    encoder = make_encoder(context, ema_decay_learnable=True)
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == parts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": "none"}, "no context 'none'; allowed are 'ema', 'mamba', 'mamba_ema'"),
        ({"num_hidden_layers": 0}, "at least 1"),
    ],
)
def test_impossible_encoders_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_encoder(**changes)


class NoCopies(TorchFunctionMode):
    """Refuses tensors made of numbers of the host: "meta" takes them, a GPU would have to be waited for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy), function
        return function(*args, **(kwargs or {}))


@every_context
def test_a_step_of_a_stream_reads_no_tensor_s_values(context):
    """It would wait for a GPU, and could be no CUDA graph; tensors on "meta" have no values to read.

    Nor does it copy numbers to the device.
    """
    encoder = make_encoder(context).to("meta")
    turn, mask = torch.empty(2, 1, HIDDEN, dtype=torch.float64, device="meta"), torch.empty(2, 1, device="meta").bool()
    _, state = encoder(turn, mask)
    with NoCopies():
        context, state = encoder(turn, mask, state)
    assert all(tensor.is_meta for tensor in (context, *state.state_dict().values()))
