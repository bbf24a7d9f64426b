"""Audio in more than a hundred forms: what must be answered, and what must be refused with which words."""

import array
import collections
import pathlib
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modeling_mamba_ema import InvalidAudioError

RATE = 16_000


def noise(samples, seed=0, scale=0.1):
    return np.random.default_rng(seed).normal(0, scale, samples).astype(np.float32)


SPEECH = noise(2_000)
GOOD = noise(1_200, seed=1)


@dataclass
class Answered:
    """Audio, and the float32 waveform whose numbers it must get."""

    name: str
    audio: Any
    reference: np.ndarray


def rounded(dtype):
    scale = -float(np.iinfo(dtype).min)
    return np.round(np.clip(SPEECH, -0.99, 0.99) * scale).astype(dtype)


def memory_mapped(waveform):
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, dtype=np.float32, shape=waveform.shape)
    mapped[:] = waveform
    return mapped


BFLOAT16 = torch.from_numpy(SPEECH).bfloat16()
QUIET = noise(2_000, scale=1e-5)
ANSWERED = [
    Answered("float64", SPEECH.astype(np.float64), SPEECH),
    Answered("long double", SPEECH.astype(np.longdouble), SPEECH),
    Answered("float16", SPEECH.astype(np.float16), SPEECH.astype(np.float16).astype(np.float32)),
    Answered("big-endian", SPEECH.astype(">f4"), SPEECH),
    Answered("read-only", np.frombuffer(SPEECH.tobytes(), np.float32), SPEECH),
    Answered("every second sample", np.repeat(SPEECH, 2)[::2], SPEECH),
    Answered("reversed view", SPEECH[::-1][::-1], SPEECH),
    Answered("memory-mapped", memory_mapped(SPEECH), SPEECH),
    Answered("(1, N) array", SPEECH[None], SPEECH),
    Answered("list", SPEECH.tolist(), SPEECH),
    Answered("tuple", tuple(SPEECH.tolist()), SPEECH),
    Answered("list of numpy scalars", list(SPEECH), SPEECH),
    Answered("array.array", array.array("f", SPEECH.tolist()), SPEECH),
    Answered("deque", collections.deque(SPEECH.tolist()), SPEECH),
    Answered("tensor", torch.from_numpy(SPEECH), SPEECH),
    Answered("float64 tensor", torch.from_numpy(SPEECH).double(), SPEECH),
    Answered("float16 tensor", torch.from_numpy(SPEECH).half(), torch.from_numpy(SPEECH).half().float().numpy()),
    Answered("bfloat16 tensor", BFLOAT16, BFLOAT16.float().numpy()),
    Answered("(1, N) tensor", torch.from_numpy(SPEECH)[None], SPEECH),
    Answered("tensor with a gradient", torch.from_numpy(SPEECH.copy()).requires_grad_(), SPEECH),
    Answered("strided tensor", torch.from_numpy(np.repeat(SPEECH, 2))[::2], SPEECH),
    Answered("int16", rounded(np.int16), rounded(np.int16) / np.float32(2**15)),
    Answered("int32", rounded(np.int32), (rounded(np.int32) / 2.0**31).astype(np.float32)),
    Answered("int8", rounded(np.int8), rounded(np.int8) / np.float32(2**7)),
    Answered("uint8", (rounded(np.int8).astype(int) + 128).astype(np.uint8), rounded(np.int8) / np.float32(2**7)),
    Answered("int16 tensor", torch.from_numpy(rounded(np.int16)), rounded(np.int16) / np.float32(2**15)),
    Answered("int16 at full scale", np.tile(np.int16([-32768, 32767]), 500), np.tile([-1.0, 32767 / 32768], 500)),
    Answered("400 samples", SPEECH[:400], SPEECH[:400]),
    Answered("719 samples, one frame", SPEECH[:719], SPEECH[:719]),
    Answered("exactly 30 s", noise(30 * RATE), noise(30 * RATE)),
    Answered("clipped, peak 1.5", SPEECH * (1.5 / np.abs(SPEECH).max()), SPEECH),
    Answered("another gain", SPEECH * 0.01, SPEECH),
    Answered("with an offset", SPEECH + 0.5, SPEECH),
    Answered("silence", np.zeros(2_000, np.float32), np.zeros(2_000, np.float32)),
    Answered("an offset and nothing else", np.full(2_000, 0.5, np.float32), np.zeros(2_000, np.float32)),
    Answered("noise at -100 dBFS with an offset", QUIET + np.float32(0.25), QUIET),
]


