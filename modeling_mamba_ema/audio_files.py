"""Audio files: the one place where they are checked, decoded, cut, mixed to one channel and resampled.

A file is given by its path, its bytes, or an open binary file. Its header is checked before anything is decoded.
`soundfile` reads WAV, FLAC, OGG, MP3 and more; where it is not installed, plain PCM WAV is read, with the same numbers.
`soxr` resamples. Several channels are averaged unless one is chosen. No URL is ever opened.
"""

from __future__ import annotations

import io
import struct
import warnings
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .feature_extraction_mamba_ema import MAX_PEAK, MIN_SAMPLES, SAMPLING_RATE, InvalidAudioError, resampled

RATE_RANGE = (4_000, 192_000)  # Hz; outside, a header is damaged or hostile
MAX_CHANNELS = 8
MAX_SECONDS = 4 * 3600.0
MIN_SECONDS = MIN_SAMPLES / SAMPLING_RATE
END_TOLERANCE = 0.05  # seconds that a stretch may reach beyond its file's end: times in tables are rounded
MIN_CORRELATION = 0.5  # between channels; below it they hold different sound
LOUD_SHARE = 1e-3  # of the loudest channel's power; a channel below it (-30 dB) counts as silent
MAX_CHUNKS = 1_000  # of a WAV file, before its sound
UNKNOWN_LENGTH = 0x7FFFF000  # bytes; programs that write WAV to a pipe claim this or more


class AudioFileError(InvalidAudioError):
    """A file, or a stretch of one, that cannot be used; the message names it and says what is allowed."""


