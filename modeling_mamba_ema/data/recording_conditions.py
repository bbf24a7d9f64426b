"""How speech was recorded: noise, room, band and level, drawn for each utterance and independent of what is said."""

from dataclasses import dataclass

import numpy as np

SPEED_OF_SOUND = 343.0  # m/s
NOISES = ("white", "pink", "speech-shaped")
BANDS = {"full": None, "wide": (50.0, 7000.0), "medium": (100.0, 5500.0), "telephone": (300.0, 3400.0)}  # Hz


@dataclass(frozen=True)
class RecordingConditions:
    """
    Attributes:
        noise: one of `NOISES`; None: none, and `snr_db` is None.
        snr_db: power of the speech over that of the noise, in dB, measured where there is speech.
        reverberation: seconds until the sound of the room has fallen by 60 dB (RT60); 0: no room.
        band: one of `BANDS`.
        level_db: root mean square of the whole recording, in dB below full scale.
    """

    noise: str | None = None
    snr_db: float | None = None
    reverberation: float = 0.0
    band: str = "full"
    level_db: float = -26.0


def draw_conditions(generator: np.random.Generator) -> RecordingConditions:
    """Noise of 5 to 40 dB in three recordings of four, a room in half of them, a narrower band in half."""
    noisy, in_room, narrow = generator.random(3) < (0.75, 0.5, 0.5)
    noise, snr_db = str(generator.choice(NOISES)), float(generator.uniform(5, 40))
    reverberation, band = float(generator.uniform(0.1, 0.6)), str(generator.choice(list(BANDS)[1:]))
    return RecordingConditions(
        noise=noise if noisy else None,
        snr_db=round(snr_db, 2) if noisy else None,
        reverberation=round(reverberation, 3) if in_room else 0.0,
        band=band if narrow else "full",
        level_db=round(float(generator.uniform(-36, -18)), 2),
    )


def record(
    speech: np.ndarray, sampling_rate: int, conditions: RecordingConditions, generator: np.random.Generator
) -> np.ndarray:
    """Clean speech (samples,) as a microphone under these conditions would give it, float32 within [-1, 1]."""
    if conditions.reverberation:
        speech = reverberate(speech, sampling_rate, conditions.reverberation, generator)
    if conditions.noise is not None and conditions.snr_db is not None:
        noise = make_noise(conditions.noise, speech, generator)
        speech = speech + noise * level_of_speech(speech, sampling_rate) * 10 ** (-conditions.snr_db / 20)
    limits = BANDS[conditions.band]
    if limits is not None:
        speech = band_pass(speech, sampling_rate, *limits)
    speech = speech * 10 ** (conditions.level_db / 20) / max(float(np.sqrt(np.mean(speech**2))), 1e-9)
    return np.clip(speech, -1, 1).astype(np.float32)


def level_of_speech(speech: np.ndarray, sampling_rate: int) -> float:
    """Root mean square over the frames of 20 ms that lie less than 30 dB below the loudest."""
    size = sampling_rate // 50
    power = np.mean(speech[: speech.size // size * size].reshape(-1, size) ** 2, axis=1)
    return float(np.sqrt(power[power > 1e-3 * power.max()].mean())) if power.size and power.max() > 0 else 0.0


def make_noise(kind: str, speech: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(samples,) noise of root mean square 1: white; pink, its power falling by 3 dB an octave; or with the long-term
    spectrum of the speech."""
    if kind not in NOISES:
        raise ValueError(f"noise is {kind!r}; allowed are {', '.join(NOISES)}")
    size = _fft_size(speech.size)
    spectrum = np.fft.rfft(generator.standard_normal(size))
    if kind == "pink":
        spectrum /= np.sqrt(np.maximum(np.arange(spectrum.size), 1))
    elif kind == "speech-shaped":
        spectrum *= np.abs(np.fft.rfft(speech, size))
    noise = np.fft.irfft(spectrum, size)[: speech.size]
    return noise / max(float(np.sqrt(np.mean(noise**2))), 1e-9)


def reverberate(speech: np.ndarray, sampling_rate: int, seconds: float, generator: np.random.Generator) -> np.ndarray:
    """Speech (samples,) in a room: its direct sound and a decaying tail of noise (Moorer 1979, "About this
    reverberation business"), 0 to 12 dB below it; RT60 is `seconds`."""
    times = np.arange(int(seconds * sampling_rate)) / sampling_rate
    tail = generator.standard_normal(times.size) * 10 ** (-3 * times / seconds)
    tail[: int(generator.uniform(1, 5) / SPEED_OF_SOUND * sampling_rate)] = 0  # the way to the first wall and back
    tail *= 10 ** (-generator.uniform(0, 12) / 20) / max(float(np.sqrt(np.sum(tail**2))), 1e-9)
    tail[0] = 1.0
    size = _fft_size(speech.size + tail.size)
    return np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(tail, size), size)[: speech.size]


def band_pass(speech: np.ndarray, sampling_rate: int, low: float, high: float) -> np.ndarray:
    """Keep what lies between two frequencies in Hz; the edges are an eighth of an octave wide."""
    size = _fft_size(speech.size)
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / sampling_rate), 1e-3)
    octaves_inside = np.minimum(np.log2(frequencies / low), np.log2(high / frequencies))
    return np.fft.irfft(np.fft.rfft(speech, size) * np.clip(1 + 8 * octaves_inside, 0, 1), size)[: speech.size]


def _fft_size(samples: int) -> int:
    """A power of two: for lengths that are prime, an FFT takes many times as long."""
    return 1 << (samples - 1).bit_length()
