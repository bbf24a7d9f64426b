"""Where somebody speaks, found by Silero VAD (the extra `vad`, which brings its model along)."""

import copy
import functools
import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ..audio_files import Recording
from ..feature_extraction_mamba_ema import MAX_PEAK, MIN_SAMPLES, SAMPLING_RATE, InvalidAudioError, as_float32, as_mono
from .segments import Segment, channel_speaker

BLOCK = 512  # samples that Silero VAD takes at 16 kHz
MIN_SILENCE_MS = 300  # a shorter pause does not end a turn
PAD_MS = 60
# Samples before the block in which speech is noticed that belong to it, rounded up to blocks.
KEPT_BEFORE = 2 * BLOCK


def detect_speech(recording: Recording, split_channels: bool = False) -> Iterator[Segment]:
    """Stretches of speech of a recording, as they are found; the recording is read once, in blocks.

    Args:
        split_channels: find the stretches of each channel, whose number is their speaker, in the order of time.

    Raises:
        ImportError: `silero-vad` or `onnxruntime` is not installed.
        ValueError: `split_channels` with a single channel.
    """
    if not split_channels:
        return _speech(recording)
    found = [_speech(recording, channel) for channel in recording.several_channels()]
    return heapq.merge(*found, key=lambda segment: segment.start)


def _speech(recording: Recording, channel: int | None = None) -> Iterator[Segment]:
    start, of_channel = None, (None, None) if channel is None else (channel_speaker(channel), channel)
    noticed = _noticed()
    for block in recording.blocks(BLOCK, channel):
        change = noticed(block)
        if "start" in change:
            start = change["start"] / SAMPLING_RATE
        if "end" in change and start is not None:
            yield Segment(start, min(change["end"] / SAMPLING_RATE, recording.seconds), *of_channel)
            start = None
    if start is not None:
        yield Segment(start, recording.seconds, *of_channel)


def spoken_turns(blocks: Iterable[Any], longest: float = 25.0) -> Iterator[tuple[float, np.ndarray]]:
    """Cut a live stream of blocks into turns, see [`TurnDetector`]; each comes when it has ended."""
    detector = TurnDetector(longest)
    for block in blocks:
        yield from detector.add(block)
    yield from detector.end()


class TurnDetector:
    """Cuts a live stream into turns. A pause of 0.3 s ends a turn, or its length, `longest` seconds.

    Memory does not grow: only the turn that is being spoken is kept. A turn is its start, in seconds from the stream's
    begin, and its waveform, (samples,) float32 at 16 kHz.

    Raises:
        ImportError: `silero-vad` or `onnxruntime` is not installed.
    """

    def __init__(self, longest: float = 25.0):
        self._longest = longest * SAMPLING_RATE
        self._noticed = _noticed()
        self._blocks = 0  # added so far, for messages
        self._left = np.zeros(0, dtype=np.float32)  # less than a block of the detector
        self._kept = np.zeros(0, dtype=np.float32)
        self._first = 0  # place of kept[0] in the stream
        self._start: int | None = None

    def add(self, block: Any) -> list[tuple[float, np.ndarray]]:
        """The turns that the next block ends: any number of samples at 16 kHz, mono; floats within [-1, 1], or
        integers. Raises `InvalidAudioError` or `TypeError` for another block."""
        self._left = np.concatenate([self._left, _mono(block, f"block {self._blocks}")])
        self._blocks += 1
        whole = len(self._left) // BLOCK * BLOCK
        parts, self._left = self._left[:whole].reshape(-1, BLOCK), self._left[whole:]
        return [turn for part in parts for turn in self._hear(part)]

    def end(self) -> list[tuple[float, np.ndarray]]:
        """The turns that the end of the stream ends."""
        turns = list(self._hear(self._left)) if len(self._left) else []
        spoken = self.spoken()
        self._start, self._left = None, self._left[:0]
        return turns if spoken is None else [*turns, spoken]

    def spoken(self) -> tuple[float, np.ndarray] | None:
        """What has been said of the turn that is being spoken; None where nobody speaks, or not yet for 25 ms."""
        if self._start is None or self._first + len(self._kept) - self._start < MIN_SAMPLES:
            return None
        return self._start / SAMPLING_RATE, self._kept[self._start - self._first :]

    def _hear(self, block: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
        change = self._noticed(block)
        self._kept = np.concatenate([self._kept, block])
        behind = self._first + len(self._kept)
        if "start" in change:
            self._start = max(change["start"], self._first)
        if self._start is None:
            self._first, self._kept = max(behind - KEPT_BEFORE, self._first), self._kept[-KEPT_BEFORE:]
            return
        end = change.get("end")
        if end is None and behind - self._start >= self._longest:
            end = behind
        if end is not None:
            # After a cut by length, the pause that ends the turn may have begun before the cut.
            end = max(end, self._first)
            if end - self._start >= MIN_SAMPLES:
                yield self._start / SAMPLING_RATE, self._kept[self._start - self._first : end - self._first]
            self._first, self._kept = end, self._kept[end - self._first :]
            self._start = None if "end" in change else end


def _noticed() -> Callable[[np.ndarray], dict[str, Any]]:
    """A function of the next block of a stream: what Silero VAD notices in it, a sample where speech starts or ends."""
    model = copy.copy(_silero_vad())  # the network is shared, its memory is the stream's own
    from silero_vad import VADIterator

    detector = VADIterator(model, min_silence_duration_ms=MIN_SILENCE_MS, speech_pad_ms=PAD_MS)

    def noticed(block: np.ndarray) -> dict[str, Any]:
        padded = np.zeros(BLOCK, dtype=np.float32)
        padded[: len(block)] = block
        return detector(torch.from_numpy(padded)) or {}

    return noticed


@functools.lru_cache(maxsize=1)
def _silero_vad() -> Any:
    threads = torch.get_num_threads()
    try:
        import onnxruntime  # noqa: F401, runs the model
        from silero_vad import load_silero_vad
    except ImportError as error:
        raise ImportError(
            "finding speech needs silero-vad and onnxruntime (the extra `vad`): pip install 'silero-vad[onnx-cpu]'"
        ) from error
    finally:
        torch.set_num_threads(threads)  # importing it sets them to 1, for the whole process
    return load_silero_vad(onnx=True)


def _mono(block: Any, name: str) -> np.ndarray:
    """(samples,) float32 of a block; (samples, 1), as sound devices give it, is mono too."""
    if getattr(block, "ndim", 1) == 2 and block.shape[1] == 1:
        block = block[:, 0]
    samples = as_float32(as_mono(block, name), name)
    if not np.abs(samples).max(initial=0.0) <= MAX_PEAK:
        raise InvalidAudioError(f"{name} holds samples that are not finite and within [-1, 1]")
    return samples
