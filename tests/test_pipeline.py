"""pipeline("audio-classification", ...) and the endpoint handler: what they take, refuse and answer."""

import base64
import importlib.util
import io
import json
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile as sf
import torch
from transformers import AudioClassificationPipeline, AutoFeatureExtractor, AutoModel, pipeline

from modeling_mamba_ema import InvalidAudioError, MambaEMAPipeline
from modeling_mamba_ema.publishing import prepare_release
from tests.support.models import tiny_model
from tests.support.programs import allocating_below

RATE = 16_000


def waveform(seed=0, samples=12_000):
    return np.random.default_rng(seed).normal(0, 0.1, samples).clip(-0.9, 0.9).astype(np.float32)


def file_bytes(samples, rate=RATE, format="WAV", **options):
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate, format=format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(release, tmp_path_factory):
    """A copy, since Python keeps what it compiles of the handler beside it."""
    return shutil.copytree(release, tmp_path_factory.mktemp("release") / "model")


@pytest.fixture(scope="module")
def remote(folder):
    return pipeline("audio-classification", model=str(folder), trust_remote_code=True, revision="main")


@pytest.fixture(scope="module")
def installed(folder):
    return pipeline("audio-classification", model=str(folder), pipeline_class=MambaEMAPipeline)


@pytest.fixture(scope="module")
def stock():
    """What transformers takes when it is given a model object: its own class."""
    from modeling_mamba_ema import MambaEMAFeatureExtractor

    return pipeline("audio-classification", model=tiny_model(), feature_extractor=MambaEMAFeatureExtractor())


def expected(folder, samples):
    model = AutoModel.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    with torch.no_grad():
        scores = model(**extractor(samples, sampling_rate=RATE, return_tensors="pt")).logits[0].tolist()
    return dict(zip(model.config.labels, scores))


def by_label(answer, key="score"):
    return {row["label"]: row[key] for row in answer}


@pytest.mark.promise("B-19", "pipeline, tracker, page and programs give the model's numbers", "1e-5")
def test_each_way_to_the_pipeline_gives_the_models_numbers_highest_first(folder, remote, installed, stock):
    wanted = expected(folder, waveform())
    assert type(remote).__name__ == "MambaEMAPipeline"
    assert type(remote).__module__.startswith("transformers_modules.")
    assert type(installed) is MambaEMAPipeline
    assert type(stock) is AudioClassificationPipeline
    for way in (remote, installed, stock):
        answer = way(waveform())
        assert by_label(answer) == wanted
        assert [row["score"] for row in answer] == sorted(wanted.values(), reverse=True)
        assert {key for row in answer for key in row} == {"label", "score"}
        assert abs(sum(by_label(answer).values()) - 1) > 0.01, "a softmax was here"


def test_the_task_is_found_from_the_model(folder):
    assert type(pipeline(model=str(folder), trust_remote_code=True, revision="main")).__name__ == "MambaEMAPipeline"


def test_a_softmax_is_refused(remote):
    for function in ("softmax", "sigmoid"):
        with pytest.raises(ValueError, match="regression"):
            remote(waveform(), function_to_apply=function)


def test_the_labels_own_scale_comes_on_request(remote):
    answer = remote(waveform(), return_label_values=True)
    score, value = by_label(answer)["valence"], by_label(answer, "value")["valence"]
    assert value == pytest.approx(1 + 6 * score, abs=1e-5)
    assert len(remote(waveform(), top_k=1)) == 1


@pytest.mark.promise("B-19")
@pytest.mark.parametrize("way", ["array", "raw", "tensor", "float64", "bytes", "bytearray", "undecoded", "str", "path"])
def test_every_form_of_the_same_audio_gives_the_same_numbers(folder, remote, tmp_path, way):
    samples = waveform()
    content = file_bytes(samples, subtype="FLOAT")
    (tmp_path / "turn.wav").write_bytes(content)
    forms = {
        "array": {"array": samples, "sampling_rate": RATE, "path": "ignored.wav"},
        "raw": {"raw": samples, "sampling_rate": RATE},
        "tensor": torch.from_numpy(samples),
        "float64": samples.astype(np.float64),
        "bytes": content,
        "bytearray": bytearray(content),
        "undecoded": {"bytes": content, "path": None},
        "str": str(tmp_path / "turn.wav"),
        "path": tmp_path / "turn.wav",
    }
    assert by_label(remote(forms[way], allow_paths=way in ("str", "path"))) == expected(folder, samples)


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
def test_compressed_files_are_read_without_ffmpeg(folder, remote, format):
    wanted = expected(folder, waveform())
    got = by_label(remote(file_bytes(waveform(), format=format)))
    assert got == pytest.approx(wanted, abs=1e-4 if format == "FLAC" else 0.2)


