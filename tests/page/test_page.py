"""The page over loopback: numbers of the Python API, sentences for what is wrong, limits, no reads, no leaks."""

import base64
import io
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.sample import load_sample_conversation
from tests.support.models import tiny_model

pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[page]'")

from modeling_mamba_ema.__main__ import main
from modeling_mamba_ema.page import views
from tests.support.page_client import FILE_DATA, clip, serve, tracker, wav
from tests.support.programs import in_threads, wait_until

ROOT = Path(__file__).parents[2]
RATE = 16_000


@pytest.fixture(scope="module")
def visitor():
    with serve() as visitor:
        yield visitor


def rounded(waveform):
    """As a 16-bit file holds it."""
    return sf.read(io.BytesIO(wav(waveform)), dtype="float32")[0]


def assert_same_turns(heard, expected):
    assert [turn["speaker"] for turn in heard] == [turn.speaker for turn in expected]
    for one, other in zip(heard, expected):
        for name in ("values", "label_values"):
            assert one[name] == pytest.approx(getattr(other, name), abs=2e-5)


@pytest.mark.promise("B-19")
def test_a_conversation_gets_the_numbers_of_the_python_api_and_is_drawn(visitor):
    own, speaker = tracker(), visitor.another()
    expected = [own.update(rounded(clip(seed)), RATE, speaker=name) for seed, name in enumerate(["anna", "<b>ben</b>"])]
    speaker.turns(wav(clip(0)), speaker="anna")
    answer = speaker.add_turn(wav(clip(1)), speaker="<b>ben</b>")["data"]
    audio, _, numbers, attention, trajectory, plain = answer
    assert audio is None  # the recorder is free for the next turn
    assert_same_turns(plain, expected)
    assert f"<td>{expected[1].values['arousal']:.3f}</td>" in numbers
    assert f"<td>{expected[1].label_values['valence']:.2f}</td>" in numbers
    assert "valence<br>1 to 5" in numbers
    assert "&lt;b&gt;ben&lt;/b&gt;" in numbers
    pictures = re.findall(r"data:image/png;base64,([^']+)'", attention + trajectory)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    sound = re.search(r"data:audio/wav;base64,([^']+)'", attention).group(1)
    played, rate = sf.read(io.BytesIO(base64.b64decode(sound)))
    assert rate == 16_000
    np.testing.assert_allclose(played, clip(1), atol=1e-4)


def test_the_shipped_conversation_grows_turn_by_turn(visitor):
    speaker = visitor.another()
    speaker.join("play_sample", []).raise_for_status()
    messages = list(speaker.results())
    assert sum(message["msg"] == "process_generating" for message in messages) >= 7
    own = tracker()
    expected = [own.update(turn["waveform"], RATE, speaker=turn["speaker"]) for turn in load_sample_conversation()]
    assert_same_turns(messages[-1]["output"]["data"][-1], expected)


def test_visitors_at_once_get_their_own_numbers(visitor):
    speakers = [visitor.another() for _ in range(4)]
    heard = in_threads([lambda n=n, who=who: who.turns(wav(clip(n))) for n, who in enumerate(speakers)])
    for number, turns in enumerate(heard):
        assert_same_turns(turns, [tracker().update(rounded(clip(number)), RATE, speaker="speaker A")])


def test_two_visitors_interleaved_hear_their_own_conversation(visitor):
    visitors, own = [visitor.another(), visitor.another()], [tracker(), tracker()]
    expected: list[list] = [[], []]
    for step in range(3):
        for who in (0, 1):
            heard = visitors[who].turns(wav(clip(10 * who + step)))
            expected[who].append(own[who].update(rounded(clip(10 * who + step)), RATE, speaker="speaker A"))
            assert_same_turns(heard, expected[who])


def test_starting_over_forgets_the_conversation(visitor):
    speaker = visitor.another()
    first = speaker.turns(wav(clip(0)))
    assert len(speaker.turns(wav(clip(1)))) == 2
    speaker.join("start_over", []).raise_for_status()
    list(speaker.results())
    assert speaker.turns(wav(clip(0))) == first


