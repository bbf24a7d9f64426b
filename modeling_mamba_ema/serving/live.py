"""Live audio by WebSocket: frames in, a row at the end of each turn."""

import asyncio
import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..audio_files import RATE_RANGE, streaming_resampler
from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError
from ..inference.voice_activity import TurnDetector
from .errors import Refusal, in_words
from .service import Service

SILENT_SECONDS = 60.0  # without a frame, after which a connection is closed
TELEPHONE_RATE = 8_000  # Hz (ITU-T G.711)
OPUS_RATE = 48_000  # Hz, of every Opus decoder (RFC 6716, section 2)
GOING_AWAY, REFUSED, TRY_LATER = 1001, 1008, 1013  # RFC 6455, section 7.4.1, and its registry
END = '{"end": true}'


class LiveSettings(BaseModel):
    """The first message.

    Attributes:
        encoding: of the frames, of one channel: 16-bit little-endian samples; 8 bits a sample of a telephone line, by
            mu-law or A-law (ITU-T G.711); or Opus packets.
        sampling_rate: of the samples, in Hz; by default 16000, of mu-law and A-law 8000. Of no meaning for Opus.
        speaker: who speaks on this connection.
        partial_seconds: also send what was heard so far of the turn that is being spoken, each time that it has grown
            by so many seconds.
    """

    model_config = ConfigDict(extra="forbid")

    encoding: Literal["pcm_s16le", "mulaw", "alaw", "opus"] = "pcm_s16le"
    sampling_rate: int | None = Field(None, ge=RATE_RANGE[0], le=RATE_RANGE[1])
    speaker: str | None = Field(None, min_length=1, max_length=64)
    partial_seconds: float | None = Field(None, ge=0.5, le=30)


async def converse(service: Service, socket: WebSocket, session: str) -> None:
    """Hear a connection to its end. What it did wrong is sent as `{"error": reason}`, then it is closed."""
    origin = socket.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != socket.headers.get("host"):
        raise Refusal(403, "a page of another origin may not open a connection")
    with service.live.enter("live connections are open"):
        await socket.accept()
        try:
            await _Conversation(service, socket, session).run()
            code, reason = (GOING_AWAY, "the server is stopping") if service.stopping.is_set() else (1000, "")
        except WebSocketDisconnect:  # without an end: what was being said then is not heard
            return
        except (Refusal, InvalidAudioError) as error:
            status = error.status if isinstance(error, Refusal) else 422
            service.metrics.refused.labels(status).inc()
            code, reason = TRY_LATER if status in (429, 503) else REFUSED, str(error)
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # gone meanwhile
            if code in (TRY_LATER, REFUSED):
                await socket.send_json({"error": reason})
            await socket.close(code, reason.encode()[:120].decode(errors="ignore"))  # a close frame has 123 bytes


