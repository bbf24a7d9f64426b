"""Recordings as they are made worse, and sounds that are no speech."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import soundfile as sf
import soxr

from ..data.augmentation import change_speed
from ..data.recording_conditions import NOISES, band_pass, level_of_speech, make_noise, reverberate
from ..feature_extraction_mamba_ema import SAMPLING_RATE

TELEPHONE_RATE = 8_000  # Hz
SECONDS = 3  # of sounds that are no speech
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # (samples,) at 16 kHz, float64 -> (samples,)


def with_noise(speech: np.ndarray, generator: np.random.Generator, kind: str, snr_db: float) -> np.ndarray:
    noise = make_noise(kind, speech, generator)
    return speech + noise * level_of_speech(speech, SAMPLING_RATE) * 10 ** (-snr_db / 20)


def by_telephone(speech: np.ndarray) -> np.ndarray:
    """300 to 3400 Hz, at 8 kHz, in 8 bits of mu-law (ITU-T G.711)."""
    narrow = soxr.resample(band_pass(speech, SAMPLING_RATE, 300.0, 3400.0), SAMPLING_RATE, TELEPHONE_RATE)
    return soxr.resample(coded(narrow, TELEPHONE_RATE, format="WAV", subtype="ULAW"), TELEPHONE_RATE, SAMPLING_RATE)


def coded(speech: np.ndarray, rate: int, **encoding: object) -> np.ndarray:
    file = io.BytesIO()
    sf.write(file, np.clip(speech, -1, 1), rate, **encoding)
    file.seek(0)
    return sf.read(file, dtype="float32")[0]


def clipped(speech: np.ndarray, share: float) -> np.ndarray:
    """The loudest samples, this share of all, cut off at one level."""
    limit = np.quantile(np.abs(speech), 1 - share)
    return np.clip(speech, -limit, limit)


CONDITIONS: dict[str, Change] = {
    **{f"{kind} noise, {db} dB": partial(with_noise, kind=kind, snr_db=db) for kind in NOISES for db in (30, 20, 10)},
    "telephone, mu-law": lambda speech, _: by_telephone(speech),
    "MP3, 16 kbit/s": lambda speech, _: coded(
        speech, SAMPLING_RATE, format="MP3", compression_level=0.95, bitrate_mode="CONSTANT"
    ),
    "room, 0.3 s": lambda speech, generator: reverberate(speech, SAMPLING_RATE, 0.3, generator),
    "room, 0.8 s": lambda speech, generator: reverberate(speech, SAMPLING_RATE, 0.8, generator),
    "1 % clipped": lambda speech, _: clipped(speech, 0.01),
    "10 % clipped": lambda speech, _: clipped(speech, 0.1),
    "20 dB quieter": lambda speech, _: 0.1 * speech,
    "speed 0.9": lambda speech, _: change_speed(speech, 0.9),
    "speed 1.1": lambda speech, _: change_speed(speech, 1.1),
    "1 s of silence before": lambda speech, _: np.concatenate([np.zeros(SAMPLING_RATE), speech]),
}


def _tones(*hertz: float, seconds: float = SECONDS) -> np.ndarray:
    times = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    return 0.1 * np.mean([np.sin(2 * np.pi * tone * times) for tone in hertz], axis=0)


def _chord(*hertz: float) -> np.ndarray:
    sound = _tones(*hertz, seconds=SECONDS / 4)
    return sound * np.exp(-3 * np.arange(sound.size) / SAMPLING_RATE)


def _noise(kind: str, decibels: float) -> np.ndarray:
    return 10 ** (decibels / 20) * make_noise(kind, np.zeros(SECONDS * SAMPLING_RATE), np.random.default_rng(0))


NO_SPEECH: dict[str, np.ndarray] = {
    "silence": np.zeros(SECONDS * SAMPLING_RATE),
    "white noise, -60 dBFS": _noise("white", -60),
    "white noise, -30 dBFS": _noise("white", -30),
    "pink noise, -30 dBFS": _noise("pink", -30),
    "tone, 220 Hz": _tones(220.0),
    "tone, 1 kHz": _tones(1000.0),
    "music: four chords, struck and fading": np.concatenate(
        [
            _chord(261.6, 329.6, 392.0),
            _chord(220.0, 261.6, 329.6),
            _chord(174.6, 220.0, 261.6),
            _chord(196, 246.9, 293.7),
        ]
    ),
}
