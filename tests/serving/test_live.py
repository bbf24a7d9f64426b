"""Live audio by WebSocket, with a real server: the tracker's numbers at the end of each turn, whatever else comes."""

import io
import json
import re
import signal
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="the service needs its extra: pip install '.[serve]'")
pytest.importorskip("silero_vad", reason="the service needs its extra: pip install '.[serve]'")

import av
import soundfile as sf
import soxr
import websockets
from websockets.sync.client import connect

from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.inference.voice_activity import TurnDetector, spoken_turns
from modeling_mamba_ema.sample import load_sample_conversation
from modeling_mamba_ema.serving.live import DECODERS, opus_decoder
from tests.support.programs import HANGS, in_threads, wait_until
from tests.support.service import serving

RATE, FRAME, END = 16_000, 1_600, json.dumps({"end": True})
TOKEN = "a-token"


@pytest.fixture(scope="module")
def server(saved_model):
    with serving(saved_model, "--max-rate", 10_000, token=TOKEN) as started:
        yield started


@pytest.fixture(scope="module")
def speech():
    """Turns 4 and 5 of the sample with half a second of silence around them, (samples,) int16."""
    turns = [turn["waveform"] for turn in load_sample_conversation()[4:6]]
    silence = np.zeros(RATE // 2, dtype=np.float32)
    return (np.concatenate([silence, turns[0], silence, turns[1], silence]) * 32767).astype("<i2")


@contextmanager
def opened(server, session, headers=None, **settings):
    """A connection whose settings were sent."""
    url = f"{server.address.replace('http', 'ws')}/sessions/{session}/live"
    headers = {"Authorization": f"Bearer {TOKEN}"} if headers is None else headers
    with connect(url, additional_headers=headers, proxy=None, open_timeout=HANGS, close_timeout=HANGS) as socket:
        socket.send(json.dumps(settings))
        yield socket


def frames_of(stream, frame=FRAME):
    return [stream[first : first + frame].tobytes() for first in range(0, len(stream), frame)]


def rows_of(server, session, frames, **settings):
    """What is answered to frames, to the end."""
    with opened(server, session, **settings) as socket:
        for frame in [*frames, END]:
            socket.send(frame)
        return [json.loads(row) for row in socket]


def to_the_end(socket):
    """What still comes, and the frame by which the server closes."""
    rows = []
    while True:
        try:
            rows.append(json.loads(socket.recv(timeout=HANGS)))
        except websockets.ConnectionClosed as closed:
            return rows, closed.rcvd


def wanted_rows(model, blocks):
    """Start and values of each turn, as a tracker gives them."""
    tracker = EmotionTracker.from_pretrained(model)
    return [(round(start, 3), tracker.update(turn, RATE).values) for start, turn in spoken_turns(blocks)]


def as_floats(stream):
    return stream.astype(np.float32) / 2**15


@pytest.mark.parametrize("frame", [160, 7_001])
def test_each_turn_gets_the_trackers_numbers_when_it_ends(server, saved_model, speech, frame):
    rows = rows_of(server, f"call-{frame}", frames_of(speech, frame), speaker="anna")
    wanted = wanted_rows(saved_model, [as_floats(speech)])
    assert [(row["start"], row["values"]) for row in rows] == wanted
    assert len(rows) >= 2
    assert [row["turn"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(row["end"] - row["start"] == pytest.approx(row["seconds"], abs=2e-3) for row in rows)
    assert {(row["speaker"], row["partial"]) for row in rows} == {("anna", False)}
    kept = server.http.get(f"/sessions/call-{frame}").json()
    assert kept["speakers"] == {"anna": len(rows)}


def test_other_rates_are_resampled(server, saved_model, speech):
    slow = (soxr.resample(as_floats(speech), RATE, 8_000) * 32767).astype("<i2")
    stream = soxr.ResampleStream(8_000, RATE, 1, dtype="float32")
    blocks = [stream.resample_chunk(as_floats(np.frombuffer(frame, "<i2"))) for frame in frames_of(slow)]
    rows = rows_of(server, "slow", frames_of(slow), sampling_rate=8_000)
    assert [(row["start"], row["values"]) for row in rows] == wanted_rows(saved_model, blocks)


@pytest.mark.parametrize(
    ("encoding", "silence", "loudest", "bits"), [("mulaw", 0xFF, 8031, 14), ("alaw", 0xD5, 4032, 13)]
)
def test_telephone_codes_are_those_of_the_standard(encoding, silence, loudest, bits):
    decode = DECODERS[encoding][0]
    samples = decode(bytes(range(256))) * 2 ** (bits - 1)  # units of ITU-T G.711, tables 1 and 2
    assert samples.max() == loudest == -samples.min()
    assert abs(samples[silence]) <= 1
    assert decode(b"").shape == (0,)


def test_a_telephone_line_gets_the_trackers_numbers(server, saved_model, speech):
    raw = io.BytesIO()
    sf.write(raw, soxr.resample(as_floats(speech), RATE, 8_000), 8_000, format="RAW", subtype="ULAW")
    frames = frames_of(np.frombuffer(raw.getvalue(), np.uint8), 160)  # 20 ms
    stream = soxr.ResampleStream(8_000, RATE, 1, dtype="float32")
    blocks = [stream.resample_chunk(DECODERS["mulaw"][0](frame)) for frame in frames]
    rows = rows_of(server, "telephone", frames, encoding="mulaw")
    assert [(row["start"], row["values"]) for row in rows] == wanted_rows(saved_model, blocks)
    assert len(rows) >= 2


def test_partial_values_come_while_somebody_speaks_and_move_nothing(server, saved_model, speech):
    rows = rows_of(server, "partial", frames_of(speech), partial_seconds=0.5)
    finished = [row for row in rows if not row["partial"]]
    assert [(row["start"], row["values"]) for row in finished] == wanted_rows(saved_model, [as_floats(speech)])
    tracker, detector, partials = EmotionTracker.from_pretrained(saved_model), TurnDetector(), iter(rows)
    seen, reported = 0, 0.0
    for frame in frames_of(speech):
        for _, turn in detector.add(as_floats(np.frombuffer(frame, "<i2"))):
            assert not next(partials)["partial"]
            tracker.update(turn, RATE)
        spoken = detector.spoken()
        end = spoken[0] + len(spoken[1]) / RATE if spoken else 0.0
        if spoken and end - max(spoken[0], reported) >= 0.5:
            row, reported, seen = next(partials), end, seen + 1
            assert row["partial"]
            assert row["values"] == tracker.copy().update(spoken[1], RATE).values
            assert (row["start"], row["end"]) == (round(spoken[0], 3), round(end, 3))
    assert seen >= 2


def opus_packets(stream):
    encoder = av.CodecContext.create("libopus", "w")
    encoder.sample_rate, encoder.layout, encoder.format = 48_000, "mono", "s16"
    loud = (soxr.resample(as_floats(stream), RATE, 48_000).clip(-1, 1) * 32767).astype("<i2")
    packets = []
    for first in range(0, len(loud) - 960, 960):
        frame = av.AudioFrame.from_ndarray(loud[None, first : first + 960], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48_000, first
        packets += [bytes(packet) for packet in encoder.encode(frame)]
    return packets, as_floats(loud)


def test_opus_packets_are_decoded(server, saved_model, speech):
    packets, original = opus_packets(speech)
    decode, stream = opus_decoder(), soxr.ResampleStream(48_000, RATE, 1, dtype="float32")
    decoded = [decode(packet) for packet in packets]
    late = np.concatenate(decoded)[312:]  # samples at 48 kHz that libopus looks ahead
    length = min(len(late), len(original))
    assert np.corrcoef(late[:length], original[:length])[0, 1] > 0.9
    rows = rows_of(server, "opus", packets, encoding="opus")
    wanted = wanted_rows(saved_model, [stream.resample_chunk(part) for part in decoded])
    assert [(row["start"], row["values"]) for row in rows] == wanted
    assert len(rows) >= 2


PCM, OPUS = json.dumps({}), json.dumps({"encoding": "opus"})


@pytest.mark.parametrize(
    ("messages", "code", "sentence"),
    [
        ([b"\0\0"], 1008, "the first message is text: the settings, as JSON"),
        (["hello"], 1008, "the first message: Invalid JSON"),
        (['{"rate": 8000}'], 1008, "the first message: rate: Extra inputs are not permitted"),
        (['{"sampling_rate": 1}'], 1008, "sampling_rate: Input should be greater than or equal to 4000"),
        (['{"speaker": "\\ud800"}'], 1008, "the first message"),
        (['{"encoding": "mp3"}'], 1008, "encoding: Input should be 'pcm_s16le', 'mulaw', 'alaw' or 'opus'"),
        (['{"partial_seconds": NaN}'], 1008, "partial_seconds"),
        ([PCM, b"\0\0\0"], 1008, "a frame has 3 bytes; 16-bit samples need an even number"),
        ([PCM, "more"], 1008, 'after the settings come binary frames, or the text {"end": true}'),
        ([OPUS, b"\xff" * 100], 1008, "a frame is no Opus packet"),
        ([PCM, bytes(2**19)], 1009, None),
        ([PCM, b"", END], 1000, None),
        ([END], 1000, None),
    ],
)
def test_what_is_no_audio_ends_its_connection_with_a_sentence(server, messages, code, sentence):
    url = f"{server.address.replace('http', 'ws')}/sessions/hostile/live"
    with connect(url, additional_headers={"Authorization": f"Bearer {TOKEN}"}, proxy=None) as socket:
        for message in messages:
            socket.send(message)
        answers, closed = to_the_end(socket)
    assert closed.code == code
    if sentence is not None:
        assert sentence in answers[-1]["error"]
        assert answers[-1]["error"].startswith(closed.reason)
    assert server.http.get("/health").json()["status"] == "ok"
    assert server.http.get("/sessions/hostile").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"Authorization": f"Bearer {TOKEN}", "Origin": "http://elsewhere.example"}, 403)],
)
def test_strangers_and_pages_of_other_origins_are_not_let_in(server, headers, status):
    with pytest.raises(websockets.InvalidStatus) as refused:
        opened(server, "call", headers).__enter__()
    assert refused.value.response.status_code == status


