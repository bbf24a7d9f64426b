"""The service's addresses."""

import asyncio
import hmac
import json
import math
import tempfile
import time
from collections.abc import AsyncIterator, Generator, Iterable
from contextlib import ExitStack, asynccontextmanager
from itertools import chain
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, HTTPConnection

from .._version import __version__
from ..audio_files import Recording, load_audio
from ..feature_extraction_mamba_ema import InvalidAudioError
from ..inference import EmotionTracker, emotion_timeline
from ..inference.voice_activity import detect_speech
from ..publishing.model_card import listed
from .errors import Refusal, in_words
from .live import converse
from .service import MAX_SPEAKERS, Service

MAX_TURN_BYTES = 16 * 2**20
UPLOAD_SECONDS = 120.0

Name = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description="of the session, your choice")]
Speaker = Annotated[str | None, Query(min_length=1, max_length=64, description="who speaks")]
Channel = Annotated[int | None, Query(ge=1, le=8, description="of several, from 1; default: their average")]
AUDIO = {
    "requestBody": {
        "description": "An audio file: WAV, FLAC, OGG, MP3.",
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class Problem(BaseModel):
    """Why a request is refused."""

    detail: str


class Turn(BaseModel):
    """What was heard in a turn, see `TurnEmotion`."""

    session: str
    turn: int
    speaker: str | None
    values: dict[str, float]
    label_values: dict[str, float]
    differences: dict[str, float] | None
    baseline_turns: int
    intervals: dict[str, tuple[float, float]] | None
    confidence: dict[str, float] | None
    spread: dict[str, float] | None
    label_spread: dict[str, float] | None
    reading: str
    seconds: float
    low_level: bool


class SessionView(BaseModel):
    """A session after its last finished turn."""

    session: str
    turns: int
    speakers: dict[str, int] = Field(max_length=MAX_SPEAKERS)
    last: Turn | None


class Health(BaseModel):
    """Whether requests are answered: "ok", or "stopping"."""

    status: str
    version: str
    labels: list[str]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of an address that are a [`Problem`]; the first four may come everywhere."""
    return {status: {"model": Problem} for status in (401, 422, 429, 503, *statuses)}


def build_app(service: Service) -> FastAPI:
    """REST and WebSocket over a service; `/openapi.json` describes REST, and `/` lists all for people."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        yield
        await asyncio.to_thread(service.batcher.close)
        await service.sessions.close()

    async def admit(connection: HTTPConnection) -> None:
        token = service.settings.token
        given = connection.headers.get("authorization", "")
        service.rates.check(connection.client.host if connection.client else "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refusal(401, "a bearer token is needed: Authorization: Bearer TOKEN")
        if service.stopping.is_set():
            raise Refusal(503, "the server is stopping; send the request to another, or again later")

    app = FastAPI(title="Mamba-EMA", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_error_handlers(app, service)
    admitted = [Depends(admit)]
    if service.settings.token is not None:
        admitted.append(Depends(HTTPBearer(auto_error=False)))  # tells OpenAPI; `admit` has looked

    @app.get("/", include_in_schema=False, response_class=PlainTextResponse)
    async def index() -> str:
        routes = [
            (method.upper(), address, about["description"].partition("\n")[0])
            for address, methods in app.openapi()["paths"].items()
            for method, about in methods.items()
        ]
        routes.append(("WS", "/sessions/{session}/live", "Live audio; a row at the end of each turn."))
        lines = [f"{method:<8}{address:<28}{about}" for method, address, about in routes]
        title = f"Mamba-EMA {__version__}: {listed(service.tracker.labels)} of the turns of a call"
        return "\n".join([title, "", *lines, "", "/openapi.json describes it for programs.", ""])

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether requests are answered; needs no token."""
        stopping = service.stopping.is_set()
        response.status_code = 503 if stopping else 200
        return Health(status="stopping" if stopping else "ok", version=__version__, labels=service.tracker.labels)

    @app.get("/metrics", dependencies=admitted, responses=problems(), response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        try:
            service.metrics.sessions.set(await service.sessions.count())
        except Refusal:  # the state cannot be reached, which is when the rest is looked at
            service.metrics.sessions.set(math.nan)
        service.metrics.live.set(service.live.number)
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post(
        "/sessions/{session}/turns", dependencies=admitted, responses=problems(408, 409, 413), openapi_extra=AUDIO
    )
    async def turn(
        request: Request,
        session: Name,
        speaker: Speaker = None,
        channel: Channel = None,
        number: Annotated[int | None, Query(ge=1, le=10**9, description="of the turn, to send it again safely")] = None,
    ) -> Turn:
        """The next turn of a session, 25 ms to 30 s. A session begins with its first turn."""
        content = b"".join([part async for part in _body(request, MAX_TURN_BYTES)])
        longest = service.tracker.feature_extractor.max_seconds
        waveform = await asyncio.to_thread(load_audio, content, channel=channel, max_seconds=longest)
        return Turn(**await service.hear(session, waveform, speaker, number))

    @app.get("/sessions/{session}", dependencies=admitted, responses=problems(404))
    async def read_session(session: Name) -> SessionView:
        """Turns, speakers and the last answer of a session."""
        kept = await service.sessions.read(session)
        if kept is None:
            raise Refusal(404, f"there is no session {session}")
        return SessionView(session=session, **kept.about)

    @app.delete("/sessions/{session}", dependencies=admitted, responses=problems(), status_code=204)
    async def delete_session(session: Name) -> None:
        """Forget a session, after its turns that are being heard."""
        async with service.sessions.hold(session) as held:
            await held.save(None)

    @app.post(
        "/files",
        dependencies=admitted,
        responses={200: {"content": {"application/jsonl": {}}}, **problems(408, 413)},
        response_class=StreamingResponse,
        openapi_extra=AUDIO,
    )
    async def file(
        request: Request,
        vad: Annotated[bool, Query(description="find speech; else windows of one length")] = False,
        window: Annotated[float, Query(ge=1, le=30, description="seconds")] = 10.0,
        channel: Channel = None,
        split_channels: Annotated[bool, Query(description="each channel is a speaker")] = False,
    ) -> StreamingResponse:
        """A recording of up to 4 hours, as one conversation: a JSON object a line, as `mamba-ema timeline` writes it.

        Where the recording turns out to be damaged after its first rows, the last line is `{"error": reason}`.
        """
        with ExitStack() as stack:
            stack.enter_context(service.files.enter("files are being scored"))
            path = FilePath(stack.enter_context(tempfile.TemporaryDirectory())) / "recording"
            with path.open("wb") as received:
                async for part in _body(request, service.settings.max_file_bytes):
                    received.write(part)
            rows = _rows(service.tracker.copy(), path, vad, window, channel, split_channels)
            stack.callback(rows.close)
            first = await run_in_threadpool(next, rows, "")  # bad audio has its status before anything is sent
            return _Rows(chain([first], rows), stack.pop_all())

    @app.websocket("/sessions/{session}/live", dependencies=admitted[:1])
    async def live(socket: WebSocket, session: Name) -> None:
        await converse(service, socket, session)

    return app


class _Rows(StreamingResponse):
    """Lines as they are computed, and what is open until they are sent."""

    def __init__(self, lines: Iterable[str], opened: ExitStack):
        super().__init__(lines, media_type="application/jsonl")
        self._opened = opened

    async def __call__(self, *connection: Any) -> None:
        with self._opened:
            await super().__call__(*connection)


def _rows(
    tracker: EmotionTracker, path: FilePath, vad: bool, window: float, channel: int | None, split_channels: bool
) -> Generator[str, None, None]:
    begun = False
    try:
        with Recording(path, channel) as recording:
            segments = detect_speech(recording, split_channels) if vad else window
            for row in emotion_timeline(tracker, recording, segments, split_channels and not vad):
                yield json.dumps(row.to_dict()) + "\n"
                begun = True
    except ValueError as error:
        if not begun:
            raise Refusal(422, str(error)) from error
        yield json.dumps({"error": str(error)}) + "\n"


async def _body(request: Request, allowed: int) -> AsyncIterator[bytes]:
    """The body of a request in parts, as far as it is not too large, and comes in time."""
    latest = time.monotonic() + UPLOAD_SECONDS
    parts, received = request.stream(), 0
    while True:
        try:
            part = await asyncio.wait_for(anext(parts, None), latest - time.monotonic())
        except asyncio.TimeoutError:
            raise Refusal(408, f"the audio was not received within {UPLOAD_SECONDS:g} s") from None
        except ClientDisconnect:
            raise Refusal(408, "the connection ended before the audio did") from None
        if part is None:
            return
        received += len(part)
        if received > allowed:
            raise Refusal(413, f"the audio has more than {allowed} bytes")
        yield part


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    def refuse(status: int, reason: str) -> JSONResponse:
        service.metrics.refused.labels(status).inc()
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
        return JSONResponse({"detail": reason}, status, headers.get(status))

    @app.exception_handler(Refusal)
    async def refusal(_: HTTPConnection, error: Refusal) -> JSONResponse:
        return refuse(error.status, str(error))

    @app.exception_handler(InvalidAudioError)
    async def invalid_audio(_: HTTPConnection, error: InvalidAudioError) -> JSONResponse:
        return refuse(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid_request(_: HTTPConnection, error: RequestValidationError) -> JSONResponse:
        return refuse(422, in_words(error.errors()))
