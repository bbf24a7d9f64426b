"""Reading audio files without system packages, checked before anything is decoded."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from ..feature_extraction_mamba_ema import MAX_PEAK, MIN_SAMPLES, SAMPLING_RATE

RATE_RANGE = (4_000, 192_000)  # Hz; outside, a header is damaged or hostile
MAX_CHANNELS = 8
MAX_SECONDS = 4 * 3600.0
# How far a stretch may reach beyond its file's end: times in tables are rounded.
END_TOLERANCE = 0.05  # seconds
_UNKNOWN_LENGTH = 0x7FFFF000  # bytes; programs that write to a pipe claim this or more
_MAX_CHUNKS = 1_000  # of a WAV file, before its sound


class AudioFileError(ValueError):
    """A file, or a stretch of one, that cannot be used; the message names it and says what is allowed."""


def audio_seconds(path: str | Path) -> float:
    """Length of a file in seconds, from its header; nothing is decoded.

    Raises:
        AudioFileError: no such file, or a header that is damaged or out of bounds.
    """
    header = checked_header(path)
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
    header = checked_header(path)
    if header.channels > 1 and not downmix:
        raise AudioFileError(f"{path.name} has {header.channels} channels; mono is needed, or downmix=True")
    first, last = _stretch(path, header, start, end)
    waveform = _decode(path, first, last)
    if header.samplerate != sampling_rate:
        waveform = soxr.resample(waveform, header.samplerate, sampling_rate, quality="HQ")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def check_audio(
    path: str | Path,
    start: float | None = None,
    end: float | None = None,
    min_seconds: float = MIN_SAMPLES / SAMPLING_RATE,
    max_seconds: float = MAX_SECONDS,
) -> None:
    """Raise what `load_audio` would, or that the stretch is too short or too long, as cheaply as it can be known.

    An uncompressed file of integer samples whose header agrees with its size cannot be truncated, hold NaN or exceed
    full scale, so its header is all that is read. Every other file (floating point, flac, ogg, mp3) is decoded.

    Raises:
        AudioFileError: as for [`load_audio`], or a length outside `min_seconds` to `max_seconds`.
    """
    path = Path(path)
    header = checked_header(path)
    first, last = _stretch(path, header, start, end)
    seconds = (last - first) / header.samplerate
    if not min_seconds <= seconds <= max_seconds:
        raise AudioFileError(
            f"{path.name} has an utterance of {seconds:.3f} s; allowed are {min_seconds:g} to {max_seconds:g} s"
        )
    if not (header.format in ("WAV", "WAVEX") and header.subtype.startswith("PCM")):
        _decode(path, first, last)


def checked_header(path: str | Path):
    """What a file's header says, as `soundfile.info` gives it (`frames`, `samplerate`, `channels`, ...).

    Raises:
        AudioFileError: no such file, or a header that is damaged, out of bounds, or claims more than the file holds.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioFileError(f"{path.name} is not there (looked in {path.parent})")
    try:
        header = sf.info(path)
    except (sf.LibsndfileError, RuntimeError) as error:
        raise AudioFileError(f"{path.name} is no audio file that can be read: {_reason(error)}") from error
    if header.frames == 0:
        raise AudioFileError(f"{path.name} holds no samples")
    low, high = RATE_RANGE
    if not low <= header.samplerate <= high:
        raise AudioFileError(f"{path.name} claims {header.samplerate} Hz; allowed are {low} to {high} Hz")
    if header.channels > MAX_CHANNELS:
        raise AudioFileError(f"{path.name} has {header.channels} channels; allowed are up to {MAX_CHANNELS}")
    if header.frames / header.samplerate > MAX_SECONDS:
        raise AudioFileError(f"{path.name} claims {header.frames / header.samplerate:.0f} s; allowed are {MAX_SECONDS:.0f} s")
    if header.format in ("WAV", "WAVEX"):
        _check_wav(path)
    return header


def _reason(error: RuntimeError) -> str:
    """What libsndfile says is wrong, without the file's folder, which its own sentence begins with."""
    return str(getattr(error, "error_string", error))


def _stretch(path: Path, header, start: float | None, end: float | None) -> tuple[int, int]:
    """First sample of a stretch, and the one behind its last."""
    lasts = header.frames / header.samplerate
    first = 0 if start is None else round(start * header.samplerate)
    last = header.frames if end is None else min(round(end * header.samplerate), header.frames)
    if not 0 <= first < last:
        raise AudioFileError(f"{path.name} lasts {lasts:.3f} s; there is nothing between {start} and {end} s")
    if end is not None and end > lasts + END_TOLERANCE:
        raise AudioFileError(f"{path.name} lasts {lasts:.3f} s, but an utterance in it should end at {end:.3f} s")
    return first, last


def _decode(path: Path, first: int, last: int) -> np.ndarray:
    """(samples,) float32 at the file's own rate, channels averaged."""
    try:
        samples, _ = sf.read(path, start=first, frames=last - first, dtype="float32", always_2d=True)
    except (sf.LibsndfileError, RuntimeError) as error:
        raise AudioFileError(f"{path.name} cannot be decoded: {_reason(error)}") from error
    if samples.shape[0] < last - first:
        raise AudioFileError(
            f"{path.name} is truncated: {samples.shape[0]} of {last - first} samples are there; copy the file anew"
        )
    waveform = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    peak = float(np.abs(waveform).max())
    if not np.isfinite(peak) or peak > MAX_PEAK:
        raise AudioFileError(f"{path.name} has a peak of {peak:g}; samples must be finite and within [-1, 1]")
    return waveform


def _check_wav(path: Path) -> None:
    """What libsndfile lets pass: sample data that is cut off, and samples of odd widths."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return
        file.seek(12)
        for _ in range(_MAX_CHUNKS):
            chunk = file.read(8)
            if len(chunk) < 8:
                return
            name, length = struct.unpack("<4sI", chunk)
            begin = file.tell()
            if name == b"fmt ":
                coding, bits = struct.unpack("<H12xH", file.read(16).ljust(16, b"\0"))
                if coding == 1 and bits % 8:
                    raise AudioFileError(f"{path.name} claims samples of {bits} bits; its header is damaged")
            if name == b"data":
                if begin + length > size and length < _UNKNOWN_LENGTH:
                    raise AudioFileError(
                        f"{path.name} is truncated: {size - begin} of {length} bytes of sound are there; copy the file anew"
                    )
                return
            file.seek(begin + length + length % 2)
