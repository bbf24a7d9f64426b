"""Turns and files by REST, with a real server: the tracker's numbers, and every limit."""

import dataclasses
import json
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.audio_files import Recording
from modeling_mamba_ema.inference import EmotionTracker, TurnEmotion, emotion_timeline
from modeling_mamba_ema.serving import Settings, serve
from tests.support.models import tiny_model
from tests.support.programs import HANGS, call_command, free_port, in_threads, run_program, wait_until
from tests.support.service import serving, spoken, undisturbed

pytest.importorskip("prometheus_client", reason="the service needs its extra: pip install '.[serve]'")

TOKEN = "a-token"


@pytest.fixture(scope="module")
def server(saved_model):
    with serving(saved_model, "--max-rate", 10_000, "--max-megabytes", 1, token=TOKEN) as started:
        yield started


def test_a_call_gets_the_trackers_numbers_and_is_known_by_its_speakers(server, saved_model):
    turns, speakers = [spoken(seed) for seed in range(4)], ["anna", "ben", "anna", None]
    heard = [server.heard("call", turn, **({"speaker": name} if name else {})) for turn, name in zip(turns, speakers)]
    assert [row["values"] for row in heard] == undisturbed(saved_model, turns, speakers)
    assert [(row["turn"], row["speaker"]) for row in heard] == list(enumerate(speakers, start=1))
    assert heard[0]["label_values"]["valence"] == pytest.approx(1 + 6 * heard[0]["values"]["valence"], abs=1e-5)
    kept = server.http.get("/sessions/call").json()
    assert kept == {"session": "call", "turns": 4, "speakers": {"anna": 2, "ben": 1}, "last": heard[3]}
    assert server.http.delete("/sessions/call").status_code == 204
    assert server.http.get("/sessions/call").status_code == 404
    assert server.heard("call", turns[0])["turn"] == 1


def test_calls_at_the_same_time_share_passes_and_nothing_else(server, saved_model):
    calls = {f"together-{call}": [spoken(100 * call + turn) for turn in range(3)] for call in range(8)}
    heard = {name: [] for name in calls}

    def follow(name):
        for turn in calls[name]:
            heard[name].append(server.heard(name, turn)["values"])

    in_threads([partial(follow, name) for name in calls])
    for name, turns in calls.items():
        for got, wanted in zip(heard[name], undisturbed(saved_model, turns), strict=True):
            assert got == pytest.approx(wanted, abs=2e-5)


def test_a_turn_that_is_sent_again_is_answered_and_not_heard_again(server, saved_model):
    turns = [spoken(seed) for seed in (5, 6)]
    first = server.heard("again", turns[0], number=1)
    assert server.heard("again", turns[0], number=1) == first
    assert server.heard("again", turns[1], number=2)["values"] == undisturbed(saved_model, turns)[1]
    refused = server.turn("again", turns[1], number=4)
    assert refused.status_code == 409
    assert refused.json()["detail"] == "session again has heard 2 turns; number 3 is the next"


def test_a_recording_gets_the_rows_of_the_timeline(server, saved_model, tmp_path):
    (tmp_path / "call.wav").write_bytes(spoken(0, seconds=5))
    with Recording(tmp_path / "call.wav") as recording:
        wanted = [row.to_dict() for row in emotion_timeline(EmotionTracker.from_pretrained(saved_model), recording, 2)]
    answer = server.http.post("/files", params={"window": 2}, content=spoken(0, seconds=5))
    assert answer.headers["content-type"].startswith("application/jsonl")
    assert [json.loads(line) for line in answer.text.splitlines()] == wanted
    assert len(wanted) == 3
    assert server.http.post("/files", params={"vad": True}, content=spoken(0, seconds=1)).text == ""  # no speech


def test_who_leaves_while_a_file_is_scored_takes_no_place_of_others(server):
    recording = spoken(0, seconds=30)
    for _ in range(2):  # as many as are scored at once
        with server.http.stream("POST", "/files", params={"window": 1}, content=recording) as answer:
            assert next(answer.iter_lines())
    wait_until(lambda: server.http.post("/files", content=spoken(0)).status_code == 200)


