"""MambaEMAFeatureExtractor: shapes, scales, folders; any audio is answered, or refused in a sentence."""

import math

import numpy as np
import pytest
import torch

from modeling_mamba_ema import InvalidAudioError, MambaEMAFeatureExtractor
from tests.support.audio_cases import ANSWERED, GOOD, QUIET, RATE, REFUSED, SPEECH, broken, noise
from tests.support.models import tiny_config, tiny_model
from tests.support.programs import allocating_below

EXTRACTOR = MambaEMAFeatureExtractor()


def test_one_waveform_is_a_batch_of_one():
    features = EXTRACTOR(noise(1_000), sampling_rate=RATE, return_tensors="pt")
    assert features["input_values"].shape == features["attention_mask"].shape == (1, 1_000)
    assert features["input_values"].dtype == torch.float32


def test_utterances_are_padded_on_the_right_and_masked():
    features = EXTRACTOR([noise(1_000), noise(600)], sampling_rate=RATE, return_tensors="np")
    assert features["input_values"].shape == (2, 1_000)
    assert features["attention_mask"].sum(1).tolist() == [1_000, 600]
    assert not features["input_values"][1, 600:].any()


def test_conversations_are_padded_in_turns_and_in_samples():
    batch = [[noise(1_000), noise(500)], [noise(700)]]
    features = EXTRACTOR(batch, sampling_rate=RATE, return_tensors="pt")
    assert features["input_values"].shape == features["attention_mask"].shape == (2, 2, 1_000)
    assert features["turn_mask"].tolist() == [[1, 1], [1, 0]]
    assert features["attention_mask"].sum(-1).tolist() == [[1_000, 500], [700, 0]]
    alone = EXTRACTOR(batch[1][0], sampling_rate=RATE, return_tensors="pt")
    torch.testing.assert_close(features["input_values"][1, 0, :700], alone["input_values"][0], rtol=0, atol=0)


def test_each_utterance_is_normalised_by_itself():
    values = EXTRACTOR([noise(9_000, scale=0.01) + 0.3, noise(800)], sampling_rate=RATE)["input_values"]
    for row, length in zip(values, (9_000, 800)):
        assert row[:length].mean() == pytest.approx(0, abs=1e-3)
        assert row[:length].var() == pytest.approx(1, abs=1e-2)


def test_without_normalisation_samples_pass_through():
    waveform = noise(500)
    extractor = MambaEMAFeatureExtractor(do_normalize=False)
    np.testing.assert_array_equal(extractor(waveform, sampling_rate=RATE)["input_values"][0], waveform)


@pytest.mark.parametrize(
    "setting", [{"max_seconds": value} for value in (-1, 0, float("nan"), "30", None)] + [{"sampling_rate": 8_000}]
)
def test_a_setting_that_no_audio_could_meet_is_refused_when_it_is_made(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*; "):
        MambaEMAFeatureExtractor(**setting)


@pytest.mark.parametrize(("dtype", "full_scale"), [(np.int16, 2**15), (np.int32, 2**31), (np.uint8, 2**7)])
def test_integers_are_scaled_by_the_range_of_their_type(dtype, full_scale):
    waveform = np.clip(noise(2_000), -0.99, 0.99)
    integers = np.round(waveform * full_scale + (128 if dtype == np.uint8 else 0)).astype(dtype)
    extractor = MambaEMAFeatureExtractor(do_normalize=False)
    row = extractor([noise(400), integers], sampling_rate=RATE)["input_values"][1]
    np.testing.assert_allclose(row, waveform, atol=1 / full_scale + 1e-7)


def test_another_rate_is_resampled_only_when_asked():
    seconds = np.arange(8_000) / 8_000
    with pytest.raises(ValueError, match="8000 Hz.*16000 Hz.*resample=True"):
        EXTRACTOR(np.sin(2 * np.pi * 440 * seconds), sampling_rate=8_000)
    row = EXTRACTOR(np.sin(2 * np.pi * 440 * seconds), sampling_rate=8_000, resample=True)["input_values"][0]
    expected = np.sqrt(2) * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(row[1_000:-1_000], expected[1_000:-1_000], atol=0.02)


def test_statistics_of_a_corpus_leave_loud_and_quiet_utterances_loud_and_quiet():
    extractor = MambaEMAFeatureExtractor(do_normalize=False, waveform_mean=0.01, waveform_std=0.2)
    loud, quiet, silent = noise(2_000, scale=0.1), noise(900, seed=1, scale=0.001), noise(500, scale=1e-6)
    features = extractor([loud, quiet, silent], sampling_rate=RATE, return_low_level=True)
    for row, waveform in zip(features["input_values"], (loud, quiet, silent)):
        np.testing.assert_array_equal(row[: len(waveform)], (waveform - 0.01) / (0.2 + 1e-6))
        assert row.dtype == np.float32
    assert features["low_level"].tolist() == [False, False, True]
    assert not features["input_values"][1][900:].any()


def test_the_statistics_of_a_corpus_are_saved_and_follow_the_configuration_and_the_encoder(tmp_path):
    statistics = {"do_normalize": False, "waveform_mean": 0.01, "waveform_std": 0.2}
    config = tiny_config(**statistics)
    MambaEMAFeatureExtractor.for_model(config, max_seconds=20).save_pretrained(tmp_path)
    for loaded in (
        MambaEMAFeatureExtractor.from_pretrained(tmp_path),
        MambaEMAFeatureExtractor.from_speech_encoder(tmp_path),
    ):
        assert {name: getattr(loaded, name) for name in statistics} == statistics
    assert MambaEMAFeatureExtractor.from_pretrained(tmp_path).max_seconds == 20


def test_a_folder_gives_the_same_feature_extractor_back(tmp_path):
    MambaEMAFeatureExtractor(do_normalize=False, max_seconds=20).save_pretrained(tmp_path)
    loaded = MambaEMAFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.do_normalize, loaded.max_seconds, loaded.return_attention_mask) == (False, 20, True)