def load_audio(
    source: Any,
    start: float | None = None,
    end: float | None = None,
    channel: int | None = None,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Read an utterance: a file, or the stretch of it between two times.

    Args:
        source: the path of a local file, the bytes of one, or a binary file object.
        start, end: seconds; None: the file's beginning or end.
        channel: the one to read, counted from 1; None: the average of all.
        max_seconds: longest utterance, checked before anything is decoded.

    Returns:
        (samples,) float32 at 16 kHz.

    Raises:
        AudioFileError: the file is missing, damaged, truncated or out of bounds, has no such channel or stretch, holds
            NaN, or the utterance is too short (25 ms) or too long.
        ImportError: `soxr` is needed for the file's sampling rate and is not installed.
    """
    with Recording(source, channel) as recording:
        recording.check_length(start, end, max_seconds)
        return recording.read(start, end)


def check_audio(
    source: Any, start: float | None = None, end: float | None = None, max_seconds: float = MAX_SECONDS
) -> None:
    """Raise what [`load_audio`] would raise, as cheaply as it can be known.

    An uncompressed file of integer samples whose header agrees with its size cannot be truncated, hold NaN or exceed
    full scale, so its header is all that is read. Every other file (floating point, FLAC, OGG, MP3) is decoded.
    """
    with Recording(source) as recording:
        recording.check_length(start, end, max_seconds)
        if not recording.holds_integers:
            recording.decode(start, end)


def audio_seconds(source: Any) -> float:
    """Length of a file in seconds, from its header; nothing is decoded. Raises `AudioFileError`."""
    with Recording(source) as recording:
        return recording.seconds


class Recording:
    """An open audio file, read a stretch at a time, so that memory does not depend on its length. A context manager.

    Args:
        source: the path of a local file of up to 4 hours, the bytes of one, or a binary file object.
        channel: the one to read, counted from 1; None: the average of all.

    Attributes:
        name: of the file, for messages.
        seconds, sampling_rate, channels: as the header says.
        holds_integers: whether the file is WAV with integer samples.

    Raises:
        AudioFileError: the file is missing, damaged, truncated or out of bounds, or has no such channel.
    """

    def __init__(self, source: Any, channel: int | None = None):
        self.name, self._source = _name_and_source(source)
        self._file = _open(self._source, self.name)
        self._frames, self.sampling_rate = self._file.frames, self._file.samplerate
        self.channels: int = self._file.channels
        self.seconds = self._frames / max(self.sampling_rate, 1)
        self.holds_integers = self._file.format in ("WAV", "WAVEX") and self._file.subtype.startswith("PCM")
        self._channel = channel
        self._may_warn = True
        self._check_header()

    def check_length(self, start: float | None, end: float | None, max_seconds: float) -> None:
        """Raise `AudioFileError` where a stretch is not in the file, is shorter than 25 ms, or is too long."""
        first, last = self._stretch(start, end)
        seconds = (last - first) / self.sampling_rate
        if not MIN_SECONDS <= seconds <= max_seconds:
            hint = ": cut it into turns, or follow a recording over time with `mamba-ema timeline`"
            raise AudioFileError(
                f"{self._place(first, last)} lasts {seconds:.7g} s; an utterance lasts {MIN_SECONDS:g} to "
                f"{max_seconds:g} s{hint if seconds > max_seconds else ''}"
            )

    def read(self, start: float | None = None, end: float | None = None) -> np.ndarray:
        """The stretch between two times in seconds, (samples,) float32 at 16 kHz; raises as [`load_audio`]."""
        waveform, rate = self.decode(start, end), self.sampling_rate
        return waveform if rate == SAMPLING_RATE else resampled(waveform, rate, SAMPLING_RATE)

    def decode(self, start: float | None = None, end: float | None = None) -> np.ndarray:
        """As `read`, at the file's own sampling rate."""
        first, last = self._stretch(start, end)
        waveform = self._samples(self._file, last - first, first)
        place = self._place(first, last)
        if len(waveform) < last - first:
            counts = f"{len(waveform)} of {last - first} samples were found"
            raise AudioFileError(f"{place} is truncated: {counts}; copy the file again")
        peak = float(np.abs(waveform).max())
        if not peak <= MAX_PEAK:
            raise AudioFileError(f"{place} has a peak of {peak:g}; samples must be finite and within [-1, 1]")
        return waveform

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """The recording from its beginning in blocks of `size` samples at 16 kHz, float32; the last is shorter.

        The file is opened once more, so that `read` may be called between two blocks.
        """
        left = np.zeros(0, dtype=np.float32)
        resample = _streaming_resampler(self.sampling_rate)
        file = _open(self._source, self.name)
        try:
            while True:
                waveform = self._samples(file, self.sampling_rate)  # the next second
                ended = len(waveform) == 0
                left = np.concatenate([left, resample(waveform, ended)])
                for first in range(0, len(left) - size + 1, size):
                    yield left[first : first + size]
                left = left[len(left) // size * size :]
                if ended:
                    break
        finally:
            file.close()
        if len(left):
            yield left

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_header(self) -> None:
        low, high = RATE_RANGE
        if self._frames == 0:
            raise AudioFileError(f"{self.name} holds no samples")
        if not low <= self.sampling_rate <= high:
            raise AudioFileError(f"{self.name} claims {self.sampling_rate} Hz; allowed are {low} to {high} Hz")
        if self.channels > MAX_CHANNELS:
            raise AudioFileError(f"{self.name} has {self.channels} channels; allowed are up to {MAX_CHANNELS}")
        if self.seconds > MAX_SECONDS:
            raise AudioFileError(f"{self.name} claims {self.seconds:.0f} s; allowed are {MAX_SECONDS:.0f} s")
        chosen = self._channel
        if chosen is not None and (isinstance(chosen, bool) or chosen not in range(1, self.channels + 1)):
            there = "1 channel" if self.channels == 1 else f"the channels 1 to {self.channels}"
            raise AudioFileError(f"{self.name} has {there}, no channel {chosen}")

    def _stretch(self, start: float | None, end: float | None) -> tuple[int, int]:
        """First sample of a stretch, and the one behind its last, at the file's own rate."""
        first = 0 if start is None else round(start * self.sampling_rate)
        last = self._frames if end is None else min(round(end * self.sampling_rate), self._frames)
        lasts = f"{self.name} lasts {self.seconds:.3f} s"
        if not 0 <= first < last:
            raise AudioFileError(f"{lasts}; there is nothing between {start} and {end} s")
        if end is not None and end > self.seconds + END_TOLERANCE:
            raise AudioFileError(f"{lasts}, but an utterance in it should end at {end:.3f} s")
        return first, last

    def _place(self, first: int, last: int) -> str:
        """The file, or the stretch of it, for messages."""
        if (first, last) == (0, self._frames):
            return self.name
        return f"{self.name} at {first / self.sampling_rate:.3f} to {last / self.sampling_rate:.3f} s"

    def _samples(self, file: Any, frames: int, first: int | None = None) -> np.ndarray:
        """Frames from the first on, or the next ones, as (samples,) float32 of one channel; fewer where the file ends."""
        try:
            if first is not None and file.seekable():
                file.seek(first)
            samples = file.read(frames, dtype="float32", always_2d=True)  # (frames, channels)
        except RuntimeError as error:  # soundfile.LibsndfileError is one
            raise AudioFileError(f"{self.name} cannot be decoded: {_reason(error)}") from error
        if self.channels == 1:
            return samples[:, 0]
        if self._channel is not None:
            return np.ascontiguousarray(samples[:, self._channel - 1])
        if self._may_warn and _channels_differ(samples):
            self._may_warn = False
            warnings.warn(
                f"{self.name}: its {self.channels} channels hold different sound, as where each speaker has a channel; "
                "their average is used. channel=1, or --channel 1 of a command, takes one of them",
                stacklevel=2,
            )
        return samples.mean(axis=1)


def _name_and_source(source: Any) -> tuple[str, Path | bytes]:
    """A name for messages, which holds no folder, and a path or the content of a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "the audio", bytes(source)
    if hasattr(source, "read"):
        return "the audio", source.read()
    if not isinstance(source, (str, Path)):
        raise TypeError(f"audio is given as {type(source).__name__}; a path, bytes or a binary file object is needed")
    if "://" in str(source):
        raise AudioFileError("the audio is a URL; only local files are opened: download it first")
    path = Path(source)
    name = path.name if len(path.name) <= 60 else f"{path.name[:40]}…{path.suffix[:10]}"
    if not path.is_file():
        what = "is a folder, no audio file" if path.is_dir() else f"does not exist (looked in {path.parent})"
        raise AudioFileError(f"{name} {what}")
    return name, path


def _open(source: Path | bytes, name: str) -> Any:
    """A `soundfile.SoundFile`, or what stands in for it, over a file whose header does not contradict itself."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: its C library is missing
        soundfile = None
    try:
        stream = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
    except OSError as error:
        raise AudioFileError(f"{name} cannot be opened: {error.strerror}") from error
    with stream:
        sound_bytes = _check_wave(stream, name)
    if soundfile is None:
        return _PlainWave(source, sound_bytes, name)
    try:
        return soundfile.SoundFile(source if isinstance(source, Path) else io.BytesIO(source))
    except RuntimeError as error:
        raise AudioFileError(f"{name} is no audio file that can be read: {_reason(error)}") from error


def _reason(error: RuntimeError) -> str:
    """What libsndfile says is wrong, without the path, which its own sentence begins with."""
    return str(getattr(error, "error_string", error)).rstrip(".")


def _channels_differ(samples: np.ndarray) -> bool:
    """Whether the channels of (frames, channels) that are not silent hold different sound."""
    products = samples.T @ samples  # (channels, channels)
    power = np.diagonal(products)
    loud = power > LOUD_SHARE * power.max(initial=0.0)
    power, products = power[loud], products[loud][:, loud]
    return bool((products < MIN_CORRELATION * np.sqrt(np.outer(power, power))).any())


def _streaming_resampler(rate: int) -> Any:
    """A function of the next samples and whether they are the last, that returns samples at 16 kHz."""
    if rate == SAMPLING_RATE:
        return lambda waveform, last: waveform
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"converting {rate} Hz to {SAMPLING_RATE} Hz needs soxr: pip install soxr") from error
    stream = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32")
    return lambda waveform, last: stream.resample_chunk(waveform, last=last)


def _check_wave(stream: BinaryIO, name: str) -> int:
    """Check in a WAV file what libsndfile does not; returns the bytes of sound that it holds, 0 for another kind.

    Raises:
        AudioFileError: sound that is cut off, or samples of odd widths.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    order = {b"RIFF": "<", b"RIFX": ">"}.get(stream.read(4))
    stream.seek(12)
    for _ in range(MAX_CHUNKS if order else 0):
        chunk = stream.read(8)
        if len(chunk) < 8:
            break
        length, begin = struct.unpack(f"{order}I", chunk[4:])[0], stream.tell()
        if chunk[:4] == b"fmt ":
            coding, bits = struct.unpack(f"{order}H12xH", stream.read(16).ljust(16, b"\0"))
            if coding == 1 and bits % 8:
                raise AudioFileError(f"{name} claims samples of {bits} bits; its header is damaged")
        elif chunk[:4] == b"data":
            if size < begin + length < begin + UNKNOWN_LENGTH:
                raise AudioFileError(
                    f"{name} is truncated: {size - begin} of {length} bytes of sound were found; copy the file again"
                )
            return min(length, size - begin)
        stream.seek(begin + length + length % 2)
    return 0


class _PlainWave:
    """PCM WAV read by the standard library: of `soundfile.SoundFile`, what `Recording` uses."""

    format, subtype = "WAV", "PCM"

    def __init__(self, source: Path | bytes, sound_bytes: int, name: str):
        try:
            self._wave = wave.open(str(source) if isinstance(source, Path) else io.BytesIO(source))  # noqa: SIM115
        except (wave.Error, EOFError) as error:
            raise AudioFileError(
                f"{name} is no PCM WAV, the one format that is read without soundfile: pip install soundfile soxr "
                "(the extra `tools`)"
            ) from error
        self.channels, self._width, self.samplerate = self._wave.getparams()[:3]
        self.frames = min(self._wave.getnframes(), sound_bytes // (self.channels * self._width))
        self.seek, self.close = self._wave.setpos, self._wave.close

    def seekable(self) -> bool:
        return True

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray:
        """(frames, channels) float32, fewer where the file ends"""
        content, block = self._wave.readframes(frames), self.channels * self._width
        content = content[: len(content) // block * block]
        octets = np.frombuffer(content, dtype=np.uint8).reshape(-1, self.channels, self._width)
        if self._width == 1:
            return octets[..., 0].astype(np.float32) / 128 - 1
        # Little-endian integers of 2, 3 or 4 bytes, moved to the upper end of 32 bits so that the sign comes along.
        padded = np.zeros((*octets.shape[:2], 4), dtype=np.uint8)
        padded[..., 4 - self._width :] = octets
        return padded.view("<i4")[..., 0].astype(np.float32) / 2**31


__all__ = ["AudioFileError", "Recording", "audio_seconds", "check_audio", "load_audio"]
