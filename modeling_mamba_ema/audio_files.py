"""Audio files: the one place where they are checked, decoded, cut, mixed to one channel and resampled.

A file is given by its path, its bytes, or an open binary file; a pipe is read to its end. What sound the file holds is
found before anything is decoded, see `audio_containers.py`. `soundfile` decodes WAV, FLAC, OGG, MP3 and more; where it
is not installed, plain PCM WAV is read, with the same numbers. `soxr` resamples. Several channels are averaged unless
one is chosen. No URL is ever opened.
"""

from __future__ import annotations

import functools
import io
import math
import os
import warnings
import wave
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from .audio_containers import Part, View, parts_of
from .feature_extraction_mamba_ema import (
    MAX_PEAK,
    MIN_SAMPLES,
    SAMPLING_RATE,
    InvalidAudioError,
    resampled,
    whole_number,
)

RATE_RANGE = (4_000, 192_000)  # Hz; outside, a header is damaged or hostile
MAX_CHANNELS = 8
MAX_SECONDS = 4 * 3600.0
MAX_PIPE_BYTES = 1 << 29  # what comes from a pipe or an open file is kept in memory
MIN_SECONDS = MIN_SAMPLES / SAMPLING_RATE
END_TOLERANCE = 0.05  # seconds that a stretch may reach beyond its file's end: times in tables are rounded
MIN_CORRELATION = 0.5  # between channels; below it they hold different sound
LOUD_SHARE = 1e-3  # of the loudest channel's power; a channel below it (-30 dB) counts as silent
# A FLAC that was written to a pipe does not know its length, for which libsndfile gives the largest number. Its samples
# are counted by decoding it once more.
UNKNOWN_FRAMES = 1 << 40
# What a decoder of these needs before a place to give there what it gives when it comes from the beginning.
WARM_UP_SECONDS = {"MP3": 1.0, "OGG": 1.0}


_CUT = ": cut it into turns, or follow a recording over time with `mamba-ema timeline`"

_ONLY_PLAIN = (
    "is no PCM WAV, the one format that is read without soundfile: pip install soundfile soxr (the extra `tools`)"
)


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
        source: the path of a local file or pipe, the bytes of one, or a binary file object.
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
    return load_stretches(source, [(start, end, channel)], max_seconds)[0]


def load_stretches(
    source: Any, stretches: Iterable[tuple[float | None, float | None, int | None]], max_seconds: float = MAX_SECONDS
) -> list[np.ndarray]:
    """As [`load_audio`] for several stretches (start, end, channel) of a file, which is opened once.

    A decoder of MP3 that was just opened goes through all frames before a stretch, which takes longer than decoding it.
    """
    waveforms = []
    with Recording(source) as recording:
        for start, end, channel in stretches:
            channel = recording.checked_channel(channel)
            recording.check_length(start, end, max_seconds)
            waveforms.append(recording.read(start, end, channel))
    return waveforms


def check_audio(
    source: Any,
    start: float | None = None,
    end: float | None = None,
    channel: int | None = None,
    max_seconds: float = MAX_SECONDS,
) -> float:
    """The length of an utterance in seconds; raises what [`load_audio`] would raise, as cheaply as it can be known.

    An uncompressed file of integer samples that is as long as its header says cannot be truncated, hold NaN or exceed
    full scale, so nothing of it is decoded. Every other file (floating point, FLAC, OGG, MP3) is. A pipe, which would
    be empty for the next reader, is refused.
    """
    with Recording(_file(source), channel) as recording:
        seconds = recording.check_length(start, end, max_seconds)
        if not recording.holds_integers:
            recording.decode(start, end)
    return seconds


def audio_seconds(source: Any) -> float:
    """Length of a file in seconds, without decoding it. Raises `AudioFileError`."""
    with Recording(_file(source)) as recording:
        return recording.seconds


