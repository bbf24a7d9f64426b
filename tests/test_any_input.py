"""2,000 random inputs: each is answered with finite numbers or refused in one sentence."""

import math
import time

import numpy as np
import torch

from modeling_mamba_ema import InvalidAudioError, MambaEMAFeatureExtractor
from tests.support.audio_cases import GOOD, RATE
from tests.support.models import tiny_model

EXTRACTOR = MambaEMAFeatureExtractor()

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


def test_2000_random_inputs_end_in_finite_numbers_or_in_a_sentence(record_property):
    model = tiny_model()
    random = np.random.default_rng(2_026)
    began, answered, sentences = time.monotonic(), 0, []
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
    seconds = time.monotonic() - began
    record_property("figure", f"{answered} answered, {2_000 - answered} refused, 0 otherwise, in {seconds:.0f} s")
    assert seconds < 60