@pytest.mark.parametrize(
    ("path", "content", "query", "status", "sentence"),
    [
        ("sessions/bad/turns", b"", {}, 422, "the audio"),
        ("sessions/bad/turns", b"no audio", {}, 422, "the audio is no audio file that can be read"),
        ("sessions/bad/turns", spoken(0, 0.01), {}, 422, "an utterance lasts 0.025 to 30 s"),
        ("sessions/bad/turns", spoken(0, 31), {}, 422, "lasts 31 s"),
        ("sessions/bad/turns", spoken(0), {"channel": 2}, 422, "has 1 channel, no channel 2"),
        ("sessions/bad/turns", spoken(0), {"channel": 0}, 422, "query.channel"),
        ("sessions/bad/turns", spoken(0), {"speaker": "a" * 65}, 422, "query.speaker"),
        ("sessions/.bad/turns", spoken(0), {}, 422, "path.session"),
        ("sessions/bad/turns", bytes(2**24 + 1), {}, 413, "more than 16777216 bytes"),
        ("files", bytes(2**20 + 1), {}, 413, "more than 1048576 bytes"),
        ("files", b"no audio", {}, 422, "recording is no audio file that can be read"),
        ("files", spoken(0), {"window": 40}, 422, "query.window"),
        ("files", spoken(0), {"split_channels": True}, 422, "there is nothing to split"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(server, path, content, query, status, sentence):
    answer = server.http.post(path, content=content, params=query)
    assert answer.status_code == status
    assert sentence in answer.json()["detail"]
    assert server.http.get("/sessions/bad").status_code == 404  # no session has begun


def test_who_leaves_in_the_middle_of_a_turn_leaves_no_traceback(server):
    """The server's fixture looks at what was printed."""
    refused = 'mamba_ema_refused_total{status="408"} 1.0'
    with socket.create_connection(server.http.base_url.netloc.decode().split(":")) as left:
        left.sendall(f"POST /sessions/left/turns HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode())
        left.sendall(b"Content-Length: 1000\r\n\r\nabc")
    wait_until(lambda: refused in server.http.get("/metrics").text, server.process)


def test_only_who_bears_the_token_is_answered(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        answer = httpx.get(f"{server.address}/sessions/call", headers=headers, trust_env=False)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    health = httpx.get(f"{server.address}/health", trust_env=False)
    assert health.json()["status"] == "ok"
    paths = server.http.get("/openapi.json").json()["paths"]  # generated clients send it where it is asked for
    asked = {address for address, methods in paths.items() if all("security" in about for about in methods.values())}
    assert asked == set(paths) - {"/health"}


def test_prometheus_reads_what_was_heard_and_refused(server):
    def read():
        lines = (line.rpartition(" ") for line in server.http.get("/metrics").text.splitlines() if line[0] != "#")
        return {name: float(value) for name, _, value in lines}

    before = read()
    server.heard("counted", spoken(0, seconds=0.5))
    server.turn("counted", b"no audio")
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert grown["mamba_ema_turns_total"] == 1
    assert grown["mamba_ema_audio_seconds_total"] == pytest.approx(0.5)
    assert grown["mamba_ema_turn_seconds_count"] == 1
    assert grown["mamba_ema_pass_turns_sum"] == 1
    assert grown['mamba_ema_refused_total{status="422"}'] == 1
    assert grown["mamba_ema_sessions"] == 1


def test_openapi_describes_what_is_served(server):
    described = server.http.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/health",
        "/metrics",
        "/sessions/{session}",
        "/sessions/{session}/turns",
        "/files",
    }


def test_the_first_page_lists_what_is_served(server):
    page = server.http.get("/").text
    assert page.startswith("Mamba-EMA ")
    assert "valence and arousal of the turns of a call" in page
    for address, methods in server.http.get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert re.search(rf"^{method.upper()} +{re.escape(address)} +[A-Z].+\.$", page, re.MULTILINE), (
                method,
                address,
            )
    assert "WS      /sessions/{session}/live" in page


def test_sessions_and_rates_are_limited(saved_model):
    with serving(saved_model, "--max-sessions", 2, "--max-rate", 1) as server:
        server.heard("a", spoken(0))
        server.heard("b", spoken(0))
        refused = server.turn("c", spoken(0))
        assert refused.status_code == 429
        assert refused.json()["detail"].startswith("there are 2 sessions, as many as are allowed")
        assert server.heard("a", spoken(1))["turn"] == 2
        answer = wait_until(lambda: (got := server.http.get("/sessions/a")).status_code == 429 and got)
        assert answer.json()["detail"] == "more than 1 requests a second; send fewer"
        assert answer.headers["retry-after"] == "1"


def test_a_server_that_is_stopped_finishes_what_was_begun(saved_model):
    with serving(saved_model) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(server.turn, "call", spoken(0, seconds=25))
        wait_until(lambda: "mamba_ema_pass_turns_count 1.0" in server.http.get("/metrics").text)
        assert server.stop() == 0
        assert answer.result().status_code == 200


def test_a_server_that_is_stopped_sends_every_row_of_a_file_that_was_begun(saved_model):
    with serving(saved_model) as server:
        with server.http.stream("POST", "/files", content=spoken(0, seconds=120), params={"window": 1}) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            rows = [json.loads(line) for line in [first, *lines]]
        assert server.process.wait(HANGS) == 0
    assert [row["start"] for row in rows] == list(range(120))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--host", "0.0.0.0"),
            "0.0.0.0 can be reached by other machines; set a token in the variable MAMBA_EMA_TOKEN",
        ),
        (("--state", "files:///tmp"), "state is kept in 'memory', or in a Redis"),
        (("--state", f"redis://:secret@127.0.0.1:{free_port()}/0"), "the state in Redis cannot be used"),
    ],
)
def test_a_service_that_cannot_be_is_refused_in_one_line(saved_model, options, sentence, capsys):
    assert call_command("serve", "--model", saved_model, "--port", 0, *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert "secret" not in line


def test_limits_and_ports_that_make_no_sense_are_refused_from_python_too():
    with pytest.raises(ValueError, match="max_batch is 0; it must be above 0"):
        Settings(max_batch=0)
    with pytest.raises(ValueError, match="there is no port 70000"):
        serve(EmotionTracker(tiny_model(), MambaEMAFeatureExtractor()), Settings(), port=70_000)


def test_what_is_not_installed_is_named(saved_model, tmp_path):
    (tmp_path / "fastapi.py").write_text("raise ImportError('no module', name='fastapi')")
    command = ("-m", "modeling_mamba_ema", "serve", "--model", saved_model)
    result = run_program(*command, check=False, PYTHONPATH=str(tmp_path))
    assert result.stderr == "mamba-ema: the service needs fastapi: pip install 'modeling-mamba-ema[serve]'\n"


def test_an_answer_has_every_field_of_a_turn_but_its_attention():
    from modeling_mamba_ema.serving.app import Turn  # needs the extra

    heard = {field.name for field in dataclasses.fields(TurnEmotion)}
    assert set(Turn.model_fields) == heard - {"attention"} | {"session"}