@dataclass
class Refused:
    """Audio, and what the sentence must say of it."""

    name: str
    audio: Any
    says: str
    error: type[Exception] = InvalidAudioError


def broken(value, at=1_000):
    waveform = SPEECH.copy()
    waveform[at] = value
    return waveform


def unread(type_name):
    return f"is of type {type_name}; allowed are arrays, tensors and lists of samples"


NOT_FINITE, INTEGERS, MONO = (
    "NaN or infinite, the first at {}; allowed",
    "looks like unscaled integers",
    "mono is needed",
)
SHORT = "at least 400 (0.025 s) are needed"
DTYPES = "allowed are floats, int8, int16, int32 and uint8"
TENSORS = "allowed are dense tensors"
NUMBERS = "not a number; allowed are lists of samples"
REFUSED = [
    Refused("no samples", np.zeros(0, np.float32), "has 0 samples (0.000 s); " + SHORT),
    Refused("no samples, tensor", torch.zeros(0), "has 0 samples (0.000 s); " + SHORT),
    Refused("1 sample", SPEECH[:1], "has 1 samples"),
    Refused("100 samples", SPEECH[:100], "has 100 samples (0.006 s); " + SHORT),
    Refused("399 samples", SPEECH[:399], "has 399 samples (0.025 s); " + SHORT),
    Refused("(1, 0)", np.zeros((1, 0), np.float32), "has 0 samples"),
    Refused("one NaN", broken(np.nan), "1 samples that are " + NOT_FINITE.format(1000)),
    Refused("NaN at the end", broken(np.nan, -1), "1 samples that are " + NOT_FINITE.format(1999)),
    Refused("all NaN", np.full(2_000, np.nan, np.float32), "2000 samples that are " + NOT_FINITE.format(0)),
    Refused("infinity", broken(np.inf), "1 samples that are " + NOT_FINITE.format(1000)),
    Refused("minus infinity", broken(-np.inf), "1 samples that are " + NOT_FINITE.format(1000)),
    Refused("NaN in a list", broken(np.nan).tolist(), "1 samples that are " + NOT_FINITE.format(1000)),
    Refused("NaN in float16", broken(np.nan).astype(np.float16), NOT_FINITE.format(1000)),
    Refused("NaN in bfloat16", torch.from_numpy(broken(np.nan)).bfloat16(), NOT_FINITE.format(1000)),
    Refused("1e300, beyond float32", np.r_[SPEECH.astype(np.float64), 1e300], NOT_FINITE.format(2000)),
    Refused("peak 3e38", broken(3e38), INTEGERS),
    Refused("peak 1e19, whose variance overflows", SPEECH * np.float32(1e19), INTEGERS),
    Refused("peak 9", broken(9.0), "has a peak of 9; floating-point audio is within [-1, 1]"),
    Refused("unscaled integers as floats", SPEECH * 30_000, INTEGERS),
    Refused("unscaled integers in a list", (SPEECH * 30_000).astype(int).tolist(), INTEGERS),
    Refused("unscaled integers in array.array", array.array("h", (SPEECH * 30_000).astype(int).tolist()), INTEGERS),
    Refused("range", range(2_000), INTEGERS),
    Refused("a huge integer in a list", [0.0] * 999 + [10**400], "beyond the range of floats; allowed are [-1, 1]"),
    Refused("int64", (SPEECH * 30_000).astype(np.int64), "has dtype int64; " + DTYPES),
    Refused("int64 tensor", torch.from_numpy((SPEECH * 30_000).astype(np.int64)), "has dtype int64; " + DTYPES),
    Refused("uint16", np.ones(2_000, np.uint16), "has dtype uint16; " + DTYPES),
    Refused("uint64", np.ones(2_000, np.uint64), "has dtype uint64; " + DTYPES),
    Refused("bool", np.ones(2_000, bool), "has dtype bool; " + DTYPES),
    Refused("complex", SPEECH.astype(complex), "has dtype complex128; " + DTYPES),
    Refused("durations", np.ones(2_000, "m8[s]"), "has dtype timedelta64[s]; " + DTYPES),
    Refused("dates", np.zeros(2_000, "M8[s]"), "has dtype datetime64[s]; " + DTYPES),
    Refused("text array", np.full(2_000, "0.5"), "has dtype <U3; " + DTYPES),
    Refused("records", np.zeros(2_000, [("left", "f4"), ("right", "f4")]), "allowed are floats"),
    Refused("objects", np.array([0.1] * 1_999 + [None], dtype=object), "allowed are"),
    Refused("masked array", np.ma.masked_greater(SPEECH, 0.1), "is a masked array; allowed are plain ones"),
    Refused("(2, N), stereo or a batch", np.stack([SPEECH, SPEECH]), f"has shape (2, 2000); {MONO}"),
    Refused("(N, 2), stereo", np.stack([SPEECH, SPEECH], axis=1), f"has shape (2000, 2); {MONO}"),
    Refused("(N, 1)", SPEECH[:, None], f"has shape (2000, 1); {MONO}"),
    Refused("(1, 2, N)", np.stack([SPEECH, SPEECH])[None], f"has shape (1, 2, 2000); {MONO}"),
    Refused("(1, 1, N)", SPEECH[None, None], f"has shape (1, 1, 2000); {MONO}"),
    Refused("(2, N) tensor", torch.zeros(2, 2_000), f"has shape (2, 2000); {MONO}"),
    Refused("0-d array", np.array(0.5), f"has shape (); {MONO}"),
    Refused("0-d tensor", torch.tensor(0.5), f"has shape (); {MONO}"),
    Refused("matrix", np.asmatrix(np.stack([SPEECH, SPEECH])), MONO),
    Refused("sparse tensor", torch.from_numpy(SPEECH).to_sparse(), TENSORS),
    Refused("tensor without data", torch.zeros(2_000, device="meta"), TENSORS),
    Refused("complex tensor", torch.zeros(2_000, dtype=torch.complex64), "has dtype complex64; " + DTYPES),
    Refused("float8 tensor", torch.zeros(2_000).to(torch.float8_e4m3fn), TENSORS),
    Refused("30 s and a sample", noise(30 * RATE + 1), "is 30.00006 s long; allowed are 30 s: cut it into turns"),
    Refused("10 min", np.zeros(600 * RATE, np.float32), "is 600 s long; allowed are 30 s: cut it into turns"),
    Refused("10 min of int16", np.zeros(600 * RATE, np.int16), "is 600 s long; allowed are 30 s"),
    Refused("list with None", [0.1] * 999 + [None], NUMBERS, TypeError),
    Refused("list with text", [0.1] * 999 + ["0.1"], NUMBERS, TypeError),
    Refused("list with truth values", [True] * 1_000, NUMBERS, TypeError),
    Refused("list with complex numbers", [0.1] * 999 + [np.complex64(0.1)], NUMBERS, TypeError),
    Refused("list with a list", [0.1] * 999 + [[0.1]], NUMBERS, TypeError),
    Refused("a path", "call.wav", unread("str"), TypeError),
    Refused("a URL", "http://169.254.169.254/latest/meta-data", unread("str"), TypeError),
    Refused("a Path", pathlib.Path("call.wav"), "Path; allowed are arrays", TypeError),
    Refused("bytes", b"RIFF" * 500, unread("bytes"), TypeError),
    Refused("bytearray", bytearray(2_000), unread("bytearray"), TypeError),
    Refused("None", None, unread("NoneType"), TypeError),
    Refused("a dict of datasets", {"array": SPEECH, "sampling_rate": RATE}, unread("dict"), TypeError),
    Refused("a number", 0.5, unread("float"), TypeError),
    Refused("a numpy number", np.float32(0.5), unread("float32"), TypeError),
    Refused("a generator", (sample for sample in [0.1]), unread("generator"), TypeError),
    Refused("a set", {0.1, 0.2}, unread("set"), TypeError),
]