def test_other_rates_are_resampled_and_channels_of_files_averaged(folder, remote):
    seconds = np.arange(16_000 * 2) / 16_000
    tone = (0.3 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)
    wanted = expected(folder, tone)
    for rate in (8_000, 44_100, 48_000):
        times = np.arange(rate * 2) / rate
        other = (0.3 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
        assert by_label(remote({"array": other, "sampling_rate": rate})) == pytest.approx(wanted, abs=0.02)
        assert by_label(remote(other, sampling_rate=rate)) == pytest.approx(wanted, abs=0.02)
        content = file_bytes(np.stack([other, other], axis=1), rate, subtype="FLOAT")
        assert by_label(remote(content)) == pytest.approx(wanted, abs=0.02)
    content = file_bytes(np.stack([waveform(1, len(tone)), tone], axis=1), subtype="FLOAT")
    assert by_label(remote(content, channel=2)) == wanted
    with pytest.raises(ValueError, match="the audio has the channels 1 to 2, no channel 3"):
        remote(content, channel=3)


def expected_of_turns(folder, turns):
    """What the turns of one conversation get."""
    model, extractor = AutoModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**extractor([turns], sampling_rate=RATE, return_tensors="pt")).logits[0]
    return [dict(zip(model.config.labels, row)) for row in logits.tolist()]


class Decoder:
    """As torchcodec's AudioDecoder, which `datasets` gives."""

    def __init__(self, samples, rate=RATE):
        self.samples, self.rate = np.atleast_2d(samples), rate
        self.metadata = SimpleNamespace(duration_seconds=self.samples.shape[1] / rate)

    def get_all_samples(self):
        return SimpleNamespace(data=torch.from_numpy(self.samples), sample_rate=self.rate)


def test_decoded_audio_of_datasets_is_taken(folder, remote):
    two = np.stack([waveform(0), waveform(1)])
    wanted = expected(folder, waveform())
    assert by_label(remote(Decoder(waveform()))) == wanted
    assert by_label(remote(Decoder(two), channel=1)) == wanted
    assert [by_label(answer) for answer in remote([Decoder(waveform()), Decoder(waveform())], batch_size=2)] == [
        pytest.approx(wanted, abs=2e-5)
    ] * 2
    with pytest.warns(UserWarning, match="different sound"):
        assert by_label(remote(Decoder(two))) == pytest.approx(expected(folder, two.mean(axis=0)), abs=1e-5)
    with pytest.raises(ValueError, match="the audio lasts 40 s; an utterance lasts up to 30 s: .*mamba-ema timeline"):
        remote(Decoder(waveform(0, 40 * RATE)))
    with pytest.raises(ValueError, match="has the channels 1 to 2, no channel 3"):
        remote(Decoder(two), channel=3)
    (first, second) = remote(Decoder(waveform(0, 3 * RATE)), chunk_length_s=1.5)
    assert (first["timestamp"], second["timestamp"]) == ((0.0, 1.5), (1.5, 3.0))


@pytest.mark.parametrize("form", ["array", "bytes"])
def test_long_audio_is_cut_into_chunks_that_carry_the_state(folder, remote, form):
    samples = waveform(0, 35 * RATE)
    given = samples if form == "array" else file_bytes(samples, subtype="FLOAT")
    answer = remote(given, chunk_length_s=10)
    assert [turn["timestamp"] for turn in answer] == [(0.0, 10.0), (10.0, 20.0), (20.0, 30.0), (30.0, 35.0)]
    wanted = expected_of_turns(folder, [samples[at : at + 10 * RATE] for at in range(0, len(samples), 10 * RATE)])
    assert [by_label(turn["scores"]) for turn in answer] == [pytest.approx(values, abs=2e-5) for values in wanted]
    assert [turn["channel"] for turn in answer] == [None] * 4
    assert remote([given, given], chunk_length_s=10, batch_size=2) == [answer, answer]
    # Less than an utterance at the end shares with the chunk before it.
    short = remote(samples[: 10 * RATE + 100], chunk_length_s=10)
    assert [turn["timestamp"][1] for turn in short] == pytest.approx([5.003, 10.006], abs=1e-3)
    for wrong in (0.5, 31, True, -1):
        with pytest.raises(ValueError, match="allowed are 1 to 30 s"):
            remote(given, chunk_length_s=wrong)


