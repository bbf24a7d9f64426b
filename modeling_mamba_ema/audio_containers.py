"""How much sound an audio file holds, and where, found in the file itself and not in what its header claims.

libsndfile believes headers: it reads an MP3 to a guessed length, the first of several streams, or what is left of a
truncated file. Here the pieces of the file that hold sound are found and counted before anything is decoded. Each
stream of sound is one [`Part`] with a header that is true; a file that is cut off or damaged is refused.

Known are WAV (with RIFX, RF64 and MP3 inside), W64, AIFF, AU, CAF, NIST SPHERE, FLAC, OGG (Vorbis, Opus) and MPEG.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

_UNKNOWN = (
    "is no audio file that can be read (WAV, W64, AIFF, AU, CAF, NIST SPHERE, FLAC, OGG, Opus and MP3 are); convert "
    "others, such as by ffmpeg -i IN out.wav"
)
_CUT_OFF = "is no audio file that can be read: its header is cut off or damaged, no sound was found"
MAX_PARTS = 1_000  # streams in one file
MAX_CHUNKS = 1_000  # of a RIFF, AIFF or CAF file
MAX_JUNK = 4_096  # bytes that may follow the sound and are no sound, such as tags
UNKNOWN_LENGTH = 0x7FFFF000  # bytes; programs that write to a pipe claim this or more
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
    head = _bytes_at(stream, at, 16)
    for magic, reader in _READERS.items():
        if head.startswith(magic):
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


def _chunks(stream: BinaryIO, at: int, size: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte inside, length inside) of each chunk of RIFF or AIFF, as long as there are names."""
    for _ in range(MAX_CHUNKS):
        name, length = _bytes_at(stream, at, 4), _bytes_at(stream, at + 4, 4)
        if not _is_name(name) or len(length) < 4:
            return
        inside = struct.unpack(f"{order}I", length)[0]
        yield name, at + 8, inside
        at += 8 + inside
        if inside % 2 and (_is_name(_bytes_at(stream, at + 1, 4)) or not _is_name(_bytes_at(stream, at, 4))):
            at += 1  # chunks of odd length are padded, although not by every program


def _is_name(name: bytes) -> bool:
    """Whether these bytes can be the name of a chunk, and are not the beginning of another file."""
    return len(name) == 4 and all(32 <= byte < 127 for byte in name) and name not in _MAGICS


def _length_of_sound(declared: int, available: int, next_is_chunk: bool, unknown: int = UNKNOWN_LENGTH) -> int:
    """Bytes of sound, where a header may not know them: it was written to a pipe, or its program was killed."""
    if declared > available and declared < unknown:
        raise _truncated(available, declared)
    if declared == 0 and next_is_chunk:
        return 0
    return min(declared or available, available)


