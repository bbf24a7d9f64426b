"""What must not change an answer of the model: padding, batch mates, their order, and how a conversation is cut."""

import functools
import itertools

import audmetric
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_mamba_ema import ConversationState, InvalidAudioError, speech_encoder
from modeling_mamba_ema.conversation_encoder import CONTEXTS
from modeling_mamba_ema.pooling import POOLINGS
from tests.support.audio_cases import noise
from tests.support.models import features, predict, predict_turn_by_turn, pretrained_model, tiny_model

PRECISIONS = {torch.float64: 1e-12, torch.float32: 2e-5}
IN_PIECES = {torch.float64: 1e-12, torch.float32: 1e-5}
# Both norms with every pooling, and every context: how an utterance is pooled and how turns are followed are separate.
KINDS = [
    *((norm, pooling, "mamba_ema") for norm, pooling in itertools.product(("group", "layer"), POOLINGS)),
    *(("layer", "attention", context) for context in CONTEXTS if context != "mamba_ema"),
    *(("pretrained", pooling, "mamba_ema") for pooling in ("attention", "attentive_statistics")),
]
kinds = pytest.mark.parametrize(("norm", "pooling", "context"), KINDS)
norms = pytest.mark.parametrize("norm", ["group", "layer"])
contexts = pytest.mark.parametrize("context", CONTEXTS)
precisions = pytest.mark.parametrize("dtype", PRECISIONS, ids=["float64", "float32"])


@functools.cache
def make_model(norm="layer", pooling="attention", context="mamba_ema", dtype=torch.float32):
    fields = {"dtype": dtype, "speech_encoder_pooling": pooling, "context": context}
    return pretrained_model(**fields) if norm == "pretrained" else tiny_model(norm=norm, **fields)


def assert_same(found, expected, dtype, tolerances=PRECISIONS):
    torch.testing.assert_close(found, expected, atol=tolerances[dtype], rtol=0)


@pytest.mark.promise(
    "B-02",
    "an utterance gets its numbers whatever its batch pads it to, up to 20 times its length",
    "1e-12 float64, 2e-5 float32",
)
@kinds
@precisions
def test_an_utterance_gets_the_same_numbers_alone_in_a_batch_and_in_any_conversation(norm, pooling, context, dtype):
    model = make_model(norm, pooling, context, dtype)
    utterance, short, long = noise(1_600), noise(400, 1), noise(8_000, 2)
    alone = predict(model, utterance).logits[0]
    assert not torch.allclose(alone, predict(model, short).logits[0], atol=1e-3), "the model must tell turns apart"
    for samples in (1_632, 3_200, 32_000):  # padded by 2 %, to twice and to twenty times its length
        assert_same(predict(model, [noise(samples, 1), utterance]).logits[1], alone, dtype)
    in_conversations = predict(model, [[long, short, short], [utterance], [utterance, long]]).logits
    assert_same(in_conversations[1, 0], alone, dtype)
    assert_same(in_conversations[2, 0], alone, dtype)


@pytest.mark.promise(
    "B-04",
    "a conversation gets its numbers beside longer ones, with noise or NaN in the padding",
    "1e-12 float64, 2e-5 float32",
)
@kinds
@precisions
def test_a_conversation_gets_its_numbers_beside_longer_ones_whatever_stands_in_the_padding(
    norm, pooling, context, dtype
):
    model = make_model(norm, pooling, context, dtype)
    short = [noise(900, 1), noise(400, 2)]
    inputs = features([[noise(2_000, seed) for seed in range(4)], short])
    alone = predict(model, [short]).logits[0]
    padding = inputs["attention_mask"] == 0
    for filler in (0.0, 3.0, torch.nan):
        inputs["input_values"][padding] = filler
        with torch.no_grad():
            logits = model(**inputs).logits
        assert_same(logits[1, :2], alone, dtype)
        assert torch.isnan(logits[1, 2:]).all()


