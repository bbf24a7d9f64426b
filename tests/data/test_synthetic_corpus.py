"""The synthetic corpus: deterministic, speaker-disjoint, readable."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from modeling_mamba_ema.data.synthetic_corpus import SPEAKERS, emotional_walk
from tests.support.programs import run_program


def make(folder, seed=0, conversations=5):
    """In a process of its own: eSpeak NG says the same only where it has said nothing before."""
    options = ["--output", str(folder), "--conversations", str(conversations), "--seed", str(seed)]
    run_program("-m", "modeling_mamba_ema", "prepare", "synthetic", *options)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make(folder)


@pytest.fixture(scope="module")
def rows(corpus):
    return [json.loads(line) for line in (corpus[0] / "metadata.jsonl").read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(corpus, tmp_path):
    other = make(tmp_path, seed=1, conversations=7)
    assert other["metadata.jsonl"] != corpus[1]["metadata.jsonl"]
    (tmp_path / "notes.txt").write_text("mine")
    again = make(tmp_path)  # over the other corpus, of which nothing may stay
    assert again.pop("notes.txt") == b"mine"
    assert again == corpus[1]


def test_no_speaker_is_in_two_splits(rows):
    voices = [speaker.voice.split("+")[1] for speakers in SPEAKERS.values() for speaker in speakers]
    assert len(voices) == len(set(voices))
    pairs = {(row["speaker"], row["split"]) for row in rows}
    assert len(pairs) == len({speaker for speaker, _ in pairs})
    assert {split for _, split in pairs} == {"train", "validation", "test"}


def test_turns_are_numbered_and_two_speakers_alternate(rows):
    for name in {row["conversation_id"] for row in rows}:
        turns = [row for row in rows if row["conversation_id"] == name]
        assert [row["turn"] for row in turns] == list(range(len(turns)))
        assert len({row["speaker"] for row in turns}) == 2
        assert len({row["split"] for row in turns}) == 1


def test_every_file_is_mono_speech_at_16_khz_and_both_formats_occur(corpus, rows):
    suffixes = set()
    for row in rows:
        samples, rate = sf.read(corpus[0] / row["file_name"])
        assert (rate, samples.ndim) == (16_000, 1)
        assert 0.5 < samples.size / rate < 10
        assert np.sqrt(np.mean(samples**2)) > 0.01
        suffixes.add(Path(row["file_name"]).suffix)
    assert suffixes == {".wav", ".flac"}


def test_labels_lie_on_the_declared_scale_and_salient_stretches_within_their_file(corpus, rows):
    renderings = set()
    for row in rows:
        assert 0 <= row["valence"] <= 1
        assert 0 <= row["arousal"] <= 1
        renderings.add(row["rendering"])
        if row["rendering"] == "stretch":
            seconds = sf.info(corpus[0] / row["file_name"]).duration
            assert 0 < row["salient_start"] < row["salient_end"] <= seconds + 1e-3
        else:
            assert row["salient_start"] is None
    assert renderings == {"whole", "stretch", "flat"}


def test_the_card_says_that_the_corpus_is_synthetic(corpus):
    card = (corpus[0] / "README.md").read_text()
    assert "SYNTHETIC" in card
    assert "label_scale: [0, 1]" in card


def test_emotion_drifts_within_the_scale():
    walk = emotional_walk(10_000, np.random.default_rng(0))
    assert walk.min() >= 0
    assert walk.max() <= 1
    assert np.abs(np.diff(walk, axis=0)).mean() < 0.15
    assert walk.std(axis=0).min() > 0.2
