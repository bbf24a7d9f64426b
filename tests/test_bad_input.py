"""Whatever is given as audio ends in a right answer or in one sentence that says what is wrong with which utterance."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from modeling_mamba_ema import InvalidAudioError, MambaEMAFeatureExtractor
from tests.support.audio_cases import ANSWERED, GOOD, QUIET, RATE, REFUSED, SPEECH, broken, noise
from tests.support.models import tiny_model

EXTRACTOR = MambaEMAFeatureExtractor()
POSITIONS = ["alone", "third in a batch", "third in a conversation"]


def placed(audio, position):
    """The input with the audio at its position, and the name that an error must give it."""
    if position == "alone":
        return audio, "utterance 0"
    if position == "third in a batch":
        return [GOOD, GOOD, audio], "utterance 2"
    return [[GOOD], [GOOD, GOOD, audio]], "utterance 2 of conversation 1"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def predict(model, audio):
    with torch.no_grad():
        outputs = model(**EXTRACTOR(audio, sampling_rate=RATE, return_tensors="pt"))
    return outputs.logits.reshape(-1, 2)[-1]  # of the last utterance


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("case", ANSWERED, ids=lambda case: case.name)
def test_audio_in_any_form_gets_the_numbers_of_its_samples(model, case, position):
    found = predict(model, placed(case.audio, position)[0])
    assert torch.isfinite(found).all()
    # Gain and offset are taken off in float32, and 1e-7 is added to the variance.
    loose = case.name in ("another gain", "with an offset", "clipped, peak 1.5", "noise at -100 dBFS with an offset")
    expected = predict(model, placed(np.asarray(case.reference, dtype=np.float32), position)[0])
    torch.testing.assert_close(found, expected, atol=2e-3 if loose else 2e-5, rtol=0)


@pytest.mark.parametrize(
    ("audio", "low"),
    [
        (np.zeros(2_000, np.float32), True),
        (np.full(2_000, 0.5, np.float32), True),
        (QUIET, True),
        (QUIET + np.float32(0.25), True),
        (noise(2_000, scale=1e-3), False),
        (SPEECH, False),
    ],
    ids=["silence", "offset", "-100 dBFS", "-100 dBFS with an offset", "-60 dBFS", "speech"],
)
def test_what_is_no_sound_is_flagged_and_not_amplified(audio, low):
    features = EXTRACTOR([SPEECH, audio], sampling_rate=RATE, return_low_level=True)
    assert features["low_level"].tolist() == [False, low]
    assert (np.abs(features["input_values"][1]).max() < 1e-3) == low


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_audio_that_cannot_be_answered_for_is_one_sentence_with_its_place_and_what_is_allowed(case, position):
    audio, place = placed(case.audio, position)
    with pytest.raises(case.error) as caught:
        EXTRACTOR(audio, sampling_rate=RATE)
    message = str(caught.value)
    assert type(caught.value) is case.error
    assert case.says in message
    assert message.startswith(place + " ") or (position == "alone" and message.startswith("raw_speech is"))
    assert "allowed" in message or "needed" in message or "is within" in message
    assert len(message) < 300
    assert message.count(",") < 8, "the samples are no part of the message"


def test_there_are_more_than_a_hundred_kinds_of_input():
    assert len(ANSWERED) + len(REFUSED) > 100
    assert len({case.name for case in [*ANSWERED, *REFUSED]}) == len(ANSWERED) + len(REFUSED)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ([], "the batch is empty"),
        ([[]], "conversation 0 has no turns"),
        ([[], []], "conversation 0 has no turns"),
        ([[GOOD], []], "conversation 1 has no turns"),
        ([GOOD, []], "utterance 1 has 0 samples"),
        ([[GOOD, []]], "utterance 1 of conversation 0 has 0 samples"),
        ([GOOD, [GOOD]], "item 0 of the batch is an utterance, item 1 a conversation"),
        ([[[GOOD]]], "utterance 0 of conversation 0 holds waveforms"),
        (np.zeros((2, 3, 1_000), np.float32), "has shape (2, 3, 1000)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_that_is_none_is_refused(batch, says):
    with pytest.raises(InvalidAudioError) as caught:
        EXTRACTOR(batch, sampling_rate=RATE)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "rate",
    [None, "16000", 16_000.0, math.nan, 0, -1, True, 1, 400_000, 10**400, SPEECH, SPEECH.tolist(), [RATE], 8_000],
    ids=lambda rate: repr(rate)[:12],
)
def test_the_sampling_rate_is_needed_and_checked_and_its_value_never_dumped(rate):
    with pytest.raises(ValueError, match="^sampling_rate is ") as caught:
        EXTRACTOR(SPEECH, sampling_rate=rate)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"truncation": True, "max_length": 399}, "max_length is 399; allowed are whole numbers of samples from 400"),
        ({"truncation": True, "max_length": -5}, "max_length is -5; allowed"),
        ({"truncation": True, "max_length": 1e3}, "max_length is 1000.0; allowed"),
        ({"return_attention_mask": False}, "would make padding count as speech"),
        ({"return_attention_mask": False, "padding": "max_length", "max_length": 3_000}, "padding count as speech"),
        ({"return_attention_mask": False, "pad_to_multiple_of": 512}, "padding count as speech"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_would_answer_for_other_audio_than_was_given_are_refused(options, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        EXTRACTOR([SPEECH, GOOD], sampling_rate=RATE, **options)
    assert says in str(caught.value)


# --- long -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros(3_600 * RATE, np.int16),
        lambda: np.zeros(3_600 * RATE, np.float32),
        lambda: torch.zeros(3_600 * RATE),
        lambda: [0.0] * (300 * RATE),
    ],
    ids=["int16", "float32", "tensor", "list"],
)
def test_an_hour_is_refused_before_memory_is_taken(make):
    hour = make()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidAudioError, match="s long; allowed are 30 s: cut it into turns"):
            EXTRACTOR([GOOD, hour], sampling_rate=RATE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


# --- short turns of a conversation ------------------------------------------------------------------------------------


def test_short_turns_can_be_skipped_and_leave_no_trace():
    model = tiny_model(dtype=torch.float64)
    turns = [noise(2_000, seed) for seed in range(3)]
    blips = [turns[0], SPEECH[:399], np.zeros(0, np.float32), turns[1], turns[2]]
    features = EXTRACTOR([blips, turns], sampling_rate=RATE, skip_short=True, return_tensors="pt")
    assert features["turn_mask"].tolist() == [[1, 0, 0, 1, 1], [1, 1, 1, 0, 0]]
    with torch.no_grad():
        logits = model(**features).logits
    assert torch.isnan(logits[0, [1, 2]]).all()
    torch.testing.assert_close(logits[0, [0, 3, 4]], logits[1, :3], atol=1e-12, rtol=0)


def test_skipping_short_turns_answers_for_nothing_that_is_not_there():
    with pytest.raises(InvalidAudioError, match="conversation 1 has no turn of 400 samples; leave it out"):
        EXTRACTOR([[GOOD], [GOOD[:10]]], sampling_rate=RATE, skip_short=True)
    with pytest.raises(InvalidAudioError, match="utterance 1 has 10 samples"):
        EXTRACTOR([GOOD, GOOD[:10]], sampling_rate=RATE, skip_short=True)
    with pytest.raises(InvalidAudioError, match="utterance 1 of conversation 0 has 1 samples that are NaN"):
        EXTRACTOR([[GOOD, broken(np.nan)]], sampling_rate=RATE, skip_short=True)


# --- at the model's own door ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e19, 32_767.0], ids=str)
def test_a_model_refuses_input_values_that_are_no_normalised_speech(model, value):
    features = EXTRACTOR([GOOD, GOOD, SPEECH], sampling_rate=RATE, return_tensors="pt")
    features["input_values"][2, 700] = value
    with pytest.raises(ValueError, match="turn 0 of row 2 of input_values is NaN, infinite or beyond 10000"):
        model(**features)


FRAMES = torch.randn(2, 3, 1, 9, 32, generator=torch.Generator().manual_seed(0))
FRAME_MASK = torch.ones(2, 3, 9)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frame_mask": None}, "need frame_mask"),
        ({"frame_values": FRAMES[:, :, 0]}, "must be (batch, turns, 1, frames, 32)"),
        ({"frame_values": FRAMES.expand(2, 3, 2, 9, 32)}, "must be (batch, turns, 1, frames, 32)"),
        ({"frame_values": FRAMES[..., :16]}, "must be (batch, turns, 1, frames, 32)"),
        ({"frame_values": FRAMES[:0]}, "must be (batch, turns, 1, frames, 32)"),
        ({"frame_mask": FRAME_MASK[..., :8]}, "frame_mask has shape (2, 3, 8), but must be (2, 3, 9)"),
        ({"frame_mask": 2 * FRAME_MASK}, "frame_mask must hold 0 and 1 only"),
        ({"frame_mask": 0 * FRAME_MASK}, "row 0 of the batch has no valid turn"),
        ({"turn_mask": torch.ones(2, 2)}, "turn_mask has shape (2, 2), but must be (2, 3)"),
        (
            {"frame_mask": FRAME_MASK * torch.tensor([1, 0, 1])[:, None], "turn_mask": torch.ones(2, 3)},
            "turn 1 of row 0 has no frame in frame_mask",
        ),
        ({"input_values": torch.randn(2, 3, 1_000)}, "either input_values or frame_values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_refuses_cached_frames_that_are_not_its_own(model, changes, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        model(**({"frame_values": FRAMES, "frame_mask": FRAME_MASK} | changes))
    assert says in str(caught.value)
