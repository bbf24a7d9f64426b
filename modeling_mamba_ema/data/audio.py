"""Reading audio files without system packages, checked before anything is decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from ..feature_extraction_mamba_ema import MAX_PEAK, SAMPLING_RATE

RATE_RANGE = (4_000, 192_000)  # Hz; outside, a header is damaged or hostile
MAX_CHANNELS = 8
MAX_SECONDS = 4 * 3600.0


class AudioFileError(ValueError):
    """A file, or a stretch of one, that cannot be used; the message names it and says what is allowed."""


def audio_seconds(path: str | Path) -> float:
    """Length of a file in seconds, from its header; nothing is decoded.

    Raises:
        AudioFileError: no such file, or a header that is damaged or out of bounds.
    """
    header = _checked_header(Path(path))
    return header.frames / header.samplerate


def load_audio(
    path: str | Path,
    start: float | None = None,
    end: float | None = None,
    sampling_rate: int = SAMPLING_RATE,
    downmix: bool = False,
) -> np.ndarray:
    """Read a file (wav, flac, ogg, mp3, ...), or the stretch of it between two times.

    Args:
        path: the file.
        start, end: seconds; None: the file's begin or end.
        sampling_rate: rate to return, in Hz; another rate is resampled.
        downmix: average several channels; without it they are an error.

    Returns:
        (samples,) float32.

    Raises:
        AudioFileError: the file is missing, damaged, truncated, out of bounds, or holds NaN.
    """
    path = Path(path)
    header = _checked_header(path)
    if header.channels > 1 and not downmix:
        raise AudioFileError(f"{path.name} has {header.channels} channels; mono is needed, or downmix=True")
    first = 0 if start is None else round(start * header.samplerate)
    last = header.frames if end is None else min(round(end * header.samplerate), header.frames)
    if not 0 <= first < last:
        raise AudioFileError(
            f"{path.name} lasts {header.frames / header.samplerate:.3f} s; there is nothing between {start} and {end} s"
        )
    try:
        samples, _ = sf.read(path, start=first, frames=last - first, dtype="float32", always_2d=True)
    except (sf.LibsndfileError, RuntimeError) as error:
        raise AudioFileError(f"{path.name} cannot be decoded: {error}") from error
    if samples.shape[0] < last - first:
        raise AudioFileError(
            f"{path.name} is truncated: {samples.shape[0]} of {last - first} samples are there; copy the file anew"
        )
    waveform = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    peak = float(np.abs(waveform).max())
    if not np.isfinite(peak) or peak > MAX_PEAK:
        raise AudioFileError(f"{path.name} has a peak of {peak:g}; samples must be finite and within [-1, 1]")
    if header.samplerate != sampling_rate:
        waveform = soxr.resample(waveform, header.samplerate, sampling_rate, quality="HQ")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def _checked_header(path: Path):
    if not path.is_file():
        raise AudioFileError(f"{path.name} is not there (looked in {path.parent})")
    try:
        header = sf.info(path)
    except (sf.LibsndfileError, RuntimeError) as error:
        raise AudioFileError(f"{path.name} is no audio file that can be read: {error}") from error
    if header.frames == 0:
        raise AudioFileError(f"{path.name} holds no samples")
    low, high = RATE_RANGE
    if not low <= header.samplerate <= high:
        raise AudioFileError(f"{path.name} claims {header.samplerate} Hz; allowed are {low} to {high} Hz")
    if header.channels > MAX_CHANNELS:
        raise AudioFileError(f"{path.name} has {header.channels} channels; allowed are up to {MAX_CHANNELS}")
    if header.frames / header.samplerate > MAX_SECONDS:
        raise AudioFileError(f"{path.name} claims {header.frames / header.samplerate:.0f} s; allowed are {MAX_SECONDS:.0f} s")
    return header
