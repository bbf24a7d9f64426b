"""Audio as callers have it, an array or a local file, as a waveform and its rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError


def read_audio(audio: Any, sampling_rate: int) -> tuple[Any, int]:
    """
    Args:
        audio: a waveform, which is passed on as it is, or the path of a local file; no URL is ever opened.
        sampling_rate: of the waveform, in Hz; a file brings its own.

    Returns:
        The waveform and its rate in Hz; files come as (samples,) float32 at 16 kHz.

    Raises:
        InvalidAudioError: a URL.
        AudioFileError: a file that is missing, damaged, not mono or out of bounds.
        ImportError: files need `soundfile` and `soxr`.
    """
    if not isinstance(audio, (str, Path)):
        return audio, sampling_rate
    if "://" in str(audio):
        raise InvalidAudioError("the audio is a URL; only local files are opened: download it first")
    try:
        from ..data.audio import load_audio
    except ImportError as error:
        raise ImportError("reading audio files needs soundfile and soxr: pip install soundfile soxr") from error
    return load_audio(audio), SAMPLING_RATE
