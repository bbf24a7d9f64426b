"""Listen to a microphone, or to a file at the speed it was spoken, and print the emotion of each turn as it ends.

    pip install '.[tools,vad]' sounddevice
    python examples/listen.py outputs/demo/model                                  # the microphone, until Ctrl-C
    python examples/listen.py outputs/demo/model --file call.wav                  # a file, at real time
    python examples/listen.py outputs/demo/model --file call.wav --speed 20       # or faster

A turn ends with a pause of 0.3 s (Silero VAD) or after 25 s. Both sources go through the same code. Memory does not
grow: what is kept is the turn that is being spoken and the conversation's state.
"""

import argparse
import queue
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modeling_mamba_ema.data.audio import AudioFileError
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.inference.recording import Recording
from modeling_mamba_ema.inference.voice_activity import BLOCK, spoken_turns

RATE = 16_000
MAX_WAITING = 30 * RATE // BLOCK  # blocks of a microphone that may wait for the model


def microphone_blocks() -> Iterator[np.ndarray]:
    """Blocks of the default microphone, for ever."""
    import sounddevice

    heard: queue.Queue[np.ndarray] = queue.Queue()
    with sounddevice.InputStream(
        RATE, BLOCK, channels=1, dtype="float32", callback=lambda block, *_: heard.put(block[:, 0].copy())
    ):
        while True:
            if heard.qsize() > MAX_WAITING:
                raise ValueError("the model is slower than the speaker: 30 s of sound are waiting for it")
            yield heard.get()


def file_blocks(path: Path, speed: float) -> Iterator[np.ndarray]:
    """Blocks of a file, no earlier than they would have been spoken."""
    with Recording(path, downmix=True) as recording:
        begin = time.monotonic()
        for number, block in enumerate(recording.blocks(BLOCK), start=1):
            time.sleep(max(0.0, begin + number * BLOCK / RATE / speed - time.monotonic()))
            yield block


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a Mamba-EMA model; its code is not run")
    parser.add_argument("--revision", default="main", help="commit, tag or branch of a model on the Hub")
    parser.add_argument("--file", type=Path, help="listen to this file instead of the microphone")
    parser.add_argument("--speed", type=float, default=1.0, help="times real time, for a file")
    arguments = parser.parse_args()

    try:
        tracker = EmotionTracker.from_pretrained(arguments.model, arguments.revision)
        blocks = microphone_blocks() if arguments.file is None else file_blocks(arguments.file, arguments.speed)
        print(f"{'begin':>8}  {'seconds':>7}  " + "  ".join(f"{label:>9}" for label in tracker.labels), flush=True)
        for start, waveform in spoken_turns(blocks):
            ended = time.monotonic()
            heard = tracker.update(waveform)
            values = "  ".join(f"{value:>9.3f}" for value in heard.values.values())
            took = time.monotonic() - ended
            print(f"{start:>8.2f}  {heard.seconds:>7.2f}  {values}  ({took * 1000:.0f} ms)", flush=True)
    except KeyboardInterrupt:
        return 130
    except (AudioFileError, ImportError, OSError, ValueError) as error:
        print(f"listen: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
