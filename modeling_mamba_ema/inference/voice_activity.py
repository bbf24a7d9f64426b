"""Where somebody speaks, found by Silero VAD (the extra `vad`; its model lies in its package)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..feature_extraction_mamba_ema import SAMPLING_RATE
from .recording import Recording
from .segments import Segment

BLOCK = 512  # samples that Silero VAD takes at 16 kHz
MIN_SILENCE_MS = 300  # a shorter pause does not end a turn
PAD_MS = 60


def detect_speech(recording: Recording) -> Iterator[Segment]:
    """Stretches of speech of a recording, as they are found; the recording is read once, in blocks.

    Raises:
        ImportError: `silero-vad` is not installed.
    """
    threads = torch.get_num_threads()
    try:
        import onnxruntime  # noqa: F401, runs the model
        from silero_vad import VADIterator, load_silero_vad
    except ImportError as error:
        raise ImportError(
            "finding speech needs silero-vad and onnxruntime: pip install 'silero-vad[onnx-cpu]'"
        ) from error
    finally:
        torch.set_num_threads(threads)  # importing it sets them to 1, for the whole process
    detector = VADIterator(load_silero_vad(onnx=True), min_silence_duration_ms=MIN_SILENCE_MS, speech_pad_ms=PAD_MS)
    start = None
    for block in recording.blocks(BLOCK):
        padded = np.zeros(BLOCK, dtype=np.float32)
        padded[: len(block)] = block
        change = detector(torch.from_numpy(padded)) or {}
        if "start" in change:
            start = change["start"] / SAMPLING_RATE
        if "end" in change and start is not None:
            yield Segment(start, min(change["end"] / SAMPLING_RATE, recording.seconds))
            start = None
    if start is not None:
        yield Segment(start, recording.seconds)
