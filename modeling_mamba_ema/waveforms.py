"""Waveforms as people have them -> float32 samples, or a sentence that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

SAMPLING_RATE = 16_000  # Hz, what WavLM was trained on
MIN_SAMPLES = 400  # 25 ms: the receptive field of one WavLM frame
MAX_PEAK = 8.0  # floating-point audio is within [-1, 1]; far beyond that it is unscaled integers


class InvalidAudioError(ValueError):
    """An utterance that is no speech the model can answer for; the message names it and says what is allowed."""


def _is_sequence(item: Any) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, (str, bytes, bytearray))


def as_conversations(raw_speech: Any) -> tuple[list[list[Any]], int]:
    """Sort the input into conversations of turns; depth is 0 for a waveform, 1 for utterances, 2 for conversations."""
    if _is_waveform(raw_speech, "raw_speech"):
        return [[raw_speech]], 0
    if len(raw_speech) == 0:
        raise InvalidAudioError("the batch is empty; at least one utterance is needed")
    kinds = [_is_waveform(item, f"utterance {index}") for index, item in enumerate(raw_speech)]
    if True in kinds:
        if False in kinds:
            raise InvalidAudioError(
                f"item {kinds.index(True)} of the batch is an utterance, item {kinds.index(False)} a conversation; "
                "give either waveforms or lists of waveforms"
            )
        return [[item] for item in raw_speech], 1
    for row, turns in enumerate(raw_speech):
        if len(turns) == 0:
            raise InvalidAudioError(f"conversation {row} has no turns; leave it out")
        for turn, raw in enumerate(turns):
            if _is_waveform(raw, f"utterance {turn} of conversation {row}") is False:
                raise InvalidAudioError(
                    f"utterance {turn} of conversation {row} holds waveforms; allowed are conversations of utterances, "
                    "nothing deeper"
                )
    return [list(turns) for turns in raw_speech], 2


def _is_waveform(item: Any, name: str) -> bool | None:
    """True for an array, tensor or list of numbers; False for a list of waveforms; None for a list without items."""
    if isinstance(item, np.ndarray) and item.dtype == object and item.ndim == 1:
        item = list(item)
    if isinstance(item, (np.ndarray, torch.Tensor)):
        # (1, samples) is one waveform, as readers that keep the channel axis return it; more rows are ambiguous
        # between stereo and a batch, which as_mono refuses.
        return True
    if not _is_sequence(item):
        raise TypeError(
            f"{name} is of type {type(item).__name__}; allowed are arrays, tensors and lists of samples. The feature "
            "extractor opens no files: read the audio first, e.g. with soundfile"
        )
    if len(item) == 0:
        return None
    return not (_is_sequence(item[0]) or isinstance(item[0], (np.ndarray, torch.Tensor)))


def as_mono(raw: Any, name: str) -> np.ndarray | Sequence[Any]:
    """The samples of one waveform along one axis, not yet copied or converted: their number is checked first."""
    if isinstance(raw, torch.Tensor):
        raw = raw.detach()
        try:
            raw = (raw.float() if raw.dtype == torch.bfloat16 else raw).cpu().numpy()
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise InvalidAudioError(
                f"{name} is a tensor of {raw.dtype}, {raw.layout}, on {raw.device}; allowed are dense tensors of "
                "floats, signed integers and uint8"
            ) from error
    elif not isinstance(raw, np.ndarray):
        return raw
    if isinstance(raw, np.ma.MaskedArray):
        raise InvalidAudioError(f"{name} is a masked array; allowed are plain ones: fill or cut out what is masked")
    if raw.ndim == 2 and raw.shape[0] == 1:
        raw = raw[0]
    if raw.ndim != 1:
        raise InvalidAudioError(
            f"{name} has shape {raw.shape}; mono is needed, (samples,). Average or choose a channel of stereo audio, "
            "and give a batch as a list of waveforms"
        )
    return raw


def as_float32(samples: np.ndarray | Sequence[Any], name: str) -> np.ndarray:
    """Samples of any type -> (samples,) float32, integers scaled by the range of their type."""
    if not isinstance(samples, np.ndarray):
        number = (int, float, np.integer, np.floating)
        if any(not isinstance(sample, number) or isinstance(sample, bool) for sample in samples):
            raise TypeError(f"{name} holds something that is not a number; allowed are lists of samples")
        # A list has no integer type whose range would scale it: Python numbers are taken as they stand.
        try:
            samples = np.asarray(samples, dtype=np.float64)
        except OverflowError as error:
            raise InvalidAudioError(f"{name} holds a number beyond the range of floats; allowed are [-1, 1]") from error
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if samples.dtype in (np.int8, np.int16, np.int32):
        return (samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if not np.issubdtype(samples.dtype, np.floating):
        # int64 is what arrays of int16 samples become unnoticed; by its own range they would be silence.
        raise InvalidAudioError(f"{name} has dtype {samples.dtype}; allowed are floats, int8, int16, int32 and uint8")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which the caller's check names
        return samples.astype(np.float32)


def is_long_enough(waveform: np.ndarray, name: str, allow_short: bool) -> bool:
    """Whether WavLM makes a frame of it; too short without `allow_short` is an error."""
    if waveform.size < MIN_SAMPLES and not allow_short:
        raise InvalidAudioError(
            f"{name} has {waveform.size} samples ({waveform.size / SAMPLING_RATE:.3f} s); at least {MIN_SAMPLES} "
            f"({MIN_SAMPLES / SAMPLING_RATE:.3f} s) are needed"
        )
    return waveform.size >= MIN_SAMPLES


def level(waveform: np.ndarray) -> float:
    """RMS without the mean: a microphone's offset is no sound."""
    return float(np.std(waveform, dtype=np.float64)) if waveform.size else 0.0


def resampled(waveform: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """The waveform at another rate, in Hz; needs `soxr`."""
    try:
        import soxr
    except ImportError as error:
        raise ImportError("resample=True needs soxr: pip install soxr") from error
    return soxr.resample(waveform, rate, target_rate, quality="HQ").astype(np.float32)
