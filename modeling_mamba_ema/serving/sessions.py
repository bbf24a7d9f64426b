"""Where sessions are kept between their turns: in this process, or in Redis, where any server continues any session."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from .errors import Refusal

LOCK_SECONDS = 10.0  # after which a session whose server was killed can be continued by another
WAIT_SECONDS = 60.0  # for the turns of the same session that came before


@dataclass(frozen=True)
class Session:
    """What is kept of a call: `EmotionTracker.state_bytes`, and plain values: `turns` heard, `speakers` with their
    number of turns, `last` answer."""

    state: bytes
    about: dict[str, Any]


@dataclass
class Held:
    """A session that nobody else changes meanwhile: a function that gives what is kept of it, or None, and one that
    replaces it (None deletes it)."""

    read: Callable[[], Awaitable[Session | None]]
    save: Callable[[Session | None], Awaitable[None]]


class MemorySessions:
    """Sessions by name in this process, which end with it; one that heard no turn for some seconds is forgotten."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._kept: dict[str, tuple[float, Session]] = {}  # when it expires; the one that expires first comes first
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[Held]:
        """Wait until nobody else holds the session, on any server, and hold it."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock:
            yield Held(lambda: self.read(name), lambda new: self._save(name, new))

    async def read(self, name: str) -> Session | None:
        """What is kept of a session after its last finished turn."""
        await self.count()
        return self._kept[name][1] if name in self._kept else None

    async def count(self) -> int:
        """Sessions that are kept."""
        now = time.monotonic()
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            del self._kept[next(iter(self._kept))]
        return len(self._kept)

    async def close(self) -> None:
        self._kept.clear()

    async def _save(self, name: str, session: Session | None) -> None:
        self._kept.pop(name, None)
        if session is not None:
            self._kept[name] = (time.monotonic() + self._seconds, session)


# Writes only for who still holds the lock, so that a server that was stopped for longer than the lock lasts cannot put
# an old state in the place of a newer one.
_SAVE = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('del', KEYS[2])
redis.call('zrem', KEYS[3], ARGV[2])
if #ARGV > 2 then
    redis.call('hset', KEYS[2], 'state', ARGV[3], 'about', ARGV[4])
    redis.call('pexpire', KEYS[2], ARGV[5])
    redis.call('zadd', KEYS[3], ARGV[6], ARGV[2])
end
return 1
"""


class RedisSessions:
    """As [`MemorySessions`], in Redis: safetensors and JSON, each with a time to live. Servers whose digests of the
    model differ do not see each other's sessions."""

    def __init__(self, url: str, model: str, seconds: float):
        self._seconds = seconds
        try:
            import redis.asyncio
        except ImportError as error:
            raise ImportError("state in Redis needs redis: pip install 'modeling-mamba-ema[serve]'") from error
        self._redis: Any = redis.asyncio.from_url(url, socket_timeout=LOCK_SECONDS, socket_connect_timeout=5)
        self._prefix = f"mamba-ema:{model[:16]}:"
        self._run_save = self._redis.register_script(_SAVE)

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[Held]:
        lock = self._redis.lock(
            f"{self._prefix}lock:{name}",
            timeout=LOCK_SECONDS,
            sleep=0.01,
            blocking_timeout=WAIT_SECONDS,
            thread_local=False,
            raise_on_release_error=False,
        )
        with _reached():
            if not await lock.acquire():
                raise Refusal(503, f"turns of session {name} are still being heard; send the turn again later")
        keeping = asyncio.create_task(self._keep(lock))
        try:
            yield Held(lambda: self.read(name), lambda new: self._save(name, lock, new))
        finally:
            keeping.cancel()
            with contextlib.suppress(Exception):  # lost, or Redis is: it expires
                await lock.release()

    async def read(self, name: str) -> Session | None:
        with _reached():
            state, about = await self._redis.hmget(f"{self._prefix}session:{name}", ["state", "about"])
        try:
            return None if state is None else Session(state, dict(json.loads(about)))
        except (TypeError, ValueError) as error:
            raise damaged(name, error) from error

    async def count(self) -> int:
        with _reached():
            await self._redis.zremrangebyscore(f"{self._prefix}sessions", "-inf", time.time())
            return await self._redis.zcard(f"{self._prefix}sessions")

    async def close(self) -> None:
        await self._redis.aclose()

    async def _save(self, name: str, lock: Any, session: Session | None) -> None:
        keys = [f"{self._prefix}{kind}" for kind in (f"lock:{name}", f"session:{name}", "sessions")]
        arguments: list[Any] = [lock.local.token, name]
        if session is not None:
            expires = time.time() + self._seconds
            arguments += [session.state, json.dumps(session.about), round(self._seconds * 1000), expires]
        with _reached():
            if not await self._run_save(keys, arguments):
                raise Refusal(503, f"session {name} was taken over by another server; send the turn again")

    async def _keep(self, lock: Any) -> None:
        """Renew a lock while its turn is heard, however long that takes."""
        while True:
            await asyncio.sleep(LOCK_SECONDS / 4)
            with contextlib.suppress(Exception):  # lost: saving will be refused
                await lock.reacquire()


def damaged(name: str, reason: Exception) -> Refusal:
    """Of a session that cannot be continued."""
    return Refusal(422, f"session {name} is damaged; delete it, and begin it anew ({reason})")


@contextlib.contextmanager
def _reached() -> Any:
    from redis.exceptions import RedisError

    try:
        yield
    except RedisError as error:
        raise Refusal(503, f"the state in Redis cannot be used: {error}") from error


SessionStore: TypeAlias = MemorySessions | RedisSessions


def open_store(state: str, model: str, seconds: float) -> SessionStore:
    """The store for `state`: "memory", or the URL of a Redis, such as `redis://localhost:6379/0`, see
    `redis.asyncio.from_url`."""
    if state == "memory":
        return MemorySessions(seconds)
    if state.startswith(("redis://", "rediss://", "unix://")):
        return RedisSessions(state, model, seconds)
    raise ValueError("state is kept in 'memory', or in a Redis that is named by redis://, rediss:// or unix://")