def test_a_connection_that_breaks_leaves_the_session_after_its_last_turn(server, saved_model, speech):
    with opened(server, "broken") as socket:
        for frame in frames_of(speech):
            socket.send(frame)
        first = json.loads(socket.recv(timeout=HANGS))
        socket.socket.close()  # without a word
    wait_until(lambda: "mamba_ema_live_connections 0.0" in server.http.get("/metrics").text)
    assert server.http.get("/sessions/broken").json()["last"]["turn"] >= first["turn"]


def calls_at_once(server, model, number):
    """Each call has turns of its own, and two speakers that come from two connections."""
    turns = [turn["waveform"] for turn in load_sample_conversation()]
    silence = np.zeros(RATE // 2, dtype=np.float32)
    streams = []
    for call in range(number):
        parts = [turns[4] * (0.3 + 0.01 * call), turns[(call + call // 7 + 1) % 7][: 12_000 + 100 * call]]
        streams.append((np.concatenate([silence, parts[0], silence, parts[1], silence]) * 32767).astype("<i2"))
    jobs = [partial(rows_of, server, f"at-once-{call}", frames_of(stream)) for call, stream in enumerate(streams)]
    return in_threads(jobs), [wanted_rows(model, [as_floats(stream)]) for stream in streams]


@pytest.mark.parametrize("number", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_calls_at_once_do_not_hear_each_other(saved_model, number):
    with serving(saved_model, "--max-rate", 10_000, token=TOKEN) as server:
        heard, wanted = calls_at_once(server, saved_model, number)
        passes = server.http.get("/metrics").text
    for rows, numbers in zip(heard, wanted, strict=True):
        assert [row["start"] for row in rows] == [start for start, _ in numbers]
        for row, (_, values) in zip(rows, numbers):
            assert row["values"] == pytest.approx(values, abs=2e-5)
    assert len({json.dumps(numbers) for numbers in wanted}) == number  # crosstalk would be seen
    (number_of_passes,) = re.findall(r"^mamba_ema_pass_turns_count (\S+)", passes, re.MULTILINE)
    assert float(number_of_passes) < sum(len(rows) for rows in heard)  # some passes heard several calls


def test_two_speakers_of_a_call_have_a_connection_each(server, speech):
    heard = in_threads([partial(rows_of, server, "pair", frames_of(speech), speaker=name) for name in ("anna", "ben")])
    assert sorted(row["turn"] for rows in heard for row in rows) == list(range(1, 1 + sum(map(len, heard))))
    assert server.http.get("/sessions/pair").json()["speakers"] == {"anna": len(heard[0]), "ben": len(heard[1])}


def test_a_server_that_is_stopped_sends_the_turn_that_is_being_spoken(saved_model):
    turn = load_sample_conversation()[0]["waveform"]  # longer than a second
    with serving(saved_model, token=TOKEN) as server, opened(server, "call", partial_seconds=0.5) as socket:
        for frame in frames_of((turn[: RATE + RATE // 4] * 32767).astype("<i2")):
            socket.send(frame)
        assert json.loads(socket.recv(timeout=HANGS))["partial"]
        server.process.send_signal(signal.SIGTERM)
        rows, closed = to_the_end(socket)
        assert server.process.wait(HANGS) == 0
    assert (closed.code, closed.reason) == (1001, "the server is stopping")
    assert not rows[-1]["partial"]
    assert rows[-1]["turn"] == 1