def test_a_wavlm_folder_gives_its_normalisation(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=False).save_pretrained(tmp_path)
    assert MambaEMAFeatureExtractor.from_speech_encoder(tmp_path).do_normalize is False
    assert MambaEMAFeatureExtractor.from_speech_encoder(tmp_path / "none").do_normalize is True


# What is answered and what is refused

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


@pytest.mark.promise(
    "A-01",
    "audio in any usual form gets the numbers of its samples, alone and as the third item",
    "2e-5; 2e-3 under another gain or offset",
)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("case", ANSWERED, ids=lambda case: case.name)
def test_audio_in_any_form_gets_the_numbers_of_its_samples(model, case, position):
    found = predict(model, placed(case.audio, position)[0])
    assert torch.isfinite(found).all()
    # Gain and offset are taken off in float32, and 1e-7 is added to the variance.
    loose = case.name in ("another gain", "with an offset", "clipped, peak 1.5", "noise at -100 dBFS with an offset")
    expected = predict(model, placed(np.asarray(case.reference, dtype=np.float32), position)[0])
    torch.testing.assert_close(found, expected, atol=2e-3 if loose else 2e-5, rtol=0)


@pytest.mark.promise(
    "A-06", "silence and offsets are flagged and not amplified; short turns can be skipped and leave no trace", "1e-12"
)
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


@pytest.mark.promise(
    "A-02",
    "audio that cannot be used is refused in one sentence under 300 characters with its place and what is allowed",
    "every case, in 3 places",
)
@pytest.mark.promise("E-13")
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


@pytest.mark.promise("A-02")
def test_there_are_more_than_a_hundred_kinds_of_input():
    assert len(ANSWERED) + len(REFUSED) > 100
    assert len({case.name for case in [*ANSWERED, *REFUSED]}) == len(ANSWERED) + len(REFUSED)


@pytest.mark.promise("A-03", "batches, sampling rates and options that make no sense are refused", "every case")
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


@pytest.mark.promise("A-03")
@pytest.mark.parametrize(
    "rate",
    [None, "16000", 16_000.5, math.nan, 0, -1, True, 1, 400_000, 10**400, SPEECH, SPEECH.tolist(), [RATE], 8_000],
    ids=lambda rate: repr(rate)[:12],
)
def test_the_sampling_rate_is_needed_and_checked_and_its_value_never_dumped(rate):
    with pytest.raises(ValueError, match="^sampling_rate is ") as caught:
        EXTRACTOR(SPEECH, sampling_rate=rate)
    assert len(str(caught.value)) < 300