def _riff(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """WAV: https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/WAVE/WAVE.html; RF64: EBU Tech 3306."""
    magic, order, coding, wide = _bytes_at(stream, at, 4), "<", 0, 0
    if magic == b"RIFX":
        order = ">"
    if _bytes_at(stream, at + 8, 4) != b"WAVE":
        raise ValueError("is no audio file that can be read: RIFF without WAVE")
    found = None
    for name, begin, length in _chunks(stream, at + 12, size, order):
        if name == b"ds64":
            wide = struct.unpack("<Q", _bytes_at(stream, begin + 8, 8).ljust(8, b"\0"))[0]
        elif name == b"fmt ":
            coding, bits = struct.unpack(f"{order}H12xH", _bytes_at(stream, begin, 16).ljust(16, b"\0"))
            if coding == _PCM and bits % 8:
                raise ValueError(f"claims samples of {bits} bits; allowed are whole bytes")
        elif name == b"data":
            found = begin, length
            break
    if found is None:
        raise ValueError(_CUT_OFF)
    begin, declared = found
    if magic == b"RF64" and declared == 0xFFFFFFFF:
        declared = wide
    length = _length_of_sound(declared, size - begin, _is_name(_bytes_at(stream, begin, 4)))
    end = _end_of_chunks(stream, begin + length, size, order, b"data")
    if coding in _MPEG_IN_WAV:
        return _mpeg(stream, begin, begin + length)[0], end
    if length == declared:
        return [Part(((at, end),))], end
    name = b"RIFX" if order == ">" else b"RIFF"  # also of RF64, whose 64-bit lengths do not count then
    counted = struct.pack(f"{order}I", min(length, 0xFFFFFFFF))
    return [Part((name, (at + 4, begin - 4), counted, (begin, begin + length)))], end


def _end_of_chunks(stream: BinaryIO, at: int, size: int, order: str, sound: bytes) -> int:
    """Where the chunks after the sound end."""
    if at % 2 and _is_name(_bytes_at(stream, at + 1, 4)):
        at += 1
    for name, begin, length in _chunks(stream, at, size, order):
        if name == sound:
            raise ValueError("has its sound in several chunks; write it anew, such as by ffmpeg -i IN out.wav")
        at = min(begin + length, size)
    return at


def _aiff(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """AIFF and AIFC: https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/AIFF/AIFF.html"""
    if _bytes_at(stream, at + 8, 4) not in (b"AIFF", b"AIFC"):
        raise ValueError(_UNKNOWN)
    found = next((chunk for chunk in _chunks(stream, at + 12, size, ">") if chunk[0] == b"SSND"), None)
    if found is None:
        raise ValueError(_CUT_OFF)
    _, begin, declared = found
    # Inside, 8 bytes come before the sound.
    sound = _length_of_sound(max(declared - 8, 0), size - begin - 8, _is_name(_bytes_at(stream, begin + 8, 4)))
    end = _end_of_chunks(stream, begin + 8 + sound, size, ">", b"SSND")
    if sound == declared - 8:
        return [Part(((at, end),))], end
    counted = struct.pack(">I", min(sound + 8, 0xFFFFFFFF))
    return [Part(((at, begin - 4), counted, (begin, begin + 8 + sound)))], end


def _w64(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """Sony Wave64: names of 16 bytes, lengths of 64 bits that count name and length, chunks that begin at every 8th."""
    place = at + 40
    for _ in range(MAX_CHUNKS):
        head = _bytes_at(stream, place, 24)
        if len(head) < 24:
            break
        declared = struct.unpack("<q", head[16:])[0] - 24
        if head[:4] == b"data":
            begin = place + 24
            length = _length_of_sound(max(declared, 0), size - begin, False, unknown=1 << 62)
            end = begin + length + -length % 8
            whole, counted = struct.pack("<q", begin + length - at), struct.pack("<q", length + 24)
            pieces = ((at, at + 16), whole, (at + 24, begin - 8), counted, (begin, begin + length))
            return [Part(pieces)], _end_of_w64(stream, end, size)
        place += 24 + max(declared, 0) + -max(declared, 0) % 8
    raise ValueError(_CUT_OFF)


def _end_of_w64(stream: BinaryIO, at: int, size: int) -> int:
    for _ in range(MAX_CHUNKS):
        head = _bytes_at(stream, at, 24)
        if len(head) < 24 or not _is_name(head[:4]) or head[:16] == _W64:
            break
        length = max(struct.unpack("<q", head[16:])[0], 24)
        at += length + -length % 8
    return min(at, size)


def _caf(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """Apple Core Audio Format: lengths of 64 bits, -1 where the sound goes on to the end of the file."""
    place, found = at + 8, None
    for _ in range(MAX_CHUNKS):
        head = _bytes_at(stream, place, 12)
        if len(head) < 12 or not _is_name(head[:4]):
            break
        declared, begin = struct.unpack(">q", head[4:])[0], place + 12
        length = declared
        if head[:4] == b"data":
            unknown = declared in (-1, 0)
            length = size - begin if unknown else _length_of_sound(declared, size - begin, False, unknown=1 << 62)
            found = begin, length, declared
        if length < 0 or begin + length > size:
            raise ValueError("is no audio file that can be read: its header is damaged")
        place = begin + length
    if found is None:
        raise ValueError(_CUT_OFF)
    begin, length, declared = found
    if length == declared:
        return [Part(((at, place),))], place
    return [Part(((at, begin - 8), struct.pack(">q", length), (begin, place)))], place


def _au(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """Sun and NeXT: https://pubs.opengroup.org/external/auformat.html; `dns.` where bytes are swapped."""
    head = _bytes_at(stream, at, 24).ljust(24, b"\0")
    begin, declared = struct.unpack(f"{'>' if head[:4] == b'.snd' else '<'}4xII", head[:12])
    length = _length_of_sound(declared, max(size - at - begin, 0), False)
    end = at + begin + length
    if length == declared:
        return [Part(((at, end),))], end
    return [Part((head[:8] + b"\xff" * 4, (at + 12, end)))], end


def _nist(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """NIST SPHERE: a header of lines such as `sample_count -i 16000`, as in corpora of the LDC."""
    lines = _bytes_at(stream, at, 1_024).split(b"\n")
    fields = {parts[0]: parts[2] for parts in (line.split(None, 2) for line in lines) if len(parts) == 3}
    try:
        begin = at + int(lines[1])
        counts = [int(fields[name]) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError("is no audio file that can be read: the header of its SPHERE format is damaged") from error
    length = counts[0] * counts[1] * counts[2]
    if b"shorten" in fields.get(b"sample_coding", b""):
        raise ValueError("is no audio file that can be read: SPHERE with Shorten; convert it by sph2pipe")
    if not 0 <= length <= size - begin:
        raise _truncated(max(size - begin, 0), length)
    return [Part(((at, begin + length),))], begin + length


# FLAC: RFC 9639


def _flac(stream: BinaryIO, at: int, size: int) -> tuple[list[Part], int]:
    """A stream whose header is given its number of samples where its writer could not know it, as into a pipe."""
    first, last = at + 4, False
    while not last:
        head = _bytes_at(stream, first, 4)
        if len(head) < 4:
            raise ValueError("is no audio file that can be read: its FLAC header is cut off")
        last, first = bool(head[0] & 0x80), first + 4 + int.from_bytes(head[1:], "big")
    info = _bytes_at(stream, at + 8, 34)  # STREAMINFO is always the first block
    end = _find(stream, b"fLaC\0\0\0\x22", first, size)
    counted = int.from_bytes(info[10:18], "big")
    declared = counted & (1 << 36) - 1
    found = _flac_samples(stream, first, end, info, declared)
    if found is None and declared == 0:
        raise ValueError("does not say how long it is, and its last frame is cut off; copy the file again")
    if found is None or found == declared:
        return [Part(((at, end),))], end
    if found < declared:
        raise _truncated(found, declared, "samples")
    patched = (counted - declared + found).to_bytes(8, "big")
    return [Part((_bytes_at(stream, at, 18) + patched, (at + 26, end)))], end


def _flac_samples(stream: BinaryIO, first: int, end: int, info: bytes, declared: int) -> int | None:
    """Samples up to the end of the last frame; None where the file does not end with a whole frame."""
    longest = int.from_bytes(info[7:10], "big") or 1 << 20  # bytes of a frame
    if _bytes_at(stream, end - 128, 3) == b"TAG":
        end -= 128
    begin = max(first, end - min(longest, _BUFFER))
    tail, budget = _bytes_at(stream, begin, end - begin), _BUFFER
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        samples = _samples_after_flac_frame(tail[at : at + 16], int.from_bytes(info[:2], "big"))
        # The second checksum takes a thousand times as long, and nothing is to be found out where the first agrees.
        if samples == declared:
            return samples
        if samples is not None and (budget := budget - len(tail) + at) > 0 and _crc(tail[at:], 0x8005, 16) == 0:
            return samples
    return None


def _samples_after_flac_frame(head: bytes, block_size: int) -> int | None:
    """The number of samples up to the end of the frame that begins here; None where none begins."""
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xFE != 0xF8:
        return None
    code, more = head[2] >> 4, max(8 - (head[4] ^ 0xFF).bit_length() - 1, 0)  # bytes after the number's first one
    number = head[4] & 0x7F >> more
    for byte in head[5 : 5 + more]:
        number = number << 6 | byte & 0x3F
    at = 5 + more
    width = {6: 1, 7: 2}.get(code, 0)  # of the block's size, where it stands at the end of the header
    extra = int.from_bytes(head[at : at + width], "big") + 1
    at += width + {12: 1, 13: 2, 14: 2}.get(head[2] & 0xF, 0)
    if code == 0 or at >= len(head) or _crc(head[: at + 1], 0x07, 8):
        return None
    own = 192 if code == 1 else 576 << code - 2 if code < 6 else extra if code < 8 else 256 << code - 8
    return number + own if head[1] & 1 else number * block_size + own


def _crc(content: bytes, polynomial: int, width: int) -> int:
    """Of FLAC; 0 over bytes that end with their own."""
    table, register, mask = _crc_table(polynomial, width), 0, (1 << width) - 1
    for byte in content:
        register = register << 8 & mask ^ table[register >> width - 8 ^ byte]
    return register


@functools.cache
def _crc_table(polynomial: int, width: int) -> tuple[int, ...]:
    table, top = [], 1 << width - 1
    for byte in range(256):
        register = byte << width - 8
        for _ in range(8):
            register = (register << 1 ^ polynomial if register & top else register << 1) & (1 << width) - 1
        table.append(register)
    return tuple(table)


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


# MPEG audio, layers I to III: ISO 11172-3 and 13818-3


@dataclass(frozen=True)
class _Frame:
    """What a frame's header says; `kind` is the same for all frames of a stream."""

    kind: tuple[int, int, int, int]  # version, layer, rate, channels
    bytes: int

    @property
    def samples(self) -> int:
        version, layer, *_ = self.kind
        return 384 if layer == 1 else 576 if layer == 3 and version > 1 else 1152

    @property
    def info_at(self) -> int:
        """Byte at which an information frame has its name: after header and side information."""
        version, _, _, channels = self.kind
        return 4 + ((32, 17) if version == 1 else (17, 9))[channels == 1]


def _mpeg_frame(head: bytes) -> _Frame | None:
    word = int.from_bytes(head[:4], "big")
    version, layer = {3: 1, 2: 2, 0: 3}.get(word >> 19 & 3), 4 - (word >> 17 & 3)  # 3: MPEG-2.5
    bit_rate, rate = word >> 12 & 15, word >> 10 & 3
    if len(head) < 4 or word >> 21 != 0x7FF or version is None or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return None
    kilobits = _KILOBITS[min(version, 2) - 1][layer - 1][bit_rate - 1]
    hertz, padding = _MPEG_RATES[rate] >> version - 1, word >> 9 & 1
    if layer == 1:
        size = (12_000 * kilobits // hertz + padding) * 4
    else:
        size = (72_000 if layer == 3 and version > 1 else 144_000) * kilobits // hertz + padding
    return _Frame((version, layer, hertz, 1 if word >> 6 & 3 == 3 else 2), size)


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
    trusted = _trusted_end(stream, start, size)
    if trusted is not None:
        return [Part(((start, trusted),))], trusted
    streams: list[_MpegStream] = []
    at = start
    while True:
        begin = at
        for place, frame, head in _mpeg_frames(stream, at, size):
            declared = _declared_frames(frame, head)
            if len(streams) > MAX_PARTS:
                break
            if declared is not None or not streams or frame.kind != streams[-1].first.kind:
                if streams:
                    streams[-1].ranges.append((begin, place))
                streams.append(_MpegStream(frame, head, declared))
                begin = place
            streams[-1].frames += declared is None
            at = place + frame.bytes
        streams[-1].ranges.append((begin, at))
        if len(streams) + len(streams[-1].ranges) > MAX_PARTS:
            raise ValueError(f"is cut into more than {MAX_PARTS} pieces")
        after = _after_tags(stream, at, size)
        if after == at or _first_mpeg_frame(stream, after, size, 1) is None:
            break
        at = after
    if _first_mpeg_frame(stream, at, size, _BUFFER) is not None:
        raise ValueError(f"is damaged at byte {at}; copy the file again")
    return [stream.part() for stream in streams if stream.frames], at


@dataclass
class _MpegStream:
    """What was found of one stream: its first frame, the bytes of that, the frames that it names, what there is."""

    first: _Frame
    head: bytes
    declared: int | None
    frames: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def part(self) -> Part:
        if self.declared is not None and self.frames < self.declared - 1:  # some count the information frame too
            raise _truncated(self.frames, self.declared, "MPEG frames")
        ranges, samples = self.ranges, self.frames * self.first.samples
        if self.declared is not None:
            if self.frames <= self.declared + 1 and self.head[36:40] != b"VBRI":  # which libmpg123 does not read
                return Part(tuple(ranges))
            (begin, end), *others = ranges
            ranges = [(begin + self.first.bytes, end), *others]
        if self.first.kind[1] < 3:
            # Information frames are for layer III. The others are of constant bit rate, whose length is guessed well
            # from the bytes; some more of them make up for rounding.
            return Part((*ranges, bytes(_MAX_MPEG_FRAME)), samples)
        # After an information frame libmpg123 leaves out the delay of a decoder, here of a frame of silence.
        silence, information = _information_frames(self.first, self.head, self.frames + 1)
        return Part((information, silence, *ranges), samples, skip=self.first.samples - _DECODER_DELAY)


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


def _trusted_end(stream: BinaryIO, at: int, size: int) -> int | None:
    """Where a stream ends whose information frame names its bytes, and whose file ends or goes on right there."""
    head = _bytes_at(stream, at, _INFO_BYTES)
    frame = _mpeg_frame(head)
    assert frame is not None
    if not _declared_frames(frame, head) or head[36:40] == b"VBRI" or head[frame.info_at + 7] & 3 != 3:
        return None
    end = at + int.from_bytes(head[frame.info_at + 12 : frame.info_at + 16], "big")
    if at + frame.bytes < end <= size and (_after_tags(stream, end, size) == size):
        return end
    return None


def _information_frames(like: _Frame, head: bytes, frames: int) -> tuple[bytes, bytes]:
    """A frame of silence, and one that names a number of frames, of 64 kbit/s, where the name has room."""
    bits = int.from_bytes(head[:4], "big") & ~(0xF << 12 | 1 << 9) | 1 << 16  # no padding, no checksum
    kilobits = _KILOBITS[min(like.kind[0], 2) - 1][2]
    bits |= (kilobits.index(64) + 1) << 12
    header = bits.to_bytes(4, "big")
    frame = _mpeg_frame(header)
    assert frame is not None
    silence = header.ljust(frame.bytes, b"\0")
    named = b"Info" + struct.pack(">II", 1, frames)
    return silence, silence[: like.info_at] + named + silence[like.info_at + len(named) :]


_PCM, _MPEG_IN_WAV = 1, (0x50, 0x55)
_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_READERS = {
    b"RIFF": _riff,
    b"RIFX": _riff,
    b"RF64": _riff,
    _W64: _w64,
    b"FORM": _aiff,
    b".snd": _au,
    b"dns.": _au,
    b"caff": _caf,
    b"NIST_1A": _nist,
    b"fLaC": _flac,
    b"OggS": _ogg,
}
_MAGICS = {magic[:4] for magic in _READERS}
_INFO_BYTES = 64  # of a frame, that hold what an information frame says
_MAX_MPEG_FRAME = 2_881  # bytes
_DECODER_DELAY = 529  # samples, of layer III
_MPEG_RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG-1; MPEG-2 has half of it, MPEG-2.5 a quarter
_LOW_KILOBITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
# kbit/s of MPEG-1 and of MPEG-2, by layer and by the number in the header, from 1
_KILOBITS = (
    (
        (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
        (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
        (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    ),
    ((32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256), _LOW_KILOBITS, _LOW_KILOBITS),
)

__all__ = ["Part", "View", "parts_of"]
