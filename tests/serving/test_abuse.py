"""What nobody should send, and for a long time: a server answers all of it, and its memory does not grow."""

import random
import re
import subprocess
import sys

import pytest

pytest.importorskip("prometheus_client", reason="the service needs its extra: pip install '.[serve]'")
pytest.importorskip("schemathesis", reason="needs schemathesis: pip install '.[dev]'")

import websockets
from websockets.sync.client import connect

from tests.support.programs import HANGS, resident_memory
from tests.support.service import serving, spoken

pytestmark = pytest.mark.slow
SESSIONS = 1_000


@pytest.fixture(scope="module")
def server(saved_model):
    with serving(saved_model, "--max-rate", 1_000_000) as started:
        yield started


def test_every_request_gets_an_answer_that_openapi_describes(server, tmp_path):
    # Random bytes are no audio, so that valid requests may be refused; and FastAPI has a route a method, whose Allow
    # header does not name the other methods of its address.
    unchecked = "positive_data_acceptance,allow_header_conformance"
    options = ("--max-examples", "100", "--seed", "1", "--checks", "all", "--exclude-checks", unchecked)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json", *options]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert ran.returncode == 0, ran.stdout
    assert int(re.search(r"(\d+) generated", ran.stdout).group(1)) > 300


def test_random_frames_end_their_connection_and_nothing_else(server):
    choose = random.Random(0)
    first = ["{}", '{"encoding": "opus"}', '{"partial_seconds": 0.5}', "{", "[]", b"\0", '{"sampling_rate": 4000}']
    closed = {}
    for number in range(500):
        url = f"{server.address.replace('http', 'ws')}/sessions/random-{number % 7}/live"
        with connect(url, proxy=None, open_timeout=HANGS) as socket:
            try:
                socket.send(choose.choice(first))
                for _ in range(choose.randrange(6)):
                    size = 2 * choose.choice([0, 1, 50, 800, 40_000])
                    socket.send(choose.choice([choose.randbytes(size), choose.randbytes(size + 1), bytes(size)]))
                socket.send(choose.choice(['{"end": true}', "stop", b"\xff" * 9]))
                while True:
                    socket.recv(timeout=HANGS)
            except websockets.ConnectionClosed as end:
                code = end.rcvd.code if end.rcvd else None
                closed[code] = closed.get(code, 0) + 1
    assert set(closed) <= {1000, 1008}, closed
    assert server.http.get("/health").json()["status"] == "ok"


def test_memory_does_not_grow_with_sessions_that_come_and_go(server, record_property):
    def sessions(first, last):
        for number in range(first, last):
            assert server.heard(f"come-and-go-{number}", turn)["turn"] == 1
            assert server.http.delete(f"/sessions/come-and-go-{number}").status_code == 204

    turn = spoken(0)
    sessions(0, 200)  # what is loaded and cached once is no growth
    before = resident_memory(server.process.pid)
    sessions(200, 200 + SESSIONS)
    growth = resident_memory(server.process.pid) - before
    record_property("figure", f"memory grew by {growth:.1f} MB over {SESSIONS} sessions")
    assert growth < 20  # a session that stayed would be 20 kB of state and its answers
