"""Listen to a microphone, or to a file at the speed it was spoken, and print the emotion of each turn as it ends.

A turn ends with a pause of 0.3 s (Silero VAD) or after 25 s. What is kept is the turn that is being spoken and the
conversation's state, so memory does not grow. The microphone needs `pip install sounddevice`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_options import add_channel_option, add_model_options, load_tracker, number_between

if TYPE_CHECKING:
    import numpy as np

    from ..audio_files import Recording

HELP = "emotion of each turn as it is spoken, from a microphone or a file"
MAX_WAITING_SECONDS = 30  # of a microphone's sound that may wait for the model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--file", type=Path, help="listen to this file instead of the microphone")
    add_channel_option(parser, split=False)
    parser.add_argument(
        "--speed", type=number_between(0.01, 1_000), default=1.0, help="times real time, for a file (1)"
    )


def run(options: argparse.Namespace) -> int:
    import time

    from ..audio_files import Recording
    from ..feature_extraction_mamba_ema import SAMPLING_RATE
    from ..inference.voice_activity import spoken_turns

    if options.file is None:
        blocks = _of_microphone(_sound_device())
    else:
        blocks = _of_file(Recording(options.file, options.channel), options.speed)
    tracker = load_tracker(options)
    print(f"{'begin':>8}  {'seconds':>7}  " + "  ".join(f"{label:>9}" for label in tracker.labels), flush=True)
    for start, waveform in spoken_turns(blocks):
        ended = time.monotonic()
        heard = tracker.update(waveform, SAMPLING_RATE)
        values = "  ".join(f"{value:>9.3f}" for value in heard.values.values())
        took = time.monotonic() - ended
        print(f"{start:>8.2f}  {heard.seconds:>7.2f}  {values}  (after {took * 1000:.0f} ms)", flush=True)
    return 0


def _sound_device() -> Any:
    """The module `sounddevice`; an error says what is missing."""
    try:
        import sounddevice
    except ImportError as error:
        raise ImportError("the microphone needs sounddevice: pip install sounddevice") from error
    except OSError as error:  # its wheels for Linux do not bring the library along
        raise OSError(f"the microphone needs PortAudio: {error}; on Debian: apt install libportaudio2") from error
    return sounddevice


def _of_microphone(sounddevice: Any) -> Iterator[np.ndarray]:
    """Blocks of the default microphone until the program is stopped."""
    import queue

    from ..feature_extraction_mamba_ema import SAMPLING_RATE
    from ..inference.voice_activity import BLOCK

    heard: queue.Queue[np.ndarray] = queue.Queue()
    with sounddevice.InputStream(
        SAMPLING_RATE, BLOCK, channels=1, dtype="float32", callback=lambda block, *_: heard.put(block[:, 0].copy())
    ):
        while True:
            if heard.qsize() * BLOCK > MAX_WAITING_SECONDS * SAMPLING_RATE:
                raise ValueError(f"the model is slower than the speaker: {MAX_WAITING_SECONDS} s of sound wait for it")
            yield heard.get()


def _of_file(recording: Recording, speed: float) -> Iterator[np.ndarray]:
    """Blocks of a file, no earlier than they would have been spoken."""
    import time

    from ..feature_extraction_mamba_ema import SAMPLING_RATE
    from ..inference.voice_activity import BLOCK

    with recording:
        begin = time.monotonic()
        for number, block in enumerate(recording.blocks(BLOCK), start=1):
            time.sleep(max(0.0, begin + number * BLOCK / SAMPLING_RATE / speed - time.monotonic()))
            yield block
