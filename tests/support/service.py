"""A server of `mamba-ema serve` in a process of its own, and a Redis."""

import contextlib
import io
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile as sf

from modeling_mamba_ema.inference import EmotionTracker
from tests.support.programs import HANGS, Forked, free_port, wait_until


class Server:
    """What a test does with a server: requests, signals.

    Attributes:
        process: that serves.
        address: http://127.0.0.1:PORT.
    """

    def __init__(self, process: Forked, address: str, headers: dict[str, str]):
        self.process, self.address = process, address
        self.http = httpx.Client(base_url=address, timeout=HANGS, trust_env=False, headers=headers)

    def turn(self, session: str, wav: bytes, **query: Any) -> httpx.Response:
        return self.http.post(f"/sessions/{session}/turns", content=wav, params=query)

    def heard(self, session: str, wav: bytes, **query: Any) -> dict[str, Any]:
        answer = self.turn(session, wav, **query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(HANGS)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(HANGS)


@contextlib.contextmanager
def serving(model: Path, *options: Any, token: str = "") -> Iterator[Server]:
    """A server on a free port, killed at the end if it still runs."""
    command = ["-m", "modeling_mamba_ema", "serve", "--model", model, "--port", 0, *options]
    process = Forked(*command, MAMBA_EMA_TOKEN=token)
    try:
        address = wait_until(lambda: re.search(r"http://127\.0\.0\.1:\d+", process.printed), process).group()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        server = Server(process, address, headers)
        yield server
        server.http.close()
        assert "Traceback" not in process.printed, process.printed
    finally:
        process.kill()
        process.wait(HANGS)


@contextlib.contextmanager
def redis_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """The address of a Redis of its own, which keeps what it holds in a folder."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    import redis

    port = port or free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--appendonly", "yes", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def answers() -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return redis.Redis(port=port).ping()
        return False

    try:
        wait_until(answers)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait(HANGS)


def spoken(seed: int, seconds: float = 0.4) -> bytes:
    """A WAV file of noise."""
    noise = np.random.default_rng(seed).normal(0, 0.1, round(16_000 * seconds)).clip(-1, 0.99)
    buffer = io.BytesIO()
    sf.write(buffer, noise, 16_000, format="WAV")
    return buffer.getvalue()


def undisturbed(model: Path, turns: list[bytes], speakers: list[str | None] | None = None) -> list[dict[str, float]]:
    """The values that one tracker gives for a call."""
    tracker = EmotionTracker.from_pretrained(model)
    return [tracker.update(turn, speaker=name).values for turn, name in zip(turns, speakers or [None] * len(turns))]