def test_other_rates_and_stereo_are_heard(visitor):
    assert visitor.another().turns(wav(clip(0), 8_000))[0]["seconds"] == pytest.approx(0.8)
    wanted = visitor.another().turns(wav(clip(0)))[0]["values"]
    for channels in (2, 3):
        content = wav(np.stack([clip(0)] * channels, axis=1))
        assert visitor.another().turns(content)[0]["values"] == pytest.approx(wanted, abs=1e-6)


def test_channels_of_a_file_are_averaged_chosen_or_the_speakers(visitor):
    sides = [rounded(clip(0)), rounded(clip(1))]
    content = wav(np.stack([clip(0), clip(1)], axis=1))

    def heard(channels):
        speaker = visitor.another()
        speaker.join("choose_channels", [channels, None]).raise_for_status()
        list(speaker.results())
        return speaker.turns(content)

    for channels, waveforms in {"channel 2": sides[1:], "each is a speaker": sides}.items():
        live = tracker()
        names = ["speaker A"] if len(waveforms) == 1 else ["channel 1", "channel 2"]
        wanted = [live.update(waveform, RATE, name) for waveform, name in zip(waveforms, names)]
        assert_same_turns(heard(channels), wanted)
    average = visitor.another().turns(content)[0]["values"]
    assert average == pytest.approx(tracker().update((sides[0] + sides[1]) / 2, RATE).values, abs=1e-5)
    speaker = visitor.another()
    speaker.join("choose_channels", ["each is a speaker", None]).raise_for_status()
    list(speaker.results())
    assert "has 1 channel; there is nothing to split" in speaker.add_turn(wav(clip(0)))["error"]


def test_silence_is_named(visitor):
    answer = visitor.another().add_turn(wav(np.zeros(16_000)))["data"]
    assert "near silence" in answer[2]
    assert answer[-1][0]["low_level"] is True


SPEECH = wav(clip(0))
NAN, LOUD = clip(0).copy(), 100 * clip(0)
NAN[7] = np.nan
HEADER_OF_1_HZ = SPEECH[:24] + (1).to_bytes(4, "little") + SPEECH[28:]
BROKEN = {
    "empty": (b"", "no audio file"),
    "text": (b"no audio", "no audio file"),
    "web page": (b"<html><body>404</body></html>", "no audio file"),
    "archive": (b"PK\x03\x04" + bytes(100), "no audio file"),
    "header only": (SPEECH[:44], "truncated: 0 of 12800 bytes"),
    "no frames": (wav(np.zeros(0)), "no samples"),
    "one sample": (wav(np.zeros(1)), "an utterance lasts 0.025 to 30 s"),
    "399 samples": (wav(clip(0)[:399]), "lasts 0.0249375 s"),
    "NaN": (wav(NAN, subtype="FLOAT"), "finite"),
    "infinite": (wav(np.where(np.isnan(NAN), np.inf, NAN), subtype="FLOAT"), "finite"),
    "unscaled": (wav(LOUD, subtype="FLOAT"), r"within \[-1, 1\]"),
    "1 Hz": (HEADER_OF_1_HZ, "1 Hz|lasts|claims"),
    "1000 channels": (wav(np.zeros((80, 1000))), "1000 channels"),
    "31 s": (wav(np.zeros(31 * 4_000), 4_000), "lasts 31 s"),
    "one hour": (wav(np.zeros(3_600 * 8_000, dtype=np.int16), 8_000, format="FLAC"), "lasts 3600 s"),
    "truncated": (wav(clip(0), format="FLAC")[:4_000], "truncated|decoded"),
    "garbled mp3": (b"ID3\x04" + bytes(2_000), "no audio file|no samples"),
}


@pytest.mark.promise("D-05", "a broken file is a sentence without paths", "every case")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_sentence_without_paths(visitor, name):
    content, words = BROKEN[name]
    message = visitor.another().add_turn(content, name="my turn.wav")["error"]
    assert message, "a null error tells a person nothing"
    assert re.search(words, message), message
    assert message.endswith(".")
    assert len(message) < 300
    assert "Traceback" not in message
    assert "/" not in message, message


def test_a_broken_file_leaves_the_conversation_as_it_was(visitor):
    own, speaker = tracker(), visitor.another()
    expected = [own.update(rounded(clip(seed)), RATE, speaker="speaker A") for seed in (0, 1)]
    speaker.turns(wav(clip(0)))
    for name in ("text", "NaN", "399 samples"):
        assert speaker.add_turn(BROKEN[name][0])["error"]
    assert_same_turns(speaker.turns(wav(clip(1))), expected)