@pytest.mark.promise("B-02")
@norms
@precisions
def test_the_padded_form_of_the_encoder_keeps_the_promise_too(monkeypatch, norm, dtype):
    monkeypatch.setattr(speech_encoder, "values_are_known", lambda tensor: False)  # as while torch compiles
    model = make_model(norm, dtype=dtype)
    utterance = noise(1_600)
    alone = predict(model, utterance).logits[0]
    for samples in (1_632, 3_200, 32_000):
        assert_same(predict(model, [noise(samples, 1), utterance]).logits[1], alone, dtype)


@pytest.mark.promise(
    "B-03",
    "order of a batch, what mates say, and a mate that is refused change nothing",
    "1e-12 float64, 2e-5 float32; content bitwise",
)
@norms
@precisions
def test_the_order_of_a_batch_only_reorders_its_answers(norm, dtype):
    model = make_model(norm, dtype=dtype)
    batch = [noise(length, length) for length in (400, 5_000, 1_600, 2_345)]
    logits = predict(model, batch).logits
    for order in itertools.permutations(range(4)):
        assert_same(predict(model, [batch[index] for index in order]).logits, logits[list(order)], dtype)


@pytest.mark.promise("B-03")
@norms
def test_what_a_batch_mate_says_changes_no_bit(norm):
    model = make_model(norm)
    utterance = noise(1_600)
    answers = [predict(model, [utterance, noise(5_000, seed)]).logits[0] for seed in range(3)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.promise("B-03")
def test_a_bad_batch_mate_is_refused_and_the_others_answered_without_it_as_with_a_good_one():
    model = make_model()
    utterance, mate = noise(1_600), noise(5_000, 1)
    before = predict(model, [utterance, mate]).logits[0]
    with pytest.raises(InvalidAudioError, match="^utterance 1 "):
        predict(model, [utterance, np.full(5_000, np.nan)])
    assert torch.equal(predict(model, [utterance, mate]).logits[0], before)
    assert_same(predict(model, [utterance]).logits[0], before, torch.float32)


@pytest.mark.promise("B-07", "pieces of any size equal the whole conversation", "1e-12 float64, 1e-5 float32")
@contexts
@precisions
@pytest.mark.parametrize("size", [1, 5, 16])
def test_a_conversation_in_pieces_equals_the_whole_and_continues_from_padded_rows(context, dtype, size):
    model = make_model(context=context, dtype=dtype)
    conversations = [[noise(400 + 100 * turn, turn) for turn in range(17)], [noise(700, 99), noise(500, 98)]]
    expected = [predict(model, [turns]).logits[0] for turns in conversations]
    state, pieces = None, []
    for start in range(0, 17, size):
        # The second conversation is over after its first piece: from then on only the first one goes on.
        here = [turns[start : start + size] for turns in conversations if turns[start : start + size]]
        if state is not None:
            state = state.select(list(range(len(here))))
        outputs = predict(model, here, conversation_state=state, use_conversation_state=True)
        state = outputs.conversation_state
        pieces.append(outputs.logits)
    assert_same(torch.cat([piece[0] for piece in pieces]), expected[0], dtype, IN_PIECES)
    second = torch.cat([piece[1] for piece in pieces if len(piece) > 1])
    assert_same(second[~torch.isnan(second[:, 0])], expected[1], dtype, IN_PIECES)


@pytest.mark.promise(
    "B-10", "a turn left out in the middle equals the shortened conversation", "1e-12; bitwise after the encoder"
)
@contexts
def test_a_turn_that_is_left_out_in_the_middle_equals_the_shortened_conversation(context):
    model = make_model(context=context, dtype=torch.float64)
    turns = [noise(1_000 + 200 * turn, turn) for turn in range(5)]
    inputs = features([turns])
    inputs["turn_mask"][0, 2] = 0
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    assert_same(logits[[0, 1, 3, 4]], predict(model, [turns[:2] + turns[3:]]).logits[0], torch.float64)


@pytest.mark.promise("B-05", "a later turn changes no bit of an earlier answer", "bitwise")
@contexts
def test_later_turns_change_no_bit_of_earlier_answers(context):
    model = make_model(context=context)
    turns = [noise(1_000, turn) for turn in range(6)]
    expected = predict(model, [turns]).logits[0]
    for turn in range(1, 6):
        changed = turns[:turn] + [noise(1_000, 100 + later) for later in range(turn, 6)]
        assert torch.equal(predict(model, [changed]).logits[0, :turn], expected[:turn])


@pytest.mark.promise(
    "B-12",
    "number of threads and batch mates change an answer by rounding only; 8 threads may share a model",
    "2e-5; bitwise",
)
def test_the_number_of_threads_and_of_batch_mates_changes_an_answer_by_rounding_only():
    model = make_model()
    batch = [noise(8_000, seed) for seed in range(8)]
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            answers.append(predict(model, batch).logits)
            answers.append(torch.cat([predict(model, utterance).logits for utterance in batch]))
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert_same(answer, answers[0], torch.float32)


@pytest.mark.promise("B-13", "autocast moves answers little, and the CCC less", "5e-2 bf16, 1e-2 fp16; CCC 0.01")
@norms
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=["bf16", "fp16"])
def test_autocast_moves_answers_little_and_the_ccc_less(norm, dtype, tolerance, record_property):
    model = make_model(norm)
    speech = [[noise(1_000 + 300 * turn, 10 * row + turn) for turn in range(6)] for row in range(40)]
    full = predict(model, speech).logits
    with torch.autocast("cpu", dtype):
        half = predict(model, speech).logits
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=tolerance, rtol=0)
    # Labels with which the predictions agree to a CCC of about 0.8.
    spread = full.std(dim=(0, 1))
    truth = full + 0.6 * spread * torch.randn(full.shape, generator=torch.Generator().manual_seed(0))
    ccc = [
        [
            audmetric.concordance_cc(truth[..., label].flatten().numpy(), answer[..., label].flatten().numpy())
            for label in (0, 1)
        ]
        for answer in (full, half)
    ]
    change = float(np.abs(np.subtract(*ccc)).max())
    record_property("figure", f"CCC moves by {change:.1e}")
    assert change < 0.01