class _Conversation:
    def __init__(self, service: Service, socket: WebSocket, session: str):
        self._service, self._socket, self._session = service, socket, session

    async def run(self) -> None:
        first = await self._message()
        if first == END:
            return
        if not isinstance(first, str):
            raise Refusal(422, "the first message is text: the settings, as JSON")
        try:
            self._settings = LiveSettings.model_validate_json(first)
        except ValidationError as error:
            raise Refusal(422, f"the first message: {in_words(error.errors())}") from error
        try:
            encoding = self._settings.encoding
            decode, usual_rate = (opus_decoder(), OPUS_RATE) if encoding == "opus" else DECODERS[encoding]
            detector = await asyncio.to_thread(TurnDetector)
        except ImportError as error:
            raise Refusal(501, str(error)) from error
        rate = OPUS_RATE if encoding == "opus" else self._settings.sampling_rate or usual_rate
        resample = streaming_resampler(rate)

        def heard(frame: bytes) -> list[tuple[float, np.ndarray]]:
            return detector.add(resample(decode(frame), False))

        growth = self._settings.partial_seconds
        reported = 0.0  # seconds from the stream's begin
        while (frame := await self._message()) != END:
            if isinstance(frame, str):
                raise Refusal(422, f"after the settings come binary frames, or the text {END}")
            for turn in await asyncio.to_thread(heard, frame):
                await self._send(*turn)
            spoken = None if growth is None else detector.spoken()
            if spoken is not None and growth is not None:
                begin, behind = spoken[0], spoken[0] + len(spoken[1]) / SAMPLING_RATE
                if behind - max(begin, reported) >= growth:
                    reported = behind
                    await self._send(*spoken, partial=True)
        for turn in await asyncio.to_thread(detector.end):
            await self._send(*turn)

    async def _message(self) -> str | bytes:
        """The next message; `END` where the server is stopping."""
        coming = asyncio.ensure_future(self._socket.receive())
        stopping = asyncio.ensure_future(self._service.stopping.wait())
        try:
            await asyncio.wait({coming, stopping}, timeout=SILENT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                message = coming.result()
                if message["type"] == "websocket.disconnect":
                    raise WebSocketDisconnect(message.get("code", 1005))
                text, frame = message.get("text"), message.get("bytes")
                return frame if frame is not None else text or ""
            if stopping.done():
                return END
            raise Refusal(408, f"no message came for {SILENT_SECONDS:g} s")
        finally:
            coming.cancel()
            stopping.cancel()

    async def _send(self, start: float, waveform: np.ndarray, partial: bool = False) -> None:
        hear = self._service.hear_partly if partial else self._service.hear
        end = start + len(waveform) / SAMPLING_RATE
        times: dict[str, Any] = {"start": round(start, 3), "end": round(end, 3), "partial": partial}
        await self._socket.send_json(await hear(self._session, waveform, self._settings.speaker, **times))


def decode_pcm(frame: bytes) -> np.ndarray:
    """16-bit little-endian samples -> (samples,) float32"""
    if len(frame) % 2:
        raise Refusal(422, f"a frame has {len(frame)} bytes; 16-bit samples need an even number")
    return np.frombuffer(frame, dtype="<i2").astype(np.float32) / 2**15


def decode_telephone(subtype: str, frame: bytes) -> np.ndarray:
    """Codes of ITU-T G.711, `ULAW` or `ALAW` -> (samples,) float32"""
    import soundfile

    shape = {"format": "RAW", "subtype": subtype, "samplerate": TELEPHONE_RATE, "channels": 1}
    return soundfile.read(io.BytesIO(frame), dtype="float32", **shape)[0]


# Of each encoding, and the rate in Hz that it mostly has.
DECODERS: dict[str, tuple[Callable[[bytes], np.ndarray], int]] = {
    "pcm_s16le": (decode_pcm, SAMPLING_RATE),
    "mulaw": (functools.partial(decode_telephone, "ULAW"), TELEPHONE_RATE),
    "alaw": (functools.partial(decode_telephone, "ALAW"), TELEPHONE_RATE),
}


def opus_decoder() -> Callable[[bytes], np.ndarray]:
    """A function of an Opus packet: (samples,) float32 at 48 kHz. `ImportError` where PyAV is not installed."""
    try:
        import av
    except ImportError as error:
        raise ImportError("Opus frames need PyAV: pip install av; or send pcm_s16le") from error
    codec: Any = av.CodecContext.create("libopus", "r")

    def decode(frame: bytes) -> np.ndarray:
        try:
            decoded = [part.to_ndarray() for part in codec.decode(av.Packet(frame))]
        except av.error.FFmpegError as error:
            raise Refusal(422, f"a frame is no Opus packet: {error.strerror}") from error
        samples = [_mono(part, codec.format.is_planar, codec.layout.nb_channels) for part in decoded]
        return np.concatenate([np.zeros(0, np.float32), *samples])

    return decode


def _mono(samples: np.ndarray, planar: bool, channels: int) -> np.ndarray:
    """Of a decoded part, (channels, samples) or interleaved (1, samples * channels), the average."""
    scale = 1 if samples.dtype.kind == "f" else 2**15
    samples = samples if planar else samples.reshape(-1, channels).T
    return (samples.astype(np.float32) / scale).mean(axis=0).clip(-1, 1)
