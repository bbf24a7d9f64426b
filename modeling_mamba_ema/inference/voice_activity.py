"""Where somebody speaks, found by Silero VAD (the extra `vad`, which brings its model along)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ..audio_files import Recording
from ..feature_extraction_mamba_ema import MAX_PEAK, MIN_SAMPLES, SAMPLING_RATE, InvalidAudioError, as_float32, as_mono
from .segments import Segment, channel_speaker, check_several_channels

BLOCK = 512  # samples that Silero VAD takes at 16 kHz
MIN_SILENCE_MS = 300  # a shorter pause does not end a turn
PAD_MS = 60
# Samples before the block in which speech is noticed that belong to it, rounded up to blocks.
KEPT_BEFORE = 2 * BLOCK


def detect_speech(recording: Recording, split_channels: bool = False) -> Iterator[Segment]:
    """Stretches of speech of a recording, as they are found; the recording is read once, in blocks.

    Args:
        recording: to read.
        split_channels: find the stretches of each channel, whose number is their speaker, in the order of time.

    Raises:
        ImportError: `silero-vad` or `onnxruntime` is not installed.
        ValueError: `split_channels` with a single channel.
    """
    if not split_channels:
        return _speech(recording)
    check_several_channels(recording)
    found = [_speech(recording, channel) for channel in range(1, recording.channels + 1)]
    return heapq.merge(*found, key=lambda segment: segment.start)


def _speech(recording: Recording, channel: int | None = None) -> Iterator[Segment]:
    start, of_channel = None, (None, None) if channel is None else (channel_speaker(channel), channel)
    for block, change in _changes(recording.blocks(BLOCK, channel)):
        del block
        if "start" in change:
            start = change["start"] / SAMPLING_RATE
        if "end" in change and start is not None:
            yield Segment(start, min(change["end"] / SAMPLING_RATE, recording.seconds), *of_channel)
            start = None
    if start is not None:
        yield Segment(start, recording.seconds, *of_channel)


def spoken_turns(blocks: Iterable[np.ndarray], longest: float = 25.0) -> Iterator[tuple[float, np.ndarray]]:
    """Cut a live stream into turns; each comes when a pause of 0.3 s, or its length, has ended it.

    Memory does not grow: only the turn that is being spoken is kept.

    Args:
        blocks: of any number of samples at 16 kHz, mono; floats within [-1, 1], or integers.
        longest: seconds after which a turn is cut although nobody paused.

    Returns:
        For each turn its start, in seconds from the stream's begin, and its waveform, (samples,) float32.

    Raises:
        ImportError: `silero-vad` or `onnxruntime` is not installed.
        InvalidAudioError, TypeError: a block that is not mono, or of another type.
    """
    kept = np.zeros(0, dtype=np.float32)
    first = 0  # place of kept[0] in the stream
    start: int | None = None
    for block, change in _changes(blocks):
        kept = np.concatenate([kept, block])
        if "start" in change:
            start = max(change["start"], first)
        if start is None:
            first, kept = first + max(len(kept) - KEPT_BEFORE, 0), kept[-KEPT_BEFORE:]
            continue
        end = change.get("end")
        if end is None and first + len(kept) - start >= longest * SAMPLING_RATE:
            end = first + len(kept)
        if end is not None:
            # After a cut by length, the pause that ends the turn may have begun before the cut.
            end = max(end, first)
            if end - start >= MIN_SAMPLES:
                yield start / SAMPLING_RATE, kept[start - first : end - first]
            first, kept = end, kept[end - first :]
            start = None if "end" in change else end
    if start is not None and first + len(kept) - start >= MIN_SAMPLES:
        yield start / SAMPLING_RATE, kept[start - first :]


def _changes(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Each block with what Silero VAD noticed in it: nothing, or the sample at which speech starts or ends."""
    threads = torch.get_num_threads()
    try:
        import onnxruntime  # noqa: F401, runs the model
        from silero_vad import VADIterator, load_silero_vad
    except ImportError as error:
        raise ImportError(
            "finding speech needs silero-vad and onnxruntime (the extra `vad`): pip install 'silero-vad[onnx-cpu]'"
        ) from error
    finally:
        torch.set_num_threads(threads)  # importing it sets them to 1, for the whole process
    detector = VADIterator(load_silero_vad(onnx=True), min_silence_duration_ms=MIN_SILENCE_MS, speech_pad_ms=PAD_MS)
    for block in _of_one_size(blocks):
        padded = np.zeros(BLOCK, dtype=np.float32)
        padded[: len(block)] = block
        yield block, detector(torch.from_numpy(padded)) or {}


def _of_one_size(blocks: Iterable[Any]) -> Iterator[np.ndarray]:
    """The same samples in blocks of `BLOCK`, of which Silero VAD has learnt; the last is shorter."""
    left = np.zeros(0, dtype=np.float32)
    for number, block in enumerate(blocks):
        left = np.concatenate([left, _mono(block, f"block {number}")])
        whole = len(left) // BLOCK * BLOCK
        yield from left[:whole].reshape(-1, BLOCK)
        left = left[whole:]
    if len(left):
        yield left


def _mono(block: Any, name: str) -> np.ndarray:
    """(samples,) float32 of a block; (samples, 1), as sound devices give it, is mono too."""
    if getattr(block, "ndim", 1) == 2 and block.shape[1] == 1:
        block = block[:, 0]
    samples = as_float32(as_mono(block, name), name)
    if not np.abs(samples).max(initial=0.0) <= MAX_PEAK:
        raise InvalidAudioError(f"{name} holds samples that are not finite and within [-1, 1]")
    return samples