def test_channels_are_split_into_the_turns_of_one_conversation(folder, remote, handler):
    sides = [waveform(0, 3 * RATE), waveform(1, 3 * RATE)]
    content = file_bytes(np.stack(sides, axis=1), subtype="FLOAT")
    answer = remote(content, split_channels=True)
    assert [(turn["timestamp"], turn["channel"]) for turn in answer] == [((0.0, 3.0), 1), ((0.0, 3.0), 2)]
    wanted = [pytest.approx(values, abs=2e-5) for values in expected_of_turns(folder, sides)]
    assert [by_label(turn["scores"]) for turn in answer] == wanted
    parameters = {"split_channels": True}
    assert json.loads(json.dumps(handler({"inputs": content, "parameters": parameters}))) == json.loads(
        json.dumps(answer)
    )
    assert [turn["channel"] for turn in remote(content, split_channels=True, chunk_length_s=2)] == [1, 2, 1, 2]
    assert handler({"inputs": content, "parameters": {"channel": 2}}) == remote(content, channel=2)
    with pytest.raises(ValueError, match="give one of them"):
        remote(content, split_channels=True, channel=1)
    with pytest.raises(ValueError, match="the audio has 1 channel; there is nothing to split"):
        remote(file_bytes(sides[0]), split_channels=True)
    with pytest.raises(ValueError, match="split_channels is for files"):
        remote(sides[0], split_channels=True)


@pytest.mark.parametrize("rate", [16_000.0, np.float64(16_000), torch.tensor(16_000), np.array([16_000])])
def test_a_rate_is_a_number_in_whatever_type(folder, remote, rate):
    wanted = remote(waveform())
    assert remote(waveform(), sampling_rate=rate) == wanted
    assert remote({"array": waveform(), "sampling_rate": rate}) == wanted


def test_a_wav_written_to_a_pipe_does_not_know_its_length_and_is_read_whole(folder, remote):
    content = bytearray(file_bytes(waveform(), subtype="PCM_16"))
    wanted = remote(content)
    content[40:44] = b"\xff" * 4
    assert remote(content) == wanted


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lists_tuples_generators_and_columns_are_answered_in_order(folder, remote, tmp_path, batch_size):
    clips = [waveform(seed, 6_000 + 1_000 * seed) for seed in range(6)]
    paths = []
    for number, clip in enumerate(clips):
        paths.append(str(tmp_path / f"{number}.wav"))
        sf.write(paths[-1], clip, RATE, subtype="FLOAT")
    column = datasets.Dataset.from_dict({"audio": paths}).cast_column("audio", datasets.Audio(decode=False))["audio"]
    rows = datasets.Dataset.from_list([{"audio": {"array": clip, "sampling_rate": RATE}} for clip in clips])["audio"]
    wanted = [expected(folder, clip) for clip in clips]
    for given in (clips, tuple(clips), paths, column, rows):
        answers = remote(given, batch_size=batch_size, allow_paths=given is paths or given is column)
        assert isinstance(answers, list)
        for answer, values in zip(answers, wanted, strict=True):
            assert by_label(answer) == pytest.approx(values, abs=2e-5)
    lazy = remote((clip for clip in clips), batch_size=batch_size)
    assert [by_label(answer) for answer in lazy] == [pytest.approx(values, abs=2e-5) for values in wanted]
    assert remote([]) == []


BAD = {
    "url": "https://example.org/a.wav",
    "url as path dict": {"path": "http://example.org/a.wav", "bytes": None},
    "file url": "file:///etc/passwd",
    "path": "/etc/passwd",
    "path dict": {"path": "/etc/passwd"},
    "empty bytes": b"",
    "text bytes": b"hello" * 200,
    "stereo array": np.zeros((2, 8_000), dtype=np.float32),
    "nan": np.full(8_000, np.nan),
    "short": np.zeros(399, dtype=np.float32),
    "none": None,
    "dict": {"text": "x"},
    "number": 3.0,
    "bad item of a list": [waveform(), b"nothing"],
    "no rate": {"array": waveform(), "sampling_rate": "fast"},
    "truncated": file_bytes(waveform(), format="WAV")[:9_000],
    "truncated mp3": file_bytes(waveform(), format="MP3")[:1_000],
    "no rate at all": {"array": waveform()},
    "31 seconds": file_bytes(np.zeros(31 * RATE), format="FLAC"),
    "bomb": file_bytes(np.zeros(3_600 * RATE, dtype=np.float32), format="FLAC"),
    "1 Hz": file_bytes(waveform(), rate=1),
    "no samples": file_bytes(np.zeros(0)),
    "many channels": file_bytes(np.zeros((500, 100)), subtype="PCM_16"),
}


