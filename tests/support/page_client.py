"""A page on the loopback address, started in this process, and the requests a visitor's browser would send to it."""

import contextlib
import functools
import gc
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import soundfile as sf

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.inference import EmotionTracker
from tests.support.models import tiny_model
from tests.support.programs import HANGS, environment, free_port

FILE_DATA = {"_type": "gradio.FileData"}


def tracker() -> EmotionTracker:
    """Over the tiny model that pages serve here."""
    return EmotionTracker(tiny_model(label_ranges={"valence": [1, 5]}), MambaEMAFeatureExtractor())


@contextlib.contextmanager
def serve(queue_size: int = 48) -> Iterator["Visitor"]:
    """A page over the tiny model, in this process."""
    from modeling_mamba_ema.page import launch

    page, url = launch(tracker(), queue_size, server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    try:
        yield Visitor(url.rstrip("/"), page)
    finally:
        page.close(verbose=False)
        gc.unfreeze()


@contextlib.contextmanager
def serve_elsewhere(folder: Path) -> Iterator[tuple["Visitor", int]]:
    """The page in a process of its own over the tiny model, as a person starts it; with the process's id."""
    tracker().model.save_pretrained(folder / "model")
    command = [sys.executable, "-m", "modeling_mamba_ema", "page", "--model", str(folder / "model")]
    process = subprocess.Popen(
        [*command, "--port", str(free_port())],
        env=environment(GRADIO_TEMP_DIR=str(folder / "uploads")),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        while "until Ctrl-C" not in (line := process.stdout.readline()):
            assert process.poll() is None, "the page did not start"
        yield Visitor(line.split()[-1].rstrip("/")), process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=HANGS)


class Visitor:
    """Talks to a page by plain HTTP; each has a session of its own."""

    def __init__(self, url: str, page=None):
        self.url, self.page = url, page
        self.session = os.urandom(6).hex()
        self.http = httpx.Client(base_url=f"{url}/gradio_api", timeout=120, trust_env=False)

    def another(self) -> "Visitor":
        return Visitor(self.url, self.page)

    def upload(self, content: bytes, name: str = "turn.wav") -> httpx.Response:
        return self.http.post("/upload", files={"files": (name, content)})

    @functools.cached_property
    def functions(self) -> dict[str, int]:
        """What the page can be asked for, with the number of each; a browser reads it once, too."""
        functions = self.http.get(f"{self.url}/config").json()["dependencies"]
        return {function["api_name"]: function["id"] for function in functions}

    def join(self, api_name: str, data: list) -> httpx.Response:
        """Queue a request as the browser does."""
        body = {"data": data, "fn_index": self.functions[api_name], "session_hash": self.session}
        return self.http.post("/queue/join", json=body)

    def results(self) -> Iterator[dict]:
        """The messages of this session until the request is through."""
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    message = json.loads(line[6:])
                    yield message
                    if message["msg"] in ("process_completed", "close_stream"):
                        return

    def send(self, audio, speaker="speaker A") -> dict:
        """Add a turn whose audio is described by `audio`; returns gradio's answer: `data`, or `error`."""
        answer = self.join("add_turn", [audio, speaker, None])
        answer.raise_for_status()
        return list(self.results())[-1]["output"]

    def add_turn(self, content: bytes, name: str = "turn.wav", speaker="speaker A") -> dict:
        """Upload a file and add it as a turn."""
        (path,) = self.upload(content, name).raise_for_status().json()
        return self.send({"path": path, "meta": FILE_DATA}, speaker)

    def turns(self, content: bytes, **kwargs) -> list[dict]:
        """Add a turn; returns the numbers of the conversation so far."""
        answer = self.add_turn(content, **kwargs)
        assert answer.get("data"), answer
        return answer["data"][-1]


def wav(waveform, rate: int = 16_000, **options) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, waveform, rate, format=options.pop("format", "WAV"), **options)
    return buffer.getvalue()


def clip(seed: int, seconds: float = 0.4) -> np.ndarray:
    """Noise of its own loudness contour; every seed gives other numbers."""
    random = np.random.default_rng(seed)
    contour = np.interp(np.arange(int(16_000 * seconds)), np.linspace(0, 16_000 * seconds, 5), random.random(5))
    return (0.2 * contour * random.normal(size=contour.size)).clip(-1, 1).astype(np.float32)