@pytest.mark.parametrize("speaker", ["", "   ", "x" * 41, 7, ["a"], {"a": 1}, None])
def test_a_speaker_without_a_name_is_a_sentence(visitor, speaker):
    assert "Name the speaker" in visitor.another().add_turn(SPEECH, speaker=speaker)["error"]


def test_no_file_is_a_sentence(visitor):
    assert visitor.another().send(None)["error"] == "Record or upload a turn first."


def test_a_long_or_odd_file_name_is_no_harm(visitor):
    for name in (
        "x" * 180 + ".wav",
        "../../up.wav",
        "<img src=x onerror=alert(1)>.wav",
        "zürich 日本.wav",
        "no_suffix",
    ):
        message = visitor.another().add_turn(b"broken", name=name)["error"]
        assert message
        assert len(message) < 300
        assert "<" not in message
    assert visitor.another().turns(SPEECH, name="zürich 日本")


class Canary(BaseHTTPRequestHandler):
    visits = 0

    def do_GET(self):
        Canary.visits += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SPEECH)

    def log_message(self, *_):
        pass


@pytest.mark.promise("D-06", "no path or URL trick reads a file or opens a connection", "0 reads, 0 connections")
def test_no_file_of_the_server_is_read_and_no_address_is_visited(visitor, tmp_path, monkeypatch):
    canary = HTTPServer(("127.0.0.1", 0), Canary)
    threading.Thread(target=canary.serve_forever, daemon=True).start()
    secret = tmp_path / "secret.wav"
    secret.write_bytes(SPEECH)  # a file that could be scored, were it read
    own = ROOT / "modeling_mamba_ema" / "sample" / "turn0_anna.wav"
    url = f"http://127.0.0.1:{canary.server_port}/x.wav"
    asked: list[str] = []
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host) or resolve(host, *rest, **more)
    )
    connect = socket.socket.connect

    def watched(self, address):
        asked.append(address[0] if isinstance(address, tuple) else str(address))
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    (uploaded,) = visitor.upload(SPEECH).json()
    forms = [
        str(secret),
        str(own),
        "/etc/passwd",
        "/proc/self/environ",
        "../../../../etc/passwd",
        f"{Path(uploaded).parent}/../../../etc/passwd",
        f"{Path(uploaded).parent}/../../../{secret}",
        "~/.bashrc",
        "modeling_mamba_ema/page/page.py",
        f"file://{secret}",
        url,
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/x.wav",
        "ftp://127.0.0.1/x.wav",
        "https://hf.co.invalid/x.wav",
        "\x00",
    ]
    try:
        for form in forms:
            for audio in ({"path": form, "meta": FILE_DATA}, {"path": "x", "url": form, "meta": FILE_DATA}, form):
                answer = visitor.another().send(audio)
                assert not answer.get("data"), form
                assert "root:" not in str(answer)
        for form in forms[:9]:
            assert visitor.http.get(f"/file={form}").status_code in (400, 403, 404, 422), form
    finally:
        canary.shutdown()
    assert Canary.visits == 0
    assert {host for host in asked if host not in ("127.0.0.1", "localhost")} == set()