@pytest.mark.promise(
    "B-20", "gain, leading silence and offset: how far they move an answer of a random tiny model", "reported only"
)
def test_how_far_gain_silence_and_offset_move_an_answer_is_reported(record_property):
    model = make_model()
    waveform = noise(16_000)
    before = predict(model, waveform).logits[0]
    changes = {
        "+6 dB": 2 * waveform,
        "-6 dB": waveform / 2,
        "0.5 s of silence first": np.r_[np.zeros(8_000, np.float32), waveform],
        "offset 0.01": waveform + np.float32(0.01),
    }
    moved = {name: float((predict(model, audio).logits[0] - before).abs().max()) for name, audio in changes.items()}
    record_property("figure", ", ".join(f"{name}: {change:.1e}" for name, change in moved.items()))
    assert all(np.isfinite(change) for change in moved.values())


lengths = st.integers(400, 4_000)


@pytest.mark.promise("B-02")
@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(lengths, min_size=2, max_size=6, unique=True),
    order=st.randoms(use_true_random=False),
    norm=st.sampled_from(["group", "layer"]),
    pooling=st.sampled_from(list(POOLINGS)),
    dtype=st.sampled_from(list(PRECISIONS)),
)
def test_any_lengths_in_any_order_get_the_numbers_they_get_alone(batch, order, norm, pooling, dtype):
    model = make_model(norm, pooling, "mamba_ema", dtype)
    shuffled = order.sample(batch, len(batch))
    logits = predict(model, [noise(length, length) for length in shuffled]).logits
    alone = torch.cat([predict(model, noise(length, length)).logits for length in shuffled])
    assert_same(logits, alone, dtype)


