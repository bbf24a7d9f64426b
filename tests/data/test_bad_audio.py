"""Audio that cannot be used is found before training, all of it, and is left out only when asked."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from datasets import Dataset

from modeling_mamba_ema import audio_files
from modeling_mamba_ema.audio_files import AudioFileError, audio_seconds, check_audio, load_audio
from modeling_mamba_ema.data.bad_audio import describe_bad_audio, save_bad_audio, scan_audio
from modeling_mamba_ema.training import DataSection, build_datasets, load_run_configuration, load_splits
from modeling_mamba_ema.training.batches import seconds_of_turns
from tests.support.models import tiny_config
from tests.support.programs import call_program
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import write_corpus, write_run

RATE = 16_000
# What is done to the files of a corpus, and the reason the scan gives.
FAULTS = {
    "text": "no audio file that can be read",
    "truncated": "is truncated: .* bytes of sound were found",
    "nan": "has a peak of nan",
    "empty": "holds no samples",
    "missing": "does not exist",
    "short": r"lasts 0.02 s; an utterance lasts 0.025 to 30 s",
    "long": r"lasts 31 s; an utterance lasts 0.025 to 30 s",
    "truncated_flac": "is truncated|cannot be decoded",
    "one_hertz": "claims 1 Hz",
}


def spoil(path, fault):
    """Make the file bad; returns its name, which changes for another format."""
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    if fault == "text":
        path.write_text("not audio")
    elif fault == "truncated":
        sf.write(path, noise, RATE)
        path.write_bytes(path.read_bytes()[:-8_000])
    elif fault == "nan":
        noise[500] = np.nan
        sf.write(path, noise, RATE, subtype="FLOAT")
    elif fault == "empty":
        sf.write(path, noise[:0], RATE)
    elif fault == "missing":
        path.unlink(missing_ok=True)
    elif fault in ("short", "long"):
        sf.write(path, np.resize(noise, 320 if fault == "short" else 31 * RATE), RATE)
    elif fault == "one_hertz":
        sf.write(path, noise, RATE)
        content = bytearray(path.read_bytes())
        content[24:28] = (1).to_bytes(4, "little")
        path.write_bytes(content)
    else:
        path = path.with_suffix(".flac")
        sf.write(path, noise, RATE)
        path.write_bytes(path.read_bytes()[:-8_000])
    return path.name


@pytest.mark.promise("A-09")
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_with_its_reason(tmp_path, fault):
    name = spoil(tmp_path / "a.wav", fault)
    with pytest.raises(AudioFileError, match=f"^{name} .*({FAULTS[fault]})"):
        check_audio(tmp_path / name, max_seconds=30)


@pytest.mark.promise("A-09")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_scan_refuses_the_loader_refuses_too(tmp_path, fault):
    name = spoil(tmp_path / "a.wav", fault)
    with pytest.raises(AudioFileError, match=f"^{name} .*({FAULTS[fault]})"):
        load_audio(tmp_path / name, max_seconds=30)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_good_files_of_every_format_pass(tmp_path, name):
    sf.write(tmp_path / name, np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    check_audio(tmp_path / name, max_seconds=30)
    check_audio(tmp_path / name, start=0.2, end=0.8, max_seconds=0.7)


def test_a_wav_written_to_a_pipe_does_not_count_as_truncated(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"  # lengths that the writer could not know
    (tmp_path / "a.wav").write_bytes(content)
    check_audio(tmp_path / "a.wav", max_seconds=30)


def test_a_stretch_that_reaches_beyond_its_file_is_refused(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    check_audio(tmp_path / "a.wav", 0.5, 1.01, max_seconds=30)  # rounded times
    with pytest.raises(AudioFileError, match=r"lasts 1.000 s, but an utterance in it should end at 1.500 s"):
        check_audio(tmp_path / "a.wav", 0.5, 1.5, max_seconds=30)


def test_a_fault_elsewhere_in_a_long_file_costs_only_its_own_turn(tmp_path):
    call = np.random.default_rng(0).normal(0, 0.1, 3 * RATE).astype(np.float32)
    call[RATE + 5] = np.nan
    sf.write(tmp_path / "call.wav", call, RATE, subtype="FLOAT")
    turns = Dataset.from_dict(
        {
            "file_name": [str(tmp_path / "call.wav")] * 3,
            "conversation_id": ["call"] * 3,
            "turn": [0, 1, 2],
            "start": [0.0, 1.0, 2.0],
            "end": [1.0, 2.0, 3.0],
        }
    )
    bad, seconds = scan_audio({"train": turns}, 30, tmp_path / "known.parquet")
    assert seconds == {"train": [1.0, None, 1.0]}
    assert [(item.turn, item.reason) for item in bad] == [
        (1, "call.wav at 1.000 to 2.000 s has a peak of nan; samples must be finite and within [-1, 1]")
    ]


def test_a_hundred_files_are_listed_and_counted(tmp_path):
    sf.write(tmp_path / "good.wav", np.zeros(RATE), RATE)
    names = [str(tmp_path / ("good.wav" if row % 20 else f"none{row}.wav")) for row in range(100)]
    rows = Dataset.from_dict({"file_name": names, "conversation_id": names, "turn": [0] * 100})
    rows = rows.map(lambda row, index: {"turn": index}, with_indices=True)
    bad, _ = scan_audio({"train": rows}, 30, tmp_path / "known.parquet")
    assert [item.turn for item in bad] == [0, 20, 40, 60, 80]
    assert "file_name is a path from the table's folder" in describe_bad_audio(bad, {"train": rows})
    assert describe_bad_audio(bad, {"train": rows}).startswith("5 of 100 utterances cannot be used:\n  train  ")
    save_bad_audio(bad, tmp_path / "out" / "bad.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in listed] == [names[row] for row in (0, 20, 40, 60, 80)]


@pytest.fixture
def opened(monkeypatch):
    """Names of the audio files that are opened."""
    names = []
    opening = audio_files.Recording.__init__

    def note(self, source, channel=None):
        names.append(Path(source).name)
        opening(self, source, channel)

    monkeypatch.setattr(audio_files.Recording, "__init__", note)
    return names


def test_each_file_is_opened_once_at_the_first_start_and_only_changed_ones_at_the_next(tmp_path, opened):
    corpus = write_corpus(tmp_path / "corpus")
    data = DataSection(source=str(corpus), cache_folder=str(tmp_path / "cache"), on_bad_audio="skip")

    def start():
        splits = load_splits(data, tiny_config(), tmp_path)
        for dataset in build_datasets(data, splits, tiny_config()).values():
            seconds_of_turns(dataset)
        names = sorted(opened)
        opened.clear()
        return splits, names

    splits, names = start()
    assert names == sorted(path.name for path in corpus.glob("*.wav"))
    for rows in splits.values():
        assert rows["audio_seconds"][:] == [audio_seconds(name) for name in rows["file_name"][:]]
    opened.clear()
    assert start()[1] == []
    changed = corpus / "train_1_0.wav"
    changed.write_bytes(bytes(changed.stat().st_size))  # as long as before
    (corpus / "test_1_0.wav").touch()
    splits, names = start()
    assert names == ["test_1_0.wav", "train_1_0.wav"]
    assert "train_1_0" in (tmp_path / "skipped_audio.jsonl").read_text()
    data.max_seconds = 0.6  # what passed may be too long now
    assert max(start()[0]["train"]["audio_seconds"][:]) <= 0.6


@pytest.mark.parametrize("content", [b"", b"PAR1 damaged PAR1"])
def test_a_table_of_known_files_that_is_damaged_is_written_anew(tmp_path, corpus, opened, content):
    data = DataSection(source=str(corpus), cache_folder=str(tmp_path))
    load_splits(data, tiny_config(), tmp_path)
    (table,) = tmp_path.glob("audio-*.parquet")
    table.write_bytes(content)
    first = len(opened)
    load_splits(data, tiny_config(), tmp_path)
    assert len(opened) == 2 * first
    load_splits(data, tiny_config(), tmp_path)
    assert len(opened) == 2 * first


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A corpus with five bad files, over all splits; their names and faults."""
    folder = tmp_path_factory.mktemp("spoilt")
    corpus = write_corpus(folder / "corpus")
    faults = dict(zip(("train_1_0", "train_3_2", "train_6_0", "validation_2_1", "test_3_3"), FAULTS))
    for name, fault in faults.items():
        spoil(corpus / f"{name}.wav", fault)
    return corpus, faults