def is_audio_file(source: Any) -> bool:
    """Whether this is what [`load_audio`] takes, and no waveform."""
    return isinstance(source, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(source, "read")


def read_audio(source: Any, sampling_rate: Any, channel: int | None, max_seconds: float) -> tuple[Any, Any]:
    """The waveform and its rate in Hz of what [`load_audio`] or [`decoded_audio`] takes; a waveform is as it was given,
    and no channel of it can be asked for."""
    if is_audio_file(source):
        return load_audio(source, channel=channel, max_seconds=max_seconds), SAMPLING_RATE
    if hasattr(source, "get_all_samples"):
        return decoded_audio(source, channel, max_seconds)
    if channel is not None:
        raise ValueError("channel chooses a channel of a file; choose that of an array yourself: waveform[:, 0]")
    return source, sampling_rate


def decoded_audio(decoder: Any, channel: int | None = None, max_seconds: float = MAX_SECONDS) -> tuple[np.ndarray, int]:
    """The samples of an audio decoder of torchcodec, as `datasets` gives them, (samples,) float32, and their rate in
    Hz.

    Args:
        decoder: has `get_all_samples()`, whose `data` are (channels, samples) and whose `sample_rate` is in Hz.
        channel, max_seconds: as of [`load_audio`]; the length is checked before anything is decoded where the decoder
            knows it.

    Raises:
        AudioFileError: too long, or no such channel.
    """
    seconds = getattr(getattr(decoder, "metadata", None), "duration_seconds", None)
    if seconds is not None and seconds > max_seconds:
        raise AudioFileError(f"the audio lasts {seconds:.7g} s; an utterance lasts up to {max_seconds:g} s{_CUT}")
    decoded = decoder.get_all_samples()
    samples = np.asarray(decoded.data, dtype=np.float32)
    samples = samples[None] if samples.ndim == 1 else samples  # (channels, samples)
    chosen = _checked_channel("the audio", channel, len(samples))
    if chosen is None and len(samples) > 1 and _channels_differ(samples.T):
        _warn_of_channels("the audio", len(samples))
    return samples.mean(axis=0) if chosen is None else samples[chosen - 1], int(decoded.sample_rate)


class Recording:
    """An open audio file, read a stretch at a time, so that memory does not depend on its length. A context manager.

    Args:
        source: the path of a local file of up to 4 hours, the bytes of one, or a binary file object.
        channel: the one to read where `read` names none, counted from 1; None: the average of all.

    Attributes:
        name: of the file, for messages.
        frames, seconds, sampling_rate, channels: of the sound in it; frames are samples of each channel.
        holds_integers: whether its samples are integers and not compressed.

    Raises:
        AudioFileError: the file is missing, damaged, truncated or out of bounds, or has no such channel.
    """

    def __init__(self, source: Any, channel: int | None = None):
        self.name, self._source = _name_and_source(source)
        self._sound = _Sound(self._source, self.name)
        self.frames, self.sampling_rate = self._sound.frames, self._sound.samplerate
        self.channels: int = self._sound.channels
        self.seconds = self.frames / max(self.sampling_rate, 1)
        self.holds_integers = self._sound.format != "FLAC" and self._sound.subtype.startswith("PCM")
        self._may_warn = True
        try:
            self._check_header()
            self._channel = self.checked_channel(channel)
        except AudioFileError:
            self.close()
            raise

    def checked_channel(self, channel: Any) -> int | None:
        """A channel of this file as an int, None for None; `AudioFileError` where there is none of this number."""
        return _checked_channel(self.name, channel, self.channels)

    def several_channels(self) -> range:
        """The numbers of the channels, to split them; `ValueError` where there is one, or one was chosen."""
        if self._channel is not None:
            raise ValueError("channel takes one channel, splitting takes all; give one of them")
        if self.channels == 1:
            raise ValueError(f"{self.name} has 1 channel; there is nothing to split")
        return range(1, self.channels + 1)

    def check_length(self, start: float | None, end: float | None, max_seconds: float) -> float:
        """Seconds of a stretch; `AudioFileError` where it is not in the file, is shorter than 25 ms, or is too long."""
        first, last = self._stretch(start, end)
        seconds = (last - first) / self.sampling_rate
        if not MIN_SECONDS <= seconds <= max_seconds:
            raise AudioFileError(
                f"{self._place(first, last)} lasts {seconds:.7g} s; an utterance lasts {MIN_SECONDS:g} to "
                f"{max_seconds:g} s{_CUT if seconds > max_seconds else ''}"
            )
        return seconds

    def read(self, start: float | None = None, end: float | None = None, channel: int | None = None) -> np.ndarray:
        """The stretch between two times in seconds, (samples,) float32 at 16 kHz; for the rest see [`load_audio`]."""
        waveform, rate = self.decode(start, end, channel), self.sampling_rate
        return waveform if rate == SAMPLING_RATE else resampled(waveform, rate, SAMPLING_RATE)

    def decode(self, start: float | None = None, end: float | None = None, channel: int | None = None) -> np.ndarray:
        """As `read`, at the file's own sampling rate."""
        first, last = self._stretch(start, end)
        waveform = self._mono(self._sound.read(first, last - first), channel)
        place = self._place(first, last)
        peak = float(np.abs(waveform).max())
        if not peak <= MAX_PEAK:
            raise AudioFileError(f"{place} has a peak of {peak:g}; samples must be finite and within [-1, 1]")
        return waveform

    def blocks(self, size: int, channel: int | None = None) -> Iterator[np.ndarray]:
        """The recording from its beginning in blocks of `size` samples at 16 kHz, float32; the last is shorter.

        The file is opened once more, so that `read` may be called between two blocks.
        """
        left = np.zeros(0, dtype=np.float32)
        resample = streaming_resampler(self.sampling_rate)
        sound = _Sound(self._source, self.name)
        try:
            for first in [*range(0, self.frames, self.sampling_rate), self.frames]:
                waveform = self._mono(sound.read(first, min(self.sampling_rate, self.frames - first)), channel)
                left = np.concatenate([left, resample(waveform, first == self.frames)])
                for begin in range(0, len(left) - size + 1, size):
                    yield left[begin : begin + size]
                left = left[len(left) // size * size :]
        finally:
            sound.close()
        if len(left):
            yield left

    def close(self) -> None:
        self._sound.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_header(self) -> None:
        low, high = RATE_RANGE
        if self.frames == 0:
            raise AudioFileError(f"{self.name} holds no samples")
        if not low <= self.sampling_rate <= high:
            raise AudioFileError(f"{self.name} claims {self.sampling_rate} Hz; allowed are {low} to {high} Hz")
        if self.channels > MAX_CHANNELS:
            raise AudioFileError(f"{self.name} has {self.channels} channels; allowed are up to {MAX_CHANNELS}")
        if self.seconds > MAX_SECONDS:
            raise AudioFileError(f"{self.name} claims {self.seconds:.0f} s; allowed are {MAX_SECONDS:.0f} s")

    def _stretch(self, start: float | None, end: float | None) -> tuple[int, int]:
        """First sample of a stretch, and the one behind its last, at the file's own rate."""
        lasts = f"{self.name} lasts {self.seconds:.3f} s"
        if not all(time is None or math.isfinite(time) for time in (start, end)):
            raise AudioFileError(f"{lasts}; there is nothing between {start} and {end} s")
        first = 0 if start is None else round(start * self.sampling_rate)
        last = self.frames if end is None else min(round(end * self.sampling_rate), self.frames)
        if not 0 <= first < last:
            raise AudioFileError(f"{lasts}; there is nothing between {start} and {end} s")
        if end is not None and end > self.seconds + END_TOLERANCE:
            raise AudioFileError(f"{lasts}, but an utterance in it should end at {end:.3f} s")
        return first, last

    def _place(self, first: int, last: int) -> str:
        """The file, or the stretch of it, for messages."""
        if (first, last) == (0, self.frames):
            return self.name
        return f"{self.name} at {first / self.sampling_rate:.3f} to {last / self.sampling_rate:.3f} s"

    def _mono(self, samples: np.ndarray, channel: int | None) -> np.ndarray:
        """(frames, channels) -> (frames,) of one channel, or of the average."""
        chosen = self._channel if channel is None else self.checked_channel(channel)
        if self.channels == 1:
            return samples[:, 0]
        if chosen is not None:
            return np.ascontiguousarray(samples[:, chosen - 1])
        if self._may_warn and _channels_differ(samples):
            self._may_warn = False
            _warn_of_channels(self.name, self.channels)
        return samples.mean(axis=1)


class _Sound:
    """The sound of a file, all its streams one after the other: of `soundfile.SoundFile`, what `Recording` uses."""

    def __init__(self, source: Path | bytes, name: str):
        self._name = name
        try:
            self._stream = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
        except OSError as error:
            raise AudioFileError(f"{name} cannot be opened: {error.strerror}") from error
        self._decoders: list[_Decoder] = []
        try:
            _require_decoder(self._stream, name)
            for part in _parts(self._stream, source):
                self._decoders.append(_Decoder(functools.partial(_open, View(self._stream, part.pieces), name), part))
        except (ValueError, OSError) as error:
            self.close()
            raise error if isinstance(error, AudioFileError) else AudioFileError(f"{name} {error}") from error
        except RuntimeError as error:
            self.close()
            raise AudioFileError(f"{name} cannot be decoded: {_reason(error)}") from error
        first = self._decoders[0].file
        self.samplerate, self.channels = first.samplerate, first.channels
        self.format, self.subtype = first.format, first.subtype
        self.frames = sum(decoder.frames for decoder in self._decoders)
        kinds = {(decoder.file.samplerate, decoder.file.channels) for decoder in self._decoders}
        if len(kinds) > 1:
            self.close()
            (rate, channels), (other_rate, other_channels) = sorted(kinds)[:2]
            raise AudioFileError(
                f"{name} holds recordings of different kinds one after the other: {channels} channel(s) at {rate} Hz, "
                f"{other_channels} at {other_rate} Hz; make a file of each"
            )

    def read(self, first: int, frames: int) -> np.ndarray:
        """(frames, channels) float32 from a frame on; fewer where the sound ends, an error where it ends too early."""
        found = []
        for decoder in self._decoders:
            count = min(decoder.frames - first, frames)
            if count > 0:
                try:
                    found.append(decoder.read(first, count))
                except (RuntimeError, OSError) as error:  # soundfile.LibsndfileError is a RuntimeError
                    raise AudioFileError(f"{self._name} cannot be decoded: {_reason(error)}") from error
                if len(found[-1]) < count:
                    counts = f"{first + len(found[-1])} of {decoder.frames} samples were found"
                    raise AudioFileError(f"{self._name} is truncated: {counts}; copy the file again")
                frames, first = frames - count, 0
            else:
                first -= decoder.frames if first >= decoder.frames else 0
        return found[0] if len(found) == 1 else np.concatenate([np.zeros((0, self.channels), np.float32), *found])

    def close(self) -> None:
        for decoder in self._decoders:
            decoder.file.close()
        self._stream.close()


class _Decoder:
    """One stream of sound, from any place on."""

    def __init__(self, open_file: Callable[[], Any], part: Part):
        self._open_file, self._skip = open_file, part.skip
        self.file = open_file()
        self.can_seek = self.file.seekable()
        self._warm_up = round(WARM_UP_SECONDS.get(self.file.format, 0.0) * self.file.samplerate)
        self._go_on_without_seeking()
        self._at = 0  # of the file
        self.frames: int = self.file.frames if part.frames is None else part.frames
        if self.file.frames < self.frames + part.skip:  # libsndfile would stop at its own guess
            raise ValueError("has a length that cannot be known; convert it, such as by ffmpeg -i IN out.wav")
        if self.frames >= UNKNOWN_FRAMES:
            self.can_seek = False
            while self._read(self.file.samplerate).size:
                pass
            self.frames = self._at

    def read(self, first: int, frames: int) -> np.ndarray:
        """(frames, channels) float32 from a frame on; fewer where the stream ends.

        A format that cannot seek is read up to there, again from its beginning if need be. One that needs what comes
        before, as MP3 does, is given it.
        """
        wanted = first + self._skip
        if self.can_seek and not wanted - self._warm_up <= self._at <= wanted:
            self._at = max(wanted - self._warm_up, 0)
            self.file.seek(self._at)
        elif wanted < self._at:
            self.file.close()
            self.file, self._at = self._open_file(), 0
            self._go_on_without_seeking()
        while self._at < wanted:
            passed = len(self._read(min(wanted - self._at, self.file.samplerate)))
            if not passed:
                break
        return self._read(frames)

    def _read(self, frames: int) -> np.ndarray:
        found = self.file.read(frames, dtype="float32", always_2d=True)
        self._at += len(found)
        return found

    def _go_on_without_seeking(self) -> None:
        # Else soundfile seeks after each read to where it is, by which an MP3's next frames lose those before them.
        self.file.seekable = lambda: False


def _checked_channel(name: str, channel: Any, channels: int) -> int | None:
    if channel is None:
        return None
    number = whole_number(channel)
    if number is None or not 1 <= number <= channels:
        has = "1 channel" if channels == 1 else f"the channels 1 to {channels}"
        raise AudioFileError(f"{name} has {has}, no channel {channel}")
    return number


def _warn_of_channels(name: str, channels: int) -> None:
    warnings.warn(
        f"{name}: its {channels} channels hold different sound, as where each speaker has a channel; their average is "
        "used. channel=1 (--channel 1 of a command) takes one of them, split_channels (--split-channels) each as a "
        "speaker",
        stacklevel=2,
    )


def _name_and_source(source: Any) -> tuple[str, Path | bytes]:
    """A name for messages, which holds no folder, and a path or the content of a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "the audio", bytes(source)
    if hasattr(source, "read"):
        return "the audio", _content("the audio", source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"audio is given as {type(source).__name__}; a path, bytes or a binary file object is needed")
    if "://" in str(source):
        raise AudioFileError("the audio is a URL; only local files are opened: download it first")
    path = Path(source)
    name = (path.name or str(path)) if len(path.name) <= 60 else f"{path.name[:40]}…{path.suffix[:10]}"
    try:
        if path.is_file():
            return name, path
        if path.is_fifo():
            with path.open("rb") as pipe:
                return name, _content(name, pipe)
        what = "is a folder, no audio file" if path.is_dir() else "is neither a file nor a pipe"
        what = what if path.exists() else f"does not exist (looked in {path.parent})"
    except OSError as error:
        what = f"cannot be opened: {error.strerror}"
    raise AudioFileError(f"{name} {what}")


def _content(name: str, file: Any) -> bytes:
    """What is left of an open file or pipe, which may give it in portions."""
    content = bytearray()
    while portion := file.read(MAX_PIPE_BYTES + 1 - len(content)):
        if not isinstance(portion, (bytes, bytearray)):
            raise TypeError(f"{name} is an open file of text; open it in the mode 'rb'")
        content += portion
        if len(content) > MAX_PIPE_BYTES:
            raise AudioFileError(f"{name} gives more than {MAX_PIPE_BYTES} bytes; save it as a file")
    return bytes(content)


def _file(source: Any) -> Any:
    """A source that can be read again; `AudioFileError` for a pipe."""
    if isinstance(source, (str, os.PathLike)) and Path(source).is_fifo():
        raise AudioFileError(f"{Path(source).name} is a pipe, which can be read once only; save it as a file")
    return source


def _parts(stream: Any, source: Path | bytes) -> tuple[Part, ...]:
    """As `parts_of`; a file that is read stretch by stretch is looked through once."""
    if isinstance(source, bytes):
        return parts_of(stream)
    facts = source.stat()
    return _parts_of_file(source.absolute(), facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=4_096)
def _parts_of_file(path: Path, size: int, changed: int) -> tuple[Part, ...]:
    with path.open("rb") as stream:
        return parts_of(stream)


def _soundfile() -> Any:
    """The module, or None."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: its C library is missing
        return None
    return soundfile


def _require_decoder(stream: Any, name: str) -> None:
    head = stream.read(12)
    if _soundfile() is None and (head[:4] != b"RIFF" or head[8:] != b"WAVE"):
        raise AudioFileError(f"{name} {_ONLY_PLAIN}")


def _open(view: View, name: str) -> Any:
    """A `soundfile.SoundFile`, or what stands in for it.

    It is given no path: libsndfile would take any file that is named .au, .gsm or .vox for sound without a header.
    """
    view.seek(0)
    soundfile = _soundfile()
    if soundfile is None:
        return _PlainWave(view, name)
    try:
        return soundfile.SoundFile(view)
    except RuntimeError as error:
        raise AudioFileError(f"{name} is no audio file that can be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What libsndfile says is wrong, without the path, which its own sentence begins with."""
    return str(getattr(error, "error_string", error)).rstrip(".")


def _channels_differ(samples: np.ndarray) -> bool:
    """Whether the channels of (frames, channels) that are not silent hold different sound."""
    products = samples.T @ samples  # (channels, channels)
    power = np.diagonal(products)
    loud = power > LOUD_SHARE * power.max(initial=0.0)
    power, products = power[loud], products[loud][:, loud]
    return bool((products < MIN_CORRELATION * np.sqrt(np.outer(power, power))).any())


def streaming_resampler(rate: int) -> Any:
    """A function of the next samples and whether they are the last, that returns samples at 16 kHz."""
    if rate == SAMPLING_RATE:
        return lambda waveform, last: waveform
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"converting {rate} Hz to {SAMPLING_RATE} Hz needs soxr: pip install soxr") from error
    stream = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32")
    return lambda waveform, last: stream.resample_chunk(waveform, last=last)


class _PlainWave:
    """PCM WAV read by the standard library: of `soundfile.SoundFile`, what `Recording` uses."""

    format, subtype = "WAV", "PCM"

    def __init__(self, view: View, name: str):
        try:
            self._wave = wave.open(cast(Any, view))  # noqa: SIM115
        except (wave.Error, EOFError) as error:
            raise AudioFileError(f"{name} {_ONLY_PLAIN}") from error
        self.channels, self._width, self.samplerate, self.frames = self._wave.getparams()[:4]
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
