"""How much sound an audio file holds, and where, found in the file itself and not in what its header claims.

libsndfile believes headers: it reads an MP3 to a guessed length, the first of several streams, what is left of a
truncated file, and nothing of a WAV whose recorder was killed. Here the pieces of a file that hold sound are found and
counted before anything is decoded. Each stream of sound is one [`Part`] with a header that is true; a file that is cut
off or damaged is refused. Only what libsndfile gets wrong is looked at: names, lengths and frames, no samples.
"""

import functools
import io
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast

_UNKNOWN = (
    "is no audio file that can be read (WAV, W64, AIFF, AU, CAF, NIST SPHERE, FLAC, OGG, Opus and MP3 are); convert "
    "others, such as by ffmpeg -i IN out.wav"
)
_CUT_OFF = "is no audio file that can be read: its header is cut off or damaged, no sound was found"
MAX_PARTS = 1_000  # streams in one file
MAX_CHUNKS = 1_000  # of a RIFF, AIFF or CAF file
MAX_JUNK = 4_096  # bytes that may follow the sound and are no sound, such as tags
UNKNOWN_LENGTH, UNKNOWN_LONG = 0x7FFFF000, 1 << 62  # bytes; programs that write to a pipe claim this or more
_BUFFER = 1 << 20  # bytes of a file in memory at a time

Piece = bytes | tuple[int, int]  # bytes, or a stretch of the file from a byte to another


@dataclass(frozen=True)
class Part:
    """One stream of sound.

    Attributes:
        pieces: what a decoder has to read, one after the other.
        frames: how many samples of each channel it holds, where that was counted; None: its header says so.
        skip: samples of each channel that a decoder gives before them.
    """

    pieces: tuple[Piece, ...]
    frames: int | None = None
    skip: int = 0


