"""What must not change an answer: padding, batch mates, their order, and how a conversation is cut."""

import functools
import itertools

import audmetric
import numpy as np
import pytest
import torch

from modeling_mamba_ema import InvalidAudioError, MambaEMAFeatureExtractor, speech_encoder
from modeling_mamba_ema.conversation_encoder import CONTEXTS
from modeling_mamba_ema.pooling import POOLINGS
from tests.support.audio_cases import RATE, noise
from tests.support.models import tiny_model

PRECISIONS = {torch.float64: 1e-12, torch.float32: 2e-5}
IN_PIECES = {torch.float64: 1e-12, torch.float32: 1e-5}
norms = pytest.mark.parametrize("norm", ["group", "layer"])
poolings = pytest.mark.parametrize("pooling", POOLINGS)
contexts = pytest.mark.parametrize("context", CONTEXTS)
precisions = pytest.mark.parametrize("dtype", PRECISIONS, ids=["float64", "float32"])


@functools.cache
def make_model(norm="layer", pooling="attention", context="mamba_ema", dtype=torch.float32):
    return tiny_model(norm=norm, dtype=dtype, speech_encoder_pooling=pooling, context=context)


def features(speech):
    return MambaEMAFeatureExtractor()(speech, sampling_rate=RATE, return_tensors="pt")


@torch.no_grad()
def predict(model, speech, **options):
    return model(**features(speech), **options)


def assert_same(found, expected, dtype, tolerances=PRECISIONS):
    torch.testing.assert_close(found, expected, atol=tolerances[dtype], rtol=0)


@norms
@poolings
@contexts
@precisions
def test_an_utterance_gets_its_numbers_whatever_its_batch_pads_it_to(norm, pooling, context, dtype):
    model = make_model(norm, pooling, context, dtype)
    utterance = noise(1_600)
    alone = predict(model, utterance).logits[0]
    for samples in (1_632, 3_200, 32_000):  # padded by 2 %, to twice and to twenty times its length
        assert_same(predict(model, [noise(samples, 1), utterance]).logits[1], alone, dtype)


@norms
@poolings
@contexts
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


@norms
@precisions
def test_the_plain_form_of_the_encoder_keeps_the_promise_too(monkeypatch, norm, dtype):
    monkeypatch.setattr(speech_encoder, "is_untouched", lambda backbone: False)  # as under hooks and offloading
    model = make_model(norm, dtype=dtype)
    utterance = noise(1_600)
    alone = predict(model, utterance).logits[0]
    for samples in (1_632, 3_200, 32_000):
        assert_same(predict(model, [noise(samples, 1), utterance]).logits[1], alone, dtype)


@norms
@precisions
def test_the_order_of_a_batch_only_reorders_its_answers(norm, dtype):
    model = make_model(norm, dtype=dtype)
    batch = [noise(length, length) for length in (400, 5_000, 1_600, 2_345)]
    logits = predict(model, batch).logits
    for order in itertools.permutations(range(4)):
        assert_same(predict(model, [batch[index] for index in order]).logits, logits[list(order)], dtype)


@norms
def test_what_a_batch_mate_says_changes_no_bit(norm):
    model = make_model(norm)
    utterance = noise(1_600)
    answers = [predict(model, [utterance, noise(5_000, seed)]).logits[0] for seed in range(3)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_a_bad_batch_mate_is_refused_and_the_others_answered_without_it_as_with_a_good_one():
    model = make_model()
    utterance, mate = noise(1_600), noise(5_000, 1)
    before = predict(model, [utterance, mate]).logits[0]
    with pytest.raises(InvalidAudioError, match="^utterance 1 "):
        predict(model, [utterance, np.full(5_000, np.nan)])
    assert torch.equal(predict(model, [utterance, mate]).logits[0], before)
    assert_same(predict(model, [utterance]).logits[0], before, torch.float32)


@contexts
@precisions
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16])
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


@contexts
def test_a_turn_that_is_left_out_in_the_middle_equals_the_shortened_conversation(context):
    model = make_model(context=context, dtype=torch.float64)
    turns = [noise(1_000 + 200 * turn, turn) for turn in range(5)]
    inputs = features([turns])
    inputs["turn_mask"][0, 2] = 0
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    assert_same(logits[[0, 1, 3, 4]], predict(model, [turns[:2] + turns[3:]]).logits[0], torch.float64)


@contexts
def test_later_turns_change_no_bit_of_earlier_answers(context):
    model = make_model(context=context)
    turns = [noise(1_000, turn) for turn in range(6)]
    expected = predict(model, [turns]).logits[0]
    for turn in range(1, 6):
        changed = turns[:turn] + [noise(1_000, 100 + later) for later in range(turn, 6)]
        assert torch.equal(predict(model, [changed]).logits[0, :turn], expected[:turn])


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
