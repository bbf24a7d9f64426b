"""Speech in the formats that people have, written by libsndfile and by ffmpeg, and what ffmpeg decodes of it."""

import io
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import soundfile as sf

from modeling_mamba_ema.sample import load_sample_conversation

RATE = 16_000
SPEECH = load_sample_conversation()[0]["waveform"][: round(1.2 * RATE)]  # (samples,) float32 at 16 kHz


@dataclass(frozen=True)
class Format:
    """
    Attributes:
        parts: the content of the file, one piece or several files one after the other.
        tolerance: relative RMS error that a decoder's rounding may make.
        by_ffmpeg: whether ffmpeg decodes it; else the speech itself is what is compared with.
    """

    parts: Callable[[], tuple[bytes, ...]]
    tolerance: float = 1e-5
    by_ffmpeg: bool = True

    @property
    def content(self) -> bytes:
        return b"".join(self.parts())

    def samples(self, rate: int) -> np.ndarray:
        """(samples,) float32: what it holds, by an independent decoder where there is one."""
        if not self.by_ffmpeg:
            return SPEECH
        return np.concatenate([decoded_by_ffmpeg(part, rate) for part in self.parts()])


def decoded_by_ffmpeg(content: bytes, rate: int) -> np.ndarray:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        found = _ffmpeg("-i", file.name, "-f", "f32le", "-ar", str(rate), "pipe:1")
    return np.frombuffer(found, dtype="<f4")


def _ffmpeg(*arguments: str, given: bytes | None = None) -> bytes:
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *arguments]
    return subprocess.run(command, input=given, capture_output=True, check=True, timeout=120).stdout


@cache
def written(format: str, subtype: str | None = None) -> bytes:
    """By libsndfile."""
    buffer = io.BytesIO()
    sf.write(buffer, SPEECH, RATE, format=format, subtype=subtype)
    return buffer.getvalue()


@cache
def piped(*options: str) -> bytes:
    """By ffmpeg, into a pipe, where it cannot go back to write a length."""
    return _ffmpeg("-i", "pipe:0", *options, "pipe:1", given=written("WAV", "FLOAT"))


@cache
def saved(*options: str) -> bytes:
    """By ffmpeg, into a file."""
    with tempfile.NamedTemporaryFile() as file:
        _ffmpeg("-i", "pipe:0", *options, file.name, given=written("WAV", "FLOAT"))
        return Path(file.name).read_bytes()


def changed(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def without_length(content: bytes, name: bytes) -> bytes:
    """As a recorder leaves it that was killed: the length after the name of the sound's chunk is still 0."""
    return changed(content, content.index(name) + len(name), bytes(4))


def _tagged(content: bytes) -> bytes:
    """With the tags of ID3 before it and behind it."""
    return b"ID3\3\0\0\0\0\2\0" + bytes(256) + content + b"TAG".ljust(128, b"\0")


VBR, CBR = ("-q:a", "6"), ("-b:a", "64k")
NO_HEADER = ("-write_xing", "0")
MP3 = ("-ar", "44100", "-f", "mp3")
# libsndfile writes them, and ffmpeg cannot read them (right), or not with the same rounding.
_NOT_BY_FFMPEG = {"G721_32": 0.05, "G723_24": 0.05, "G723_40": 0.05}
_NOT_BY_FFMPEG |= {f"NMS_ADPCM_{bits}": 0.1 for bits in (16, 24, 32)}
_NOT_BY_FFMPEG |= {f"ALAC_{bits}": 1e-5 for bits in (16, 20, 24, 32)}  # of which ffmpeg leaves out the last packet
_ROUNDED = {"MS_ADPCM": 0.02, "IMA_ADPCM": 0.03, "OPUS": 0.02}
# Although libsndfile lists them it does not write them, or does not find a place in them.
_LEFT_OUT = {"MPEG_LAYER_I", "MPEG_LAYER_II", "WAV MPEG_LAYER_III", *(f"DWVW_{bits}" for bits in (12, 16, 24))}


def _by_libsndfile() -> dict[str, Format]:
    found = {}
    for format in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3"):
        for subtype in sf.available_subtypes(format):
            if sf.check_format(format, subtype) and not {subtype, f"{format} {subtype}"} & _LEFT_OUT:
                tolerance = _NOT_BY_FFMPEG.get(subtype, _ROUNDED.get(subtype, 1e-5))
                make = partial(lambda *kind: (written(*kind),), format, subtype)
                found[f"{format} {subtype}"] = Format(make, tolerance, subtype not in _NOT_BY_FFMPEG)
    return found


# Every subtype that libsndfile writes, and what it reads wrongly, in part or not at all when left to itself.
EVERY_SUBTYPE = _by_libsndfile()
FORMATS = {
    "mp3 vbr without header": Format(lambda: (saved(*VBR, *NO_HEADER, *MP3),)),
    "mp3 vbr": Format(lambda: (saved(*VBR, *MP3),)),
    "mp3 cbr without header": Format(lambda: (saved(*CBR, *NO_HEADER, *MP3),)),
    "mp3 cbr": Format(lambda: (saved(*CBR, *MP3),)),
    "mp3 at 16 kHz without header": Format(lambda: (saved("-b:a", "32k", *NO_HEADER, "-f", "mp3"),)),
    "mp3 from a pipe": Format(lambda: (piped(*VBR, *MP3),)),
    "mp3 tagged": Format(lambda: (_tagged(saved(*VBR, *NO_HEADER, *MP3)),)),
    "mp3 joined": Format(lambda: (saved(*VBR, *MP3), saved(*CBR, *MP3))),
    "mp3 joined, the second without header": Format(lambda: (saved(*VBR, *MP3), saved(*CBR, *NO_HEADER, *MP3))),
    "mp2": Format(lambda: (saved("-c:a", "mp2", "-f", "mp2"),), 1e-3),
    "mp3 in wav": Format(lambda: (saved(*CBR, "-ar", "44100", "-c:a", "libmp3lame", "-f", "wav"),)),
    "flac from a pipe": Format(lambda: (piped("-f", "flac"),)),
    "flac joined": Format(lambda: (written("FLAC"), written("FLAC"))),
    "ogg": Format(lambda: (saved("-c:a", "libvorbis", "-f", "ogg"),)),
    "ogg from a pipe": Format(lambda: (piped("-c:a", "libvorbis", "-f", "ogg"),)),
    "ogg joined": Format(lambda: (written("OGG"), saved("-c:a", "libvorbis", "-f", "ogg"))),
    "opus": Format(lambda: (saved("-c:a", "libopus", "-f", "opus"),), 0.02),
    "wav from a pipe": Format(lambda: (piped("-f", "wav"),)),
    "wav of a recorder that was killed": Format(lambda: (without_length(written("WAV"), b"data"),), by_ffmpeg=False),
    "aiff of a recorder that was killed": Format(lambda: (without_length(written("AIFF"), b"SSND"),), by_ffmpeg=False),
    "au from a pipe": Format(lambda: (piped("-f", "au"),)),
    "w64 from a pipe": Format(lambda: (piped("-f", "w64"),), by_ffmpeg=False),
    "rf64 from a pipe": Format(lambda: (piped("-rf64", "always", "-f", "wav"),), by_ffmpeg=False),
    "caf from a pipe": Format(lambda: (piped("-f", "caf"),)),
    **{f"wav with {name} behind": Format(lambda tail=tail: (written("WAV") + tail,), by_ffmpeg=False)
       for name, tail in {"an ID3 tag": b"TAG".ljust(128, b"\0"), "zeros": bytes(3_000)}.items()},
}  # fmt: skip