def finetune(folder, corpus, *overrides):
    run = write_run(folder / "run.yaml", corpus, folder / "run")
    return call_program(FINETUNE, run, "training.num_train_epochs=1", *overrides)


@pytest.mark.promise("C-04", "bad audio is listed before the first step; skipping it is recorded", "every file")
def test_training_does_not_begin_and_all_bad_files_are_listed(spoilt, tmp_path, capsys):
    corpus, faults = spoilt
    assert finetune(tmp_path, corpus) == 1
    message = capsys.readouterr().err
    assert f"5 of {len((corpus / 'metadata.jsonl').read_text().splitlines())} utterances" in message
    for name in faults:
        assert f"{name}.wav " in message
    assert "data.on_bad_audio=skip" in message
    listed = (tmp_path / "run" / "bad_audio.jsonl").read_text().splitlines()
    assert len(listed) == 5
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.promise("C-04")
def test_skipping_trains_on_the_rest_and_records_what_was_left_out(spoilt, tmp_path):
    corpus, faults = spoilt
    assert finetune(tmp_path, corpus, "data.on_bad_audio=skip") == 0
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped_audio.jsonl").read_text().splitlines()]
    assert {row["file_name"].rsplit("/", 1)[1] for row in skipped} == {f"{name}.wav" for name in faults}
    assert all(row["reason"] for row in skipped)
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for split in ("validation", "test"):
        assert results[split]["num_turns"] == sum(row["split"] == split for row in rows) - 1


def test_another_answer_than_abort_or_skip_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {on_bad_audio: ignore}")
    with pytest.raises(ValueError, match="data.on_bad_audio is 'ignore'; allowed are abort and skip"):
        load_run_configuration(tmp_path / "run.yaml")