@pytest.mark.promise("D-10")
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_refused_in_a_sentence_and_nothing_is_fetched(remote, monkeypatch, bad):
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for allow_paths in [False] if isinstance(bad, str) and "passwd" in bad else [False, True]:
        with pytest.raises((ValueError, TypeError)) as caught:
            remote(bad, allow_paths=allow_paths)
        message = str(caught.value)
        assert 10 < len(message) < 300
        assert "passwd" not in message or allow_paths
    assert not attempts


def test_audio_that_is_too_long_is_refused_before_it_is_decoded(remote):
    says = r"the audio lasts 3600 s; an utterance lasts 0.025 to 30 s: .*`mamba-ema timeline`"
    with allocating_below(20e6), pytest.raises(ValueError, match=says):  # decoded it would be 230 MB
        remote(BAD["bomb"])


@pytest.mark.promise("D-10", "the pipeline takes paths only when told to, and never fetches", "every case")
def test_a_string_is_a_path_only_when_allowed(remote, tmp_path):
    sf.write(tmp_path / "turn.wav", waveform(), RATE)
    with pytest.raises(ValueError, match="allow_paths=True"):
        remote(str(tmp_path / "turn.wav"))
    with pytest.raises(ValueError, match=r"other.wav does not exist"):
        remote(str(tmp_path / "other.wav"), allow_paths=True)
    with pytest.raises(InvalidAudioError.__mro__[1], match="URL"):
        remote("https://example.org/turn.wav", allow_paths=True)


def test_a_misspelt_argument_is_refused(remote):
    with pytest.raises(TypeError, match="return_values"):
        remote(waveform(), return_values=True)


def test_saving_from_a_pipeline_gives_a_folder_that_works(remote, tmp_path):
    assert "custom_pipelines" in json.loads(remote.model.config.to_json_string())
    remote.save_pretrained(tmp_path / "again")
    again = pipeline("audio-classification", model=str(tmp_path / "again"), trust_remote_code=True, revision="main")
    assert again(waveform()) == remote(waveform())


# Runs where neither this package nor any audio library can be imported, there is no ffmpeg, and no network.
BARE = """
import importlib.util, json, socket, sys
for name in ("modeling_mamba_ema", "soundfile", "soxr", "torchaudio", "torchcodec", "librosa", "datasets"):
    sys.modules[name] = None
def refuse(*args, **kwargs):
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
from transformers import pipeline
folder, path = sys.argv[1:]
pipe = pipeline("audio-classification", model=folder, trust_remote_code=True, revision="main")
print(json.dumps(pipe(path, allow_paths=True)))
content = open(path, "rb").read()
specification = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
print(json.dumps(module.EndpointHandler(folder)({"inputs": content})))
try:
    pipe(b"fLaC" + content)
except ValueError as error:
    print(json.dumps(str(error)))
"""