def assert_cheap(action, record_property):
    """While an action runs, the process grows by less than 100 MB; the seconds it took are reported."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs Linux's /proc")
    Path("/proc/self/clear_refs").write_text("5")
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text()).group(1))
    seconds = action()
    growth = (int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) - before) / 1024
    record_property("figure", f"{seconds:.2f} s, {growth:.0f} MB")
    assert growth < 100


@pytest.mark.promise(
    "D-04", "files over the limit, and small ones that unpack to gigabytes, are refused", "under 100 MB"
)
def test_a_file_one_byte_over_the_limit_is_refused_at_once(visitor, record_property):
    content = bytes(10 * 1024 * 1024 + 1)

    def refuse():
        begin = time.perf_counter()
        answer = visitor.upload(content)
        assert answer.status_code == 413
        assert "maximum allowed size" in answer.text
        return time.perf_counter() - begin

    assert_cheap(refuse, record_property)
    assert visitor.upload(content[:-1]).status_code == 200


BOMBS = {
    # 115 MB of samples as float32
    "flac": (wav(np.zeros((48_000 * 300, 2), dtype=np.int16), 48_000, format="FLAC"), "lasts 300 s"),
    "1 Hz": BROKEN["1 Hz"],
    "one hour": BROKEN["one hour"],
}


@pytest.mark.promise("D-04")
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(visitor, name, record_property):
    content, words = BOMBS[name]
    assert len(content) < 200_000
    speaker = visitor.another()

    def refuse():
        begin = time.perf_counter()
        assert re.search(words, speaker.add_turn(content, name="bomb")["error"])
        return time.perf_counter() - begin

    assert_cheap(refuse, record_property)


@pytest.mark.promise("D-03", "a full queue is a 503 with text, and the page answers again", "as stated")
def test_a_full_queue_is_a_503_and_the_page_answers_again(record_property):
    with serve(queue_size=2) as visitor:
        crowd = [visitor.another() for _ in range(12)]
        (path,) = visitor.upload(SPEECH).json()
        audio = {"path": path, "meta": FILE_DATA}
        answers = in_threads([lambda who=who: who.join("add_turn", [audio, "a", None]) for who in crowd])
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 503}
        assert all("Queue is full" in answer.text for answer in answers if answer.status_code == 503)
        for who, code in zip(crowd, codes):
            if code == 200:
                assert list(who.results())[-1]["output"]["data"]
        begin = time.perf_counter()
        assert visitor.another().turns(SPEECH)
        seconds = time.perf_counter() - begin
    refused = codes.count(503)
    record_property("figure", f"{refused} of {len(codes)} refused, answered again after {seconds:.1f} s")


@pytest.mark.promise("D-08", "a closed tab frees its conversation", "as stated")
def test_a_closed_tab_frees_its_conversation(visitor, record_property):
    speaker = visitor.another()
    with speaker.http.stream("GET", f"/heartbeat/{speaker.session}") as stream:
        heartbeats = stream.iter_raw()
        next(heartbeats)
        speaker.turns(SPEECH)
        assert speaker.session in visitor.page.state_holder.session_data
    closed = time.monotonic()
    wait_until(lambda: speaker.session not in visitor.page.state_holder.session_data)
    record_property("figure", f"after {time.monotonic() - closed:.0f} s")


def test_uploads_are_set_to_be_deleted_and_gone_when_the_page_closes():
    with serve() as visitor:
        frequency, age = visitor.page.delete_cache
        assert frequency + age <= 600
        (path,) = visitor.upload(SPEECH).json()
        assert Path(path).is_file()
    wait_until(lambda: not Path(path).exists())


def test_the_page_listens_on_loopback_tells_nobody_and_fetches_nothing(visitor):
    assert visitor.url.startswith("http://127.0.0.1:")
    assert visitor.page.analytics_enabled is False
    html = visitor.http.get(visitor.url).text
    assert "fonts.googleapis" not in html
    assert visitor.page.share is False


@pytest.mark.promise("D-09", "a missing or incomplete model is one line at the start", "as stated")
@pytest.mark.parametrize("revision", ["main", "0123456789abcdef"])
def test_a_missing_or_incomplete_model_is_one_line_at_the_start(tmp_path, monkeypatch, capsys, revision):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5_000])
    capsys.readouterr()  # the bar that save_pretrained may show
    for name in ("nowhere/at-all", str(tmp_path / "none"), str(tmp_path)):
        assert main(["page", "--model", name, "--revision", revision]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mamba-ema: ")
        assert len(line) < 500


def test_the_table_has_intervals_and_the_call_in_words():
    radii = {"0.9": 0.01}
    model = tiny_model(interval_radii={"valence": radii, "arousal": radii})
    own = EmotionTracker(model, MambaEMAFeatureExtractor())
    turns = [own.update(clip(seed), RATE, speaker="<b>anna</b>") for seed in range(2)]
    table = views.numbers(turns, dict.fromkeys(("valence", "arousal"), (0.0, 1.0)))
    low, high = turns[1].intervals["valence"]
    assert f"<td>{turns[1].values['valence']:.3f}<br><small>{low:.2f} to {high:.2f}</small></td>" in table
    assert "<p>&lt;b&gt;anna&lt;/b&gt; (2 turns, " in table
    assert views.trajectory(turns).count("data:image/png") == 2
