"""One turn of one session: limits, the model and the state around it, and what is counted."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..inference import EmotionTracker
from .batching import Batcher
from .errors import Refusal
from .sessions import Session, SessionStore, open_store

MAX_SPEAKERS = 64  # of a session
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # of a turn's answer
_TURNS = (1, 2, 4, 8, 16, 32, 64)  # of a pass


@dataclass(frozen=True)
class Settings:
    """Limits of a service.

    Attributes:
        token: that each request must bear; None: none is needed.
        max_batch, max_wait, max_waiting: turns of a pass, seconds that a turn waits for others, turns that may wait.
        max_sessions, session_seconds: that are kept, and how long after their last turn.
        max_live: WebSocket connections at once.
        max_files, max_file_bytes: files that are scored at once, and the size of each.
        max_rate: requests a second of one address; bursts of ten seconds' worth are let through.

    Raises:
        ValueError: a limit that is not above 0 (`max_wait` may be 0).
    """

    token: str | None = None
    max_batch: int = 16
    max_wait: float = 0.005
    max_waiting: int = 256
    max_sessions: int = 1024
    session_seconds: float = 3600.0
    max_live: int = 128
    max_files: int = 2
    max_file_bytes: int = 256 * 2**20
    max_rate: float = 50.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "token" and not (value > 0 or (name == "max_wait" and value == 0)):
                raise ValueError(f"{name} is {value}; it must be above 0")


class Service:
    """What REST and WebSocket share. Each session has a copy of the tracker; for `state` see [`open_store`]."""

    def __init__(self, tracker: EmotionTracker, settings: Settings, state: str = "memory"):
        self.tracker, self.settings = tracker, settings
        self.sessions: SessionStore = open_store(state, tracker.weights_sha256, settings.session_seconds)
        self.metrics = Metrics()
        self.batcher = Batcher(
            settings.max_batch, settings.max_wait, settings.max_waiting, self.metrics.pass_turns.observe
        )
        self.rates = Rates(settings.max_rate)
        self.stopping = asyncio.Event()
        self.live, self.files = AtOnce(settings.max_live), AtOnce(settings.max_files)

    async def hear(
        self, name: str, waveform: np.ndarray, speaker: str | None, number: int | None = None, **row: Any
    ) -> dict[str, Any]:
        """The next turn of a session, (samples,) at 16 kHz; its state is kept before the answer, which also has `row`,
        is given.

        Args:
            name: of the session, which begins with its first turn.
            number: of the turn, from 1. Sent again, as after a lost answer, it is answered again and not heard twice.

        Raises:
            Refusal: the turn's number is not the next one, or a limit is reached.
        """
        begin = time.monotonic()
        async with self.sessions.hold(name) as held:
            about = {"turns": 0, "speakers": {}, "last": None} if held.session is None else held.session.about
            if number is not None and number == about["turns"]:
                return about["last"]
            if number not in (None, about["turns"] + 1):
                raise Refusal(
                    409, f"session {name} has heard {about['turns']} turns; number {about['turns'] + 1} is the next"
                )
            if held.session is None and await self.sessions.count() >= self.settings.max_sessions:
                allowed = self.settings.max_sessions
                raise Refusal(429, f"there are {allowed} sessions, as many as are allowed; delete one or wait")
            speakers = dict(about["speakers"])
            if speaker is not None:
                if speaker not in speakers and len(speakers) >= MAX_SPEAKERS:
                    raise Refusal(422, f"session {name} has {MAX_SPEAKERS} speakers, as many as are allowed")
                speakers[speaker] = speakers.get(speaker, 0) + 1
            tracker = await self._tracker(held.session)
            heard = await self.batcher.hear(tracker, waveform, speaker)
            answer = {"session": name, **heard.to_dict(), **row}
            state = await asyncio.to_thread(tracker.state_bytes)
            await held.save(Session(state, {"turns": heard.turn, "speakers": speakers, "last": answer}))
        self.metrics.turns.inc()
        self.metrics.audio_seconds.inc(heard.seconds)
        self.metrics.turn_seconds.observe(time.monotonic() - begin)
        return answer

    async def hear_partly(self, name: str, waveform: np.ndarray, speaker: str | None, **row: Any) -> dict[str, Any]:
        """As `hear`, for the beginning of a turn that is being spoken; the session stays where it was."""
        tracker = await self._tracker(await self.sessions.read(name))
        heard = await self.batcher.hear(tracker, waveform, speaker)
        return {"session": name, **heard.to_dict(), **row}

    async def _tracker(self, session: Session | None) -> EmotionTracker:
        tracker = self.tracker.copy()
        if session is not None:
            await asyncio.to_thread(tracker.restore_bytes, session.state)
        return tracker


class AtOnce:
    """Counts what goes on, as much as is allowed at once."""

    def __init__(self, allowed: int):
        self._allowed, self.number = allowed, 0

    @contextmanager
    def enter(self, what: str) -> Iterator[None]:
        """Count one more while the block runs; `Refusal` where there are as many as allowed."""
        if self.number >= self._allowed:
            raise Refusal(503, f"{self.number} {what}, as many as are allowed; try again later")
        self.number += 1
        try:
            yield
        finally:
            self.number -= 1


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.turns = Counter("mamba_ema_turns", "turns heard", **own)
        self.audio_seconds = Counter("mamba_ema_audio_seconds", "seconds of audio in them", **own)
        self.turn_seconds = Histogram(
            "mamba_ema_turn_seconds", "from a turn's audio to its answer", buckets=_SECONDS, **own
        )
        self.pass_turns = Histogram("mamba_ema_pass_turns", "turns in a pass of the model", buckets=_TURNS, **own)
        self.refused = Counter("mamba_ema_refused", "requests refused", ["status"], **own)
        self.sessions = Gauge("mamba_ema_sessions", "sessions kept", **own)
        self.live = Gauge("mamba_ema_live_connections", "WebSocket connections", **own)


class Rates:
    """Requests of each address: a bucket that fills at the rate allowed and holds ten seconds' worth."""

    def __init__(self, per_second: float):
        self._per_second, self._full = per_second, 10 * per_second
        self._buckets: dict[str, tuple[float, float]] = {}  # what is left, and when that was

    def check(self, address: str) -> None:
        """Take one from the address's bucket; `Refusal` where it is empty."""
        now = time.monotonic()
        left, when = self._buckets.pop(address, (self._full, now))
        left = min(left + (now - when) * self._per_second, self._full)
        self._buckets[address] = (max(left - 1, 0), now)
        if len(self._buckets) > 10_000:  # the address that was seen longest ago
            del self._buckets[next(iter(self._buckets))]
        if left < 1:
            raise Refusal(429, f"more than {self._per_second:g} requests a second; send fewer")