def test_without_any_audio_library_pcm_wav_is_read_by_the_standard_library(folder, tmp_path):
    samples = waveform()
    sf.write(tmp_path / "turn.wav", samples, RATE, subtype="PCM_16")
    environment = {
        "PATH": "/nonexistent",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(folder), str(tmp_path / "turn.wav")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    from_path, from_handler, refusal = map(json.loads, done.stdout.strip().splitlines())
    written, _ = sf.read(tmp_path / "turn.wav", dtype="float32")
    assert by_label(from_path) == expected(folder, written)
    assert from_handler == from_path
    assert "pip install soundfile" in refusal


@pytest.fixture(scope="module")
def handler(folder):
    """Loaded as the endpoint's toolkit does it: the file alone, by its path."""
    specification = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def test_the_endpoint_answers_for_bytes_base64_and_samples(folder, handler):
    content = file_bytes(waveform(), subtype="FLOAT")
    answer = handler({"inputs": content})
    assert by_label(answer) == expected(folder, waveform())
    assert json.loads(json.dumps(answer)) == answer
    assert handler({"inputs": base64.b64encode(content).decode()}) == answer
    samples = {"inputs": waveform().tolist(), "parameters": {"sampling_rate": RATE}}
    assert by_label(handler(samples)) == pytest.approx(by_label(answer), abs=1e-6)
    assert "value" in handler({"inputs": content, "parameters": {"return_label_values": True}})[0]


def test_intervals_come_on_request_from_a_model_that_has_them(remote, tmp_path):
    with pytest.raises(ValueError, match="the model has no intervals"):
        remote(waveform(), return_intervals=True)
    radii = {"0.5": 0.0, "0.9": 0.2}
    tiny_model(interval_radii={"valence": radii, "arousal": radii}).save_pretrained(tmp_path)
    emotion = pipeline("audio-classification", model=str(tmp_path), trust_remote_code=True, revision="main")
    for row in emotion(waveform(), return_intervals=True):
        ends = [max(0, row["score"] - 0.2), min(1, row["score"] + 0.2)]
        assert row["interval"] == pytest.approx(ends, abs=1e-6)
        assert row["confidence"] == (0.9 if abs(row["score"] - 0.5) > 0.2 else 0.5)


@pytest.fixture(scope="module")
def of_speakers(tmp_path_factory):
    path = tmp_path_factory.mktemp("speakers")
    tiny_model(context_scope="speaker", max_speakers=2).save_pretrained(path)
    prepare_release(path)
    return path


def test_turns_with_speakers_are_a_conversation(of_speakers):
    turns, names = [waveform(seed) for seed in range(4)], ["anna", "ben", None, "anna"]
    model = AutoModel.from_pretrained(of_speakers).eval()
    features = AutoFeatureExtractor.from_pretrained(of_speakers)([turns], sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**features, speaker_ids=torch.tensor([[0, 1, -1, 0]])).logits[0].numpy()
    emotion = pipeline("audio-classification", model=str(of_speakers), trust_remote_code=True, revision="main")
    answers = {"pipeline": emotion(turns, speakers=names)}
    specification = importlib.util.spec_from_file_location("handler", of_speakers / "handler.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    texts = [base64.b64encode(file_bytes(turn, subtype="FLOAT")).decode() for turn in turns]
    endpoint = module.EndpointHandler(str(of_speakers))
    answers["handler"] = endpoint({"inputs": texts, "parameters": {"speakers": names}})
    for answer in answers.values():
        assert [turn["speaker"] for turn in answer] == names
        given = [[by_label(turn["scores"])[label] for label in model.config.labels] for turn in answer]
        np.testing.assert_allclose(given, wanted, atol=2e-5)
    # The channels of a call are its speakers.
    channels = emotion(file_bytes(np.stack(turns[:2], axis=1), subtype="FLOAT"), split_channels=True)
    given = [[by_label(turn["scores"])[label] for label in model.config.labels] for turn in channels]
    np.testing.assert_allclose(given, wanted[:2], atol=2e-5)
    for inputs, speakers, message in (
        (turns, names[:3], "speakers has 3 names; a list of as many turns is needed, not 4"),
        (turns[0], ["a"], "not ndarray"),
        (turns[:3], ["a", "b", "c"], "has 3 speakers; the model keeps a context for 2"),
    ):
        with pytest.raises(ValueError, match=message):
            emotion(inputs, speakers=speakers)
    with pytest.raises(ValueError, match="with speakers: a name or null for each"):
        endpoint({"inputs": texts})
    with pytest.raises(ValueError, match="with speakers"):
        endpoint({"inputs": texts[0], "parameters": {"speakers": ["a"]}})


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"inputs": None},
        {"inputs": "/etc/passwd"},
        {"inputs": "https://example.org/a.wav"},
        {"inputs": b"no audio"},
        {"inputs": {"path": "/etc/passwd"}},
        {"inputs": [0.1] * 1_000},
        {"inputs": ["/etc/passwd"], "parameters": {"sampling_rate": RATE}},
        {"inputs": b"", "parameters": {"allow_paths": True}},
    ],
)
def test_the_endpoint_opens_no_path_and_no_url(handler, request_):
    with pytest.raises((ValueError, TypeError)) as caught:
        handler(request_)
    assert "passwd" not in str(caught.value)
