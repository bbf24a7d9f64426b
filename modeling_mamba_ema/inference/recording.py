"""A long audio file, read a stretch at a time: memory does not depend on its length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from ..data.audio import AudioFileError, audio_seconds
from ..feature_extraction_mamba_ema import SAMPLING_RATE


class Recording:
    """An open recording; a context manager.

    Args:
        path: WAV, FLAC, OGG or MP3 file of up to 4 hours.
        downmix: average several channels; without it they are an error.

    Attributes:
        name: of the file.
        seconds: length.

    Raises:
        AudioFileError: the file is missing, damaged, or has several channels.
    """

    def __init__(self, path: str | Path, downmix: bool = False):
        self.name = Path(path).name
        self.seconds = audio_seconds(path)  # checks the header
        self._file = sf.SoundFile(path)
        if self._file.channels > 1 and not downmix:
            self._file.close()
            raise AudioFileError(f"{self.name} has {self._file.channels} channels; mono is needed, or downmix=True")

    def read(self, start: float, end: float) -> np.ndarray:
        """The stretch between two times in seconds, (samples,) float32 at 16 kHz; shorter where the file ends.

        Raises:
            AudioFileError: the file is truncated or cannot be decoded there.
        """
        rate = self._file.samplerate
        first, last = round(start * rate), min(round(end * rate), self._file.frames)
        try:
            self._file.seek(first)
            samples = self._file.read(last - first, dtype="float32", always_2d=True)  # (samples, channels)
        except (sf.LibsndfileError, RuntimeError) as error:
            raise AudioFileError(f"{self.name} cannot be decoded at {start:.1f} s: {error}") from error
        if len(samples) < last - first:
            raise AudioFileError(f"{self.name} is truncated: it ends within {start:.1f} to {end:.1f} s")
        waveform = samples.mean(axis=1)
        return waveform if rate == SAMPLING_RATE else soxr.resample(waveform, rate, SAMPLING_RATE, quality="HQ")

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """The recording from its begin in blocks of `size` samples at 16 kHz, float32; the last is shorter.

        The file is opened anew, so that `read` may be called between two blocks.
        """
        left = np.zeros(0, dtype=np.float32)
        with sf.SoundFile(self._file.name) as file:
            resampler = soxr.ResampleStream(file.samplerate, SAMPLING_RATE, 1, dtype="float32")
            while True:
                samples = file.read(file.samplerate, dtype="float32", always_2d=True)  # one second
                ended = len(samples) == 0
                left = np.concatenate([left, resampler.resample_chunk(samples.mean(axis=1), last=ended)])
                for first in range(0, len(left) - size + 1, size):
                    yield left[first : first + size]
                left = left[len(left) // size * size :]
                if ended:
                    break
        if len(left):
            yield left

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