@st.composite
def cut_conversations(draw):
    """Lengths of the turns of each conversation, and where all of them are cut."""
    conversations = draw(st.lists(st.lists(lengths, min_size=1, max_size=7), min_size=1, max_size=4))
    cuts = draw(st.sets(st.integers(1, 6)))
    return conversations, [0, *sorted(cuts), 7]


@pytest.mark.promise("B-07")
@settings(max_examples=40, deadline=None)
@given(cut=cut_conversations(), context=st.sampled_from(list(CONTEXTS)), dtype=st.sampled_from(list(PRECISIONS)))
def test_any_conversations_cut_anywhere_get_the_numbers_of_the_whole(cut, context, dtype):
    model = make_model("layer", "attention", context, dtype)
    conversations = [[noise(length, length) for length in turns] for turns in cut[0]]
    whole = predict(model, conversations).logits
    state, live, found = None, list(range(len(conversations))), [[] for _ in conversations]
    for start, end in zip(cut[1], cut[1][1:]):
        going_on = [position for position, row in enumerate(live) if len(conversations[row]) > start]
        live = [live[position] for position in going_on]
        if not live:
            break
        state = None if state is None else state.select(going_on)
        pieces = [conversations[row][start:end] for row in live]
        outputs = predict(model, pieces, conversation_state=state, use_conversation_state=True)
        state = outputs.conversation_state
        for position, row in enumerate(live):
            found[row].append(outputs.logits[position, : len(pieces[position])])
    for row, turns in enumerate(conversations):
        assert_same(torch.cat(found[row]), whole[row, : len(turns)], dtype, IN_PIECES)


@pytest.mark.promise("B-06", "turn by turn equals the whole conversation", "1e-12 float64, 1e-5 float32")
@kinds
@precisions
def test_streaming_turn_by_turn_equals_the_whole_conversation(norm, pooling, context, dtype):
    model = make_model(norm, pooling, context, dtype)
    turns = [noise(3_000, 0), noise(400, 1), noise(9_000, 2), noise(2_000, 3), noise(4_000, 4)]
    whole = predict(model, [turns]).logits[0]
    assert_same(predict_turn_by_turn(model, turns), whole, dtype, IN_PIECES)


@pytest.mark.promise(
    "B-08", "a state from a padded row continues as if its conversation had been alone", "1e-12 float64, 1e-5 float32"
)
@precisions
def test_the_state_of_a_ragged_batch_continues_each_conversation_as_if_it_had_been_alone(dtype):
    model = make_model(dtype=dtype)
    a, b, c, d = [noise(2_000, 0), noise(3_000, 1), noise(2_500, 2), noise(800, 3)]
    batch = predict(model, [[a, b, c], [d]], use_conversation_state=True)
    assert batch.conversation_state.num_turns.tolist() == [3, 1]
    after = predict(model, [b, b], conversation_state=batch.conversation_state).logits
    alone = predict(model, [[d, b]]).logits[0, 1]
    assert_same(after[1], alone, dtype, IN_PIECES)


def test_context_none_reads_each_turn_by_itself_and_the_others_remember():
    a, b = [noise(2_000, 0), noise(3_000, 1)]
    for context in CONTEXTS:
        model = make_model(context=context)
        gap = (predict(model, [[a, b]]).logits[0, 1] - predict(model, b).logits[0]).abs().max()
        assert (gap < 1e-6) == (context == "none"), context


@pytest.mark.promise("B-09", "states are values: interleaved, reused, copied, saved and restored", "bitwise")
def test_a_state_is_a_value_that_no_call_changes():
    model = make_model()
    a, b = [noise(2_000, 0), noise(3_000, 1)]
    state = predict(model, a, use_conversation_state=True).conversation_state
    kept = state.copy()
    first = predict(model, b, conversation_state=state, use_conversation_state=True).logits
    second = predict(model, b, conversation_state=state, use_conversation_state=True).logits
    assert torch.equal(first, second)
    for name, tensor in state.state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name]), name
    restored = ConversationState.from_state_dict(state.state_dict())
    assert torch.equal(predict(model, b, conversation_state=restored).logits, first)
