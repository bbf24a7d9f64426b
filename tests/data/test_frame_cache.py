"""Cached frames: found only for what they were computed from, whole or not at all, as good as the encoder itself."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml
from safetensors.torch import load_file

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.audio_files import load_audio
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.data.frame_cache import FrameCache, FrameCacheError, encoder_key
from modeling_mamba_ema.data.utterances import Utterance, utterances_of
from modeling_mamba_ema.training import ConversationCollator, MambaEMATrainingArguments, cache_frames
from tests.support.models import tiny_model
from tests.support.programs import Forked, call_command, call_program, run_program
from tests.support.tiny_corpus import LABELS, write_run

EXTRACTOR = MambaEMAFeatureExtractor()


def frozen_model(**fields):
    return tiny_model(**{"freeze_speech_encoder": True, "speech_encoder_layers": [1, 2], **fields})


@pytest.fixture(scope="module")
def rows(corpus):
    return load_emotion_dataset(corpus, LABELS)["test"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return MambaEMATrainingArguments(output_dir=str(tmp_path_factory.mktemp("unused")))


@pytest.fixture
def audio(tmp_path):
    path = tmp_path / "turn.wav"
    sf.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    return path


# keys


def key_of(model=None, extractor=EXTRACTOR):
    return encoder_key((frozen_model() if model is None else model).speech_encoder, extractor)


def with_one_weight_changed(name):
    model = frozen_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-6
    return model


ENCODER = "mamba_ema.speech_encoder.wavlm"


@pytest.mark.parametrize(
    "change",
    [
        lambda: key_of(with_one_weight_changed(f"{ENCODER}.encoder.layers.1.feed_forward.output_dense.weight")),
        lambda: key_of(with_one_weight_changed(f"{ENCODER}.feature_extractor.conv_layers.0.conv.weight")),
        lambda: key_of(frozen_model(speech_encoder_layers=[2, 1])),
        lambda: key_of(frozen_model(speech_encoder_layers=2)),
        lambda: key_of(frozen_model(speech_encoder_config={"layer_norm_eps": 1e-6})),
        lambda: key_of(frozen_model(), MambaEMAFeatureExtractor(do_normalize=False)),
        lambda: key_of(
            frozen_model(), MambaEMAFeatureExtractor(do_normalize=False, waveform_mean=0.0, waveform_std=0.1)
        ),
        lambda: key_of(frozen_model().double()),
    ],
    ids=[
        "layer weight",
        "front end weight",
        "order of layers",
        "layers",
        "setting",
        "preprocessing",
        "corpus",
        "dtype",
    ],
)
def test_another_encoder_or_preprocessing_has_another_key(change):
    assert change() != key_of()


def test_what_frames_do_not_depend_on_leaves_the_key_as_it_is(tmp_path):
    model = frozen_model(speech_encoder_pooling="statistics", context="none", hidden_size=16)
    model.speech_encoder.backbone.load_state_dict(frozen_model().speech_encoder.backbone.state_dict())
    model.speech_encoder.backbone.masked_spec_embed.data.normal_()
    assert key_of(model) == key_of()
    model.save_pretrained(tmp_path)
    assert key_of(MambaEMAForRegression.from_pretrained(tmp_path)) == key_of()


def test_a_key_is_of_the_files_content_and_the_stretch_not_of_its_name(tmp_path, audio):
    def key(path=audio, **stretch):
        return FrameCache(tmp_path / "cache", frozen_model().speech_encoder, EXTRACTOR).key(
            Utterance(str(path), **stretch)
        )

    before = key()
    assert key(shutil.copy(audio, tmp_path / "other_name.wav")) == before
    assert len({before, key(start=0.0), key(start=0.1), key(start=0.1, end=0.5), key(end=0.5)}) == 5
    content = bytearray(audio.read_bytes())
    content[-1] ^= 1
    audio.write_bytes(content)
    assert key() != before


def test_a_file_that_is_not_there_is_named(tmp_path):
    cache = FrameCache(tmp_path / "cache", frozen_model().speech_encoder, EXTRACTOR)
    with pytest.raises(FrameCacheError, match=r"gone\.wav cannot be read"):
        cache.key(Utterance(str(tmp_path / "gone.wav")))


# entries


def test_cached_frames_are_those_of_the_encoder_and_give_its_predictions(tmp_path, rows, arguments):
    model = frozen_model()
    cache = cache_frames(model, EXTRACTOR, [rows], tmp_path, arguments)
    collate = ConversationCollator(EXTRACTOR)
    heard, cached = ConversationDataset(rows, LABELS), ConversationDataset(rows, LABELS, frame_cache=cache)
    with_audio, with_frames = (collate([data[i] for i in range(len(data))]) for data in (heard, cached))
    assert with_frames["frame_values"].dtype == torch.float16
    assert torch.equal(with_frames["turn_mask"], with_audio["turn_mask"].bool())
    names = with_audio.pop("conversation_ids")
    assert names == with_frames.pop("conversation_ids")
    with torch.no_grad():
        audio, frames = model(**with_audio), model(**with_frames)
    torch.testing.assert_close(frames.logits, audio.logits, atol=1e-3, rtol=0, equal_nan=True)
    torch.testing.assert_close(frames.loss, audio.loss, atol=1e-3, rtol=0)


def test_frames_of_a_batch_are_those_of_each_utterance_alone(tmp_path, rows, arguments, monkeypatch):
    ran = []
    model = frozen_model()
    encode = model.speech_encoder.hidden_states

    def note(waveforms, lengths, layers):
        ran.append(len(waveforms))
        return encode(waveforms, lengths, layers)

    monkeypatch.setattr(model.speech_encoder, "hidden_states", note)
    cache = cache_frames(model, EXTRACTOR, [rows], tmp_path, arguments)
    assert len(ran) == 1 < len(rows) == sum(ran)
    for utterance in utterances_of(rows):
        waveform = load_audio(utterance.file_name)
        inputs = EXTRACTOR(waveform, sampling_rate=16_000, return_tensors="pt")["input_values"]
        with torch.inference_mode():
            alone = torch.cat(encode(inputs, torch.tensor([waveform.size]), model.speech_encoder.layers))
        # To a unit in the last place of float16, in which they are kept.
        torch.testing.assert_close(cache.read(utterance).float(), alone, atol=1e-4, rtol=2**-10)


def test_the_next_start_reads_neither_audio_nor_entries_that_have_not_changed(tmp_path, rows, arguments, monkeypatch):
    cache = cache_frames(frozen_model(), EXTRACTOR, [rows], tmp_path, arguments)
    os.utime(cache.path(Utterance(rows[0]["file_name"])))
    read = []
    reading = FrameCache.read
    monkeypatch.setattr(FrameCache, "read", lambda self, utterance: read.append(utterance) or reading(self, utterance))
    monkeypatch.setattr("modeling_mamba_ema.data.frame_cache.sha256", lambda path: pytest.fail(f"{path} was read"))
    cache_frames(frozen_model(), EXTRACTOR, [rows], tmp_path, arguments)
    assert read == [Utterance(rows[0]["file_name"])]


def test_the_cache_keeps_itself_out_of_git(tmp_path, rows, arguments):
    cache_frames(frozen_model(), EXTRACTOR, [rows], tmp_path / "cache", arguments)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    status = subprocess.run(["git", "-C", str(tmp_path), "status", "--porcelain"], capture_output=True, text=True)
    assert status.stdout == ""


def test_a_second_run_computes_nothing(tmp_path, rows, arguments, monkeypatch):
    cache_frames(frozen_model(), EXTRACTOR, [rows], tmp_path, arguments)
    model = frozen_model()
    monkeypatch.setattr(model.speech_encoder, "hidden_states", lambda *_: pytest.fail("the encoder ran"))
    cache_frames(model, EXTRACTOR, [rows], tmp_path, arguments)


def flipped(content, place):
    changed = bytearray(content)
    changed[place] ^= 0x10
    return bytes(changed)


DAMAGE = {
    "empty": lambda content: b"",
    "half written": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "a flipped bit in the values": lambda content: flipped(content, -100),
    "a flipped bit in the length of the header": lambda content: flipped(content, 0),
    "another type of the same size": lambda content: content.replace(b'"F16"', b'"I16"'),
    "layers and frames exchanged": lambda content: content.replace(b'"shape":[2,', b'"shape":[1,', 1),
    "no checksum": lambda content: content.replace(b'"crc32"', b'"crc33"'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_never_used_and_computed_anew(tmp_path, rows, arguments, damage, caplog):
    model = frozen_model()
    cache = cache_frames(model, EXTRACTOR, [rows], tmp_path, arguments)
    utterance = Utterance(rows[0]["file_name"])
    path = cache.path(utterance)
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    assert path.read_bytes() != sound
    with pytest.raises(FrameCacheError, match="start the program again"):
        cache.read(utterance)
    again = cache_frames(model, EXTRACTOR, [rows], tmp_path, arguments)
    assert "1 cached entries" in caplog.text
    assert path.read_bytes() == sound
    assert torch.equal(again.read(utterance), load_file(path)["frames"])


def test_an_entry_under_anothers_name_is_not_used(tmp_path, rows, arguments):
    cache = cache_frames(frozen_model(), EXTRACTOR, [rows], tmp_path, arguments)
    one, other = (Utterance(rows[i]["file_name"]) for i in (0, 1))
    shutil.copy(cache.path(one), cache.path(other))
    assert not cache.is_sound(other)


def test_frames_beyond_the_range_of_half_precision_keep_their_values(tmp_path, audio):
    cache = FrameCache(tmp_path / "cache", frozen_model().speech_encoder, EXTRACTOR)
    frames = torch.tensor([1.0, -70_000.0]).view(1, 2, 1)
    cache.write(Utterance(str(audio)), frames)
    assert torch.equal(cache.read(Utterance(str(audio))), frames)
    with pytest.raises(FrameCacheError, match=r"NaN or infinite frames of turn\.wav"):
        cache.write(Utterance(str(audio)), frames * torch.inf)


# refusals


def test_an_encoder_that_is_trained_is_refused_before_anything_is_written(tmp_path, rows, arguments):
    with pytest.raises(FrameCacheError, match="freeze_speech_encoder=true"):
        cache_frames(tiny_model(), EXTRACTOR, [rows], tmp_path / "cache", arguments)
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_computed(tmp_path, rows, arguments, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_010_000))
    with pytest.raises(FrameCacheError, match=r"need 0\.00 GB, but .* 0\.50 GB free"):
        cache_frames(frozen_model(), EXTRACTOR, [rows], tmp_path, arguments)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_size_that_is_announced_is_the_size_on_disk(tmp_path, rows, arguments, caplog):
    caplog.set_level("INFO")
    cache = cache_frames(frozen_model(), EXTRACTOR, [rows], tmp_path, arguments)
    announced = float(caplog.text.split(" others, ")[1].split(" GB")[0]) * 1e9
    written = sum(path.stat().st_size for path in cache.folder.rglob("*.safetensors"))
    assert announced == pytest.approx(written, abs=0.005e9)


# programs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    """One run without the cache, then two at the same time that fill one cache."""
    folder = tmp_path_factory.mktemp("runs")
    run = yaml.safe_load(write_run(folder / "run.yaml", corpus, folder / "unused").read_text())
    run["model"]["params"].update(freeze_speech_encoder=True, speech_encoder_layers=[0, 1])
    (folder / "run.yaml").write_text(yaml.safe_dump(run))

    def command(name, *overrides):
        overrides = [f"training.output_dir={folder / name}", f"data.cache_folder={folder / 'cache'}", *overrides]
        return ["examples/run_finetune.py", str(folder / "run.yaml"), *overrides]

    assert call_program(*command("plain")) == 0
    together = [Forked(*command(name, "data.cache_frames=true")) for name in ("first", "second")]
    for process in together:
        assert process.wait() == 0, process.printed
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_training_from_the_cache_ends_with_the_results_of_training_without_it(runs):
    plain, cached = results(runs / "plain"), results(runs / "first")
    for split, metrics in plain.items():
        for name in ("ccc", "ccc_valence", "ccc_arousal"):
            assert cached[split][name] == pytest.approx(metrics[name], abs=1e-3), (split, name)


def test_runs_at_the_same_time_share_a_cache_without_harm(runs, corpus):
    assert results(runs / "first") == results(runs / "second")
    one, other = (load_file(runs / name / "model" / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    files = [path for path in (runs / "cache").rglob("*") if path.is_file()]
    turns = len((corpus / "metadata.jsonl").read_text().splitlines())
    assert len([path for path in files if path.suffix == ".safetensors"]) == turns
    assert not [path for path in files if path.suffix == ".part"]


def test_a_checkpoint_is_measured_from_the_cache_as_in_its_run(runs, corpus, tmp_path):
    call_command(
        *("evaluate", "--model", runs / "first" / "model", corpus, "--output", tmp_path),
        *("--cache-frames", "--cache-folder", runs / "cache", "--split", "test"),
    )
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert measured["ccc"] == pytest.approx(results(runs / "first")["test"]["ccc"], abs=1e-6)


@pytest.mark.slow
def test_two_processes_of_a_run_share_the_work(runs, tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/cpu_two_processes.yaml")
    folders = tmp_path / "cache", runs / "cache"
    run_program(
        *(*launch, "examples/run_finetune.py", str(runs / "run.yaml"), f"training.output_dir={tmp_path / 'run'}"),
        *("data.cache_frames=true", f"data.cache_folder={tmp_path / 'cache'}"),
    )
    made, expected = ({p.name: p.read_bytes() for p in f.rglob("*.safetensors")} for f in folders)
    assert made == expected