class View(io.RawIOBase):
    """Pieces of a file, as a file to read."""

    def __init__(self, stream: BinaryIO, pieces: tuple[Piece, ...]):
        self._stream, self._pieces = stream, pieces
        self._lengths = [len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Never raises, which libsndfile could not be told; a place before the first byte is the first byte."""
        self._at = max(0, offset + (0, self._at, sum(self._lengths))[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        target, filled, begin = memoryview(buffer).cast("B"), 0, 0
        for piece, length in zip(self._pieces, self._lengths):
            inside = self._at - begin
            if 0 <= inside < length and filled < len(target):
                count = min(length - inside, len(target) - filled)
                if isinstance(piece, bytes):
                    content = piece[inside : inside + count]
                else:
                    self._stream.seek(piece[0] + inside)
                    content = self._stream.read(count)
                target[filled : filled + len(content)] = content
                filled, self._at = filled + len(content), self._at + len(content)
                if len(content) < count:  # the file has become shorter
                    break
            begin += length
        return filled


def parts_of(stream: BinaryIO) -> tuple[Part, ...]:
    """The streams of sound in a file, in their order.

    Raises:
        ValueError: a file that is of another kind, cut off or damaged; the message goes on after the file's name.
    """
    size = stream.seek(0, io.SEEK_END)
    parts: list[Part] = []
    if _bytes_at(stream, 4, 4) in _MP4_ATOMS:  # whose MP3 frames would be read without the edit list
        raise ValueError(_UNKNOWN)
    at = _after_tags(stream, 0, size)
    while (reader := _reader(stream, at)) is not None:
        part, at = reader(stream, at, size)
        parts += part
        if len(parts) > MAX_PARTS:
            raise ValueError(f"holds more than {MAX_PARTS} recordings one after the other")
        at = _after_tags(stream, at, size)
    if not parts:
        raise ValueError(_UNKNOWN)
    if size - at > MAX_JUNK:
        raise ValueError(
            f"is damaged: {size - at} bytes after byte {at} belong to no sound that its header names. Write it anew, "
            "such as by ffmpeg -i IN out.wav"
        )
    return tuple(parts)


def _reader(stream: BinaryIO, at: int) -> Callable[[BinaryIO, int, int], tuple[list[Part], int]] | None:
    """What reads the container that begins at a byte."""
    if (reader := _READERS.get(_bytes_at(stream, at, 4))) is not None:
        return reader
    size = stream.seek(0, io.SEEK_END)
    return _mpeg if _first_mpeg_frame(stream, at, size, _MAX_MPEG_FRAME) is not None else None


def _bytes_at(stream: BinaryIO, at: int, count: int) -> bytes:
    stream.seek(at)
    return stream.read(count)


def _truncated(found: int, wanted: int, unit: str = "bytes of sound") -> ValueError:
    return ValueError(f"is truncated: {found} of {wanted} {unit} were found; copy the file again")


def _after_tags(stream: BinaryIO, at: int, size: int) -> int:
    """The first byte from a place on that belongs to no tag of ID3 or APE and is not zero."""
    for _ in range(MAX_CHUNKS):
        head = _bytes_at(stream, at, 32)
        if head[:3] == b"ID3" and len(head) >= 10:
            length = functools.reduce(lambda high, low: high << 7 | low & 0x7F, head[6:10], 0)
            at += 10 + length + (10 if head[5] & 0x10 else 0)
        elif head[:3] == b"TAG":
            at += 128
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            length, flags = struct.unpack("<I4xI", head[12:24])
            at += length + (32 if flags & 0x20000000 else 0)
        elif head[:1] == b"\0":
            zeros = _bytes_at(stream, at, _BUFFER)
            at += len(zeros) - len(zeros.lstrip(b"\0"))
        else:
            break
    return min(at, size)


# Containers of chunks: a name, a length, and what is inside.


@dataclass(frozen=True)
class _Layout:
    """How a container writes its chunks.

    Attributes:
        first: byte at which they begin.
        name: bytes of a name.
        length: of struct.
        counted: bytes of name and length that the length counts.
        step: they begin at multiples of it.
        sound: the beginning of the name of the chunk that holds the sound.
        before: bytes in that chunk before the sound.
    """

    first: int
    name: int
    length: str
    counted: int
    step: int
    sound: bytes
    before: int = 0


# WAV: https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/WAVE/WAVE.html, and RIFX with its bytes swapped
_RIFF = _Layout(12, 4, "<I", 0, 2, b"data")
_LAYOUTS = {
    b"RIFF": _RIFF,
    b"RIFX": replace(_RIFF, length=">I"),
    b"RF64": _RIFF,  # EBU Tech 3306
    b"riff": _Layout(40, 16, "<q", 24, 8, b"data"),  # Sony Wave64
    # AIFF and AIFC: https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/AIFF/AIFF.html
    b"FORM": _Layout(12, 4, ">I", 0, 2, b"SSND", before=8),
    b"caff": _Layout(8, 4, ">q", 0, 1, b"data"),  # Apple Core Audio Format
}


def _chunked(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """The chunk of sound, whose length is mended where the writer of the header did not know it."""
    magic = _bytes_at(stream, at, 4)
    layout, part, coding, wide = _LAYOUTS[magic], None, 0, 0
    width = struct.calcsize(layout.length)
    place = at + layout.first
    for _ in range(MAX_CHUNKS):
        head = _bytes_at(stream, place, layout.name + width)
        if len(head) < layout.name + width or not _is_name(head[:4]):
            break
        begin, length = place + len(head), struct.unpack(layout.length, head[layout.name :])[0] - layout.counted
        if head[:4] == b"ds64":
            wide = int.from_bytes(_bytes_at(stream, begin + 8, 8), "little")
        elif head[:4] == b"fmt ":
            coding = struct.unpack(layout.length[0] + "H", _bytes_at(stream, begin, 2).ljust(2, b"\0"))[0]
        elif head[:4] == layout.sound:
            if part is not None:
                raise ValueError("has its sound in several chunks; write it anew, such as by ffmpeg -i IN out.wav")
            first, declared, unknown = begin + layout.before, length, UNKNOWN_LENGTH if width == 4 else UNKNOWN_LONG
            if magic == b"RF64" and length == 0xFFFFFFFF:
                declared, unknown = wide, UNKNOWN_LONG
            follows = _is_name(_bytes_at(stream, first, 4))
            sound = _length_of_sound(declared - layout.before, size - first, unknown, follows) + layout.before
            # RF64 without its 64-bit lengths is RIFF. The others are named as they were.
            name = b"RIFF" if magic == b"RF64" else magic
            counted = struct.pack(layout.length, min(sound + layout.counted, (1 << 8 * width) - 1))
            part = Part((name, (at + 4, begin - width), counted, (begin, begin + sound)))
            known, length = sound == declared, sound
        elif length < 0:
            break
        place = begin + length
        padded = place + (at - place) % layout.step
        if _is_name(_bytes_at(stream, padded, 4)) or not _is_name(_bytes_at(stream, place, 4)):
            place = padded  # as not every program does
    if part is None:
        raise ValueError(_CUT_OFF)
    end = min(place, size)
    if coding in _MPEG_IN_WAV:
        begin, length = cast(tuple[int, int], part.pieces[-1])
        return _mpeg(stream, begin, length)[0], end
    # libsndfile takes what follows the sound in W64 for sound, and looks there for what else it needs in the others.
    return [Part(((at, end),)) if known and magic != b"riff" else part], end


def _is_name(name: bytes) -> bool:
    """Whether these bytes can be the name of a chunk, and are not the beginning of another file."""
    return len(name) == 4 and all(32 <= byte < 127 for byte in name) and name not in _READERS


def _length_of_sound(declared: int, available: int, unknown: int = UNKNOWN_LENGTH, next_is_chunk: bool = False) -> int:
    """Bytes of sound, where a header may not know them: it was written to a pipe, or its program was killed."""
    if available < declared < unknown:
        raise _truncated(available, declared)
    if declared <= 0 and next_is_chunk:
        return 0
    return declared if 0 < declared <= available else max(available, 0)


def _au(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """Sun and NeXT: https://pubs.opengroup.org/external/auformat.html; `dns.` where bytes are swapped."""
    head = _bytes_at(stream, at, 24).ljust(24, b"\0")
    begin, declared = struct.unpack(f"{'>' if head[:4] == b'.snd' else '<'}4xII", head[:12])
    length = _length_of_sound(declared, size - at - begin)
    end = at + begin + length
    if length == declared:
        return [Part(((at, end),))], end
    return [Part((head[:8] + b"\xff" * 4, (at + 12, end)))], end


def _nist(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """NIST SPHERE: a header of lines such as `sample_count -i 16000`, as in corpora of the LDC."""
    header = _bytes_at(stream, at, 1_024)
    if b"shorten" in header:
        raise ValueError("is no audio file that can be read: SPHERE with Shorten; convert it by sph2pipe")
    fields = dict(re.findall(rb"(\w+) -\w+ (\d{1,12})\s", header))
    try:
        begin = at + int(header.split()[1])
        length = math.prod(int(fields[name]) for name in (b"sample_count", b"channel_count", b"sample_n_bytes"))
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError("is no audio file that can be read: the header of its SPHERE format is damaged") from error
    if begin + length > size:
        raise _truncated(max(size - begin, 0), length)
    return [Part(((at, begin + length),))], begin + length


def _flac(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """Up to the next stream (RFC 9639): its first block is always of 34 bytes."""
    end = _find(stream, b"fLaC\0\0\0\x22", at + 4, size)
    return [Part(((at, end),))], end


def _find(stream: BinaryIO, what: bytes, at: int, size: int) -> int:
    """Where some bytes are found next, or the size of the file."""
    while at < size:
        content = _bytes_at(stream, at, _BUFFER + len(what) - 1)
        if (place := content.find(what)) >= 0:
            return at + place
        at += _BUFFER
    return size


# OGG: RFC 3533


def _ogg(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """Streams that follow one another; those that are interleaved, as in a video, are one part."""
    parts, begin, place, in_headers = [], at, at, True
    while (head := _bytes_at(stream, place, 27))[:4] == b"OggS":
        table = _bytes_at(stream, place + 27, head[26]) if len(head) == 27 else b""
        end = place + 27 + len(table) + sum(table)
        if len(head) < 27 or len(table) < head[26] or end > size:
            raise _truncated(size - at, end - at, "bytes (or more)")
        first = bool(head[5] & 2)
        if first and not in_headers:
            parts.append(Part(((begin, place),)))
            begin = place
        in_headers, place = first, end
    if _find(stream, b"OggS\0", place, size) < size:
        raise ValueError(f"is damaged at byte {place}; copy the file again")
    return [*parts, Part(((begin, place),))], place


# MPEG audio, layers II and III: ISO 11172-3 and 13818-3


@dataclass(frozen=True)
class _Frame:
    """What a frame's header says; `kind` is the same for all frames of a stream."""

    kind: tuple[int, int, int, int]  # version, layer, rate, channels
    bytes: int

    @property
    def samples(self) -> int:
        version, layer, *_ = self.kind
        return 576 if layer == 3 and version > 1 else 1152

    @property
    def info_at(self) -> int:
        """Byte at which an information frame has its name: after header and side information."""
        version, _, _, channels = self.kind
        return 4 + ((32, 17) if version == 1 else (17, 9))[channels == 1]


def _mpeg_frame(head: bytes) -> _Frame | None:
    word = int.from_bytes(head[:4], "big")
    version, layer = {3: 1, 2: 2, 0: 3}.get(word >> 19 & 3), 4 - (word >> 17 & 3)  # 3: MPEG-2.5
    bit_rate, rate = word >> 12 & 15, word >> 10 & 3
    if len(head) < 4 or word >> 21 != 0x7FF or not version or layer not in (2, 3) or bit_rate in (0, 15) or rate == 3:
        return None
    hertz = _MPEG_RATES[rate] >> version - 1
    frame = _Frame((version, layer, hertz, 1 if word >> 6 & 3 == 3 else 2), 0)
    kilobits = _KILOBITS.get((version, layer), _LOW_KILOBITS)[bit_rate - 1]
    return replace(frame, bytes=frame.samples * 125 * kilobits // hertz + (word >> 9 & 1))


def _mpeg_frames(stream: BinaryIO, at: int, size: int) -> Iterator[tuple[int, _Frame, bytes]]:
    """(place, header, its first bytes) of the frames that follow one another from a place on, each whole."""
    base, buffer, whole = at, b"", stream.seek(0, io.SEEK_END)
    while True:
        if (at + _INFO_BYTES > base + len(buffer) and base + len(buffer) < whole) or at < base:
            base, buffer = at, _bytes_at(stream, at, _BUFFER)
        head = buffer[at - base : at - base + _INFO_BYTES]
        frame = _mpeg_frame(head)
        if frame is None or at + frame.bytes > size:
            return
        yield at, frame, head
        at += frame.bytes


def _first_mpeg_frame(stream: BinaryIO, at: int, size: int, within: int) -> int | None:
    """Where frames of one kind begin: three that follow one another, or all up to the end from this very place."""
    content = _bytes_at(stream, at, within + 3)
    place = -1
    while 0 <= (place := content.find(b"\xff", place + 1)) < within:
        first = frame = _mpeg_frame(content[place : place + 4])
        end, count = at + place, 0
        while first is not None and frame is not None and frame.kind == first.kind and count < 3:
            end, count = end + frame.bytes, count + 1
            frame = _mpeg_frame(_bytes_at(stream, end, 4))
        if end <= size and (count == 3 or (count and place == 0 and _after_tags(stream, end, size) == size)):
            return at + place
    return None


def _mpeg(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """Streams whose information frames (Xing, Info, VBRI) name their number of frames, and are given one otherwise.

    Whoever encoded from a pipe, cut a file or joined several left no such frame, or a wrong one.
    """
    start = _first_mpeg_frame(stream, at, size, _MAX_MPEG_FRAME)
    if start is None:
        raise ValueError(_UNKNOWN)
    streams: list[_MpegStream] = []
    while start is not None:
        for at, frame, head in _mpeg_frames(stream, start, size):
            declared = _declared_frames(frame, head)
            if declared is not None or not streams or frame.kind != streams[-1].first.kind:
                streams.append(_MpegStream(frame, head, declared, frames=0 if declared is None else -1))
            streams[-1].add(at, at + frame.bytes)
            if len(streams) + len(streams[-1].ranges) > MAX_PARTS:
                raise ValueError(f"is cut into more than {MAX_PARTS} pieces")
        at += frame.bytes
        after = _after_tags(stream, at, size)
        start = _first_mpeg_frame(stream, after, size, 1) if after > at else None
    if _first_mpeg_frame(stream, at, size, _BUFFER) is not None:
        raise ValueError(f"is damaged at byte {at}; copy the file again")
    return [part for one in streams for part in one.parts()], at


@dataclass
class _MpegStream:
    """What was found of one stream.

    Attributes:
        first: its first frame.
        head: the bytes that frame begins with.
        declared: where that is an information frame, the number of frames that it names; 0: none.
        ranges: where its frames are, with the information frame.
        frames: how many they are, without it.
        surplus: where the first of them begins that is more than was declared.
    """

    first: _Frame
    head: bytes
    declared: int | None
    ranges: list[tuple[int, int]] = field(default_factory=list)
    frames: int = 0
    surplus: int = 0

    def add(self, begin: int, end: int) -> None:
        if self.frames == self.declared:
            self.surplus = begin
        self.frames += 1
        if self.ranges and self.ranges[-1][1] == begin:
            begin, _ = self.ranges.pop()
        self.ranges.append((begin, end))

    def parts(self) -> list[Part]:
        if self.declared and self.frames < self.declared - 1:  # some count the information frame too
            raise _truncated(self.frames, self.declared, "MPEG frames")
        if not self.declared or self.head[36:40] == b"VBRI":  # which libmpg123 does not read
            header = 0 if self.declared is None else self.first.bytes
            return self._without_header(self.ranges[0][0] + header, self.frames)
        if self.frames <= self.declared + 1:
            return [Part(tuple(self.ranges))]
        declared = [(begin, min(end, self.surplus)) for begin, end in self.ranges if begin < self.surplus]
        return [Part(tuple(declared)), *self._without_header(self.surplus, self.frames - self.declared)]

    def _without_header(self, first: int, frames: int) -> list[Part]:
        """From a byte on."""
        ranges = [(max(begin, first), end) for begin, end in self.ranges if end > first]
        samples = frames * self.first.samples
        if not frames:
            return []
        if self.first.kind[1] < 3:
            # Information frames are for layer III. Layer II is of constant bit rate, whose length is guessed well from
            # the bytes; some more of them make up for rounding.
            return [Part((*ranges, bytes(_MAX_MPEG_FRAME)), samples)]
        # After an information frame libmpg123 leaves out the delay of a decoder, here of a frame of silence.
        silence, information = _information_frames(self.first, self.head, frames + 1)
        return [Part((information, silence, *ranges), samples, skip=self.first.samples - _DECODER_DELAY)]


def _declared_frames(frame: _Frame, head: bytes) -> int | None:
    """The number of frames that an information frame names; None for a frame of sound.

    http://gabriel.mp3-tech.org/mp3infotag.html; https://www.codeproject.com/Articles/8295/MPEG-Audio-Frame-Header
    """
    if frame.kind[1] < 3:
        return None
    if head[36:40] == b"VBRI":
        return int.from_bytes(head[50:54], "big")
    name = head[frame.info_at : frame.info_at + 4]
    if name not in (b"Xing", b"Info"):
        return None
    has_frames = head[frame.info_at + 7] & 1
    return int.from_bytes(head[frame.info_at + 8 : frame.info_at + 12], "big") if has_frames else 0


def _information_frames(like: _Frame, head: bytes, frames: int) -> tuple[bytes, bytes]:
    """A frame of silence, and one that names a number of frames, of 64 kbit/s, where the name has room."""
    bits = int.from_bytes(head[:4], "big") & ~(0xF << 12 | 1 << 9) | 1 << 16  # no padding, no checksum
    kilobits = _KILOBITS.get(like.kind[:2], _LOW_KILOBITS)
    bits |= (kilobits.index(64) + 1) << 12
    header = bits.to_bytes(4, "big")
    frame = _mpeg_frame(header)
    assert frame is not None
    silence = header.ljust(frame.bytes, b"\0")
    named = b"Info" + struct.pack(">II", 1, frames)
    return silence, silence[: like.info_at] + named + silence[like.info_at + len(named) :]


_MPEG_IN_WAV = (0x50, 0x55)
_MP4_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide")  # that begin a file of MP4 or QuickTime
_READERS = {
    **dict.fromkeys(_LAYOUTS, _chunked),
    **{b".snd": _au, b"dns.": _au, b"NIST": _nist, b"fLaC": _flac, b"OggS": _ogg},
}
_INFO_BYTES = 64  # of a frame, that hold what an information frame says
_MAX_MPEG_FRAME = 2_881  # bytes
_DECODER_DELAY = 529  # samples, of layer III
_MPEG_RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG-1; MPEG-2 has half of it, MPEG-2.5 a quarter
# kbit/s by version and layer, and by the number in the header, from 1
_KILOBITS = {
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_LOW_KILOBITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # of the other versions