@pytest.mark.promise("A-03")
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


@pytest.mark.promise("A-04", "an utterance over 30 s is refused before memory is taken", "under 1 MB for an hour")
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
    says = "s long; allowed are 30 s: cut it into turns"
    with allocating_below(1e6), pytest.raises(InvalidAudioError, match=says):
        EXTRACTOR([GOOD, hour], sampling_rate=RATE)


@pytest.mark.promise("A-06")
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


@pytest.mark.promise("A-06")
def test_skipping_short_turns_answers_for_nothing_that_is_not_there():
    with pytest.raises(InvalidAudioError, match="conversation 1 has no turn of 400 samples; leave it out"):
        EXTRACTOR([[GOOD], [GOOD[:10]]], sampling_rate=RATE, skip_short=True)
    with pytest.raises(InvalidAudioError, match="utterance 1 has 10 samples"):
        EXTRACTOR([GOOD, GOOD[:10]], sampling_rate=RATE, skip_short=True)
    with pytest.raises(InvalidAudioError, match="utterance 1 of conversation 0 has 1 samples that are NaN"):
        EXTRACTOR([[GOOD, broken(np.nan)]], sampling_rate=RATE, skip_short=True)


# Random inputs

DTYPES_TO_TRY = [*["f4", "f8", "f2", "g", "b", "B", "h", "i"] * 5, *"HIlLqQ", "c8", "?", "m8[s]", "U3", "O"]


SPECIAL = [0.0, -0.0, 1.0, -1.0, 8.0, 8.1, 1e4, 3e38, 1e-45, math.inf, -math.inf, math.nan]


def any_waveform(random):
    """A waveform of random type, shape, length and content, with special values in some."""
    shape = [(int(random.integers(0, 2_001)),)] * 30 + [(), (1, 700), (2, 700), (700, 1), (1, 1, 700), (0, 400)]
    shape = shape[random.integers(len(shape))]
    values = random.normal(0, 10.0 ** random.uniform(-6, 1), shape)
    if values.size and random.random() < 0.2:
        values.flat[random.integers(values.size, size=3)] = random.choice(SPECIAL, 3)
    dtype = str(random.choice(DTYPES_TO_TRY))
    with np.errstate(all="ignore"):
        found = (
            np.asarray(values).astype(dtype) if dtype != "m8[s]" else np.nan_to_num(values).astype("i8").view("m8[s]")
        )
    kind = random.integers(8)
    if kind == 0:
        return found.tolist()
    if kind == 1 and found.dtype.char in "bBhilfdeF?":
        return torch.from_numpy(np.ascontiguousarray(found).reshape(found.shape))
    if kind == 2 and found.ndim == 1:
        return found[::-1]
    return found


def any_input(random):
    kind = random.integers(4)
    if kind == 0:
        return any_waveform(random)
    if kind == 1:
        return [any_waveform(random) for _ in range(random.integers(0, 4))]
    if kind == 2:
        return [[any_waveform(random) for _ in range(random.integers(0, 3))] for _ in range(random.integers(0, 3))]
    return [GOOD, any_waveform(random), [None, "call.wav", {}, 3, [GOOD], GOOD][random.integers(6)]]


@pytest.mark.promise("A-08", "2,000 random inputs end in finite numbers or in such a sentence", "0 others")
def test_2000_random_inputs_end_in_finite_numbers_or_in_a_sentence(record_property):
    model = tiny_model()
    random = np.random.default_rng(2_026)
    answered, sentences = 0, []
    for number in range(2_000):
        audio = any_input(random)
        try:
            features = EXTRACTOR(audio, sampling_rate=RATE, return_tensors="pt")
        except (InvalidAudioError, TypeError) as error:
            sentences.append(str(error))
            continue
        answered += 1
        with torch.no_grad():
            logits = model(**features).logits
        there = features["turn_mask"].bool() if "turn_mask" in features else torch.ones(len(logits), dtype=torch.bool)
        assert torch.isfinite(logits[there]).all(), number
    assert 200 < answered < 1_800
    assert max(map(len, sentences)) < 300
    allowed = ("allowed", "needed", "within", "leave it out", "give ")
    assert all(any(words in sentence for words in allowed) for sentence in sentences)
    record_property("figure", f"{answered} answered, {2_000 - answered} refused, 0 otherwise")
