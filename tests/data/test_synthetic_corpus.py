"""The synthetic corpus: deterministic, speaker-disjoint, readable, and labels that only the voice tells."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from modeling_mamba_ema.data.categories import CorpusError
from modeling_mamba_ema.data.synthetic_corpus import (
    SPEAKERS,
    Synthesizer,
    coupled_walks,
    draw_words,
    emotional_walk,
    express,
    say,
    synthesise_corpus,
    write_synthetic_corpus,
)
from tests.support.programs import run_program


def make(folder, seed=0, conversations=5, coupling=1):
    """In a process of its own: eSpeak NG says the same only where it has said nothing before."""
    options = ["--output", folder, "--conversations", conversations, "--seed", seed, "--coupling", coupling]
    run_program("-m", "modeling_mamba_ema", "prepare", "synthetic", *map(str, options))
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
        assert 2 < samples.size / rate < 8
        level = 20 * np.log10(np.sqrt(np.mean(samples**2)))
        assert level == pytest.approx(row["level_db"], abs=1)
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


def test_no_label_can_be_told_from_noise_level_length_or_file_format():
    turns = list(synthesise_corpus(60, seed=0))
    measured = {
        "signal-to-noise ratio": [level_range(turn.waveform) for turn in turns],
        "ratio that was drawn": [60.0 if turn.conditions.snr_db is None else turn.conditions.snr_db for turn in turns],
        "level": [np.log(np.sqrt(np.mean(turn.waveform**2))) for turn in turns],
        "peak": [np.abs(turn.waveform).max() for turn in turns],
        "length": [turn.waveform.size for turn in turns],
        "format": [turn.file_format == "wav" for turn in turns],
        "room": [turn.conditions.reverberation for turn in turns],
        "band": [turn.conditions.band == "full" for turn in turns],
        "position": [turn.turn for turn in turns],
    }
    for label in ("valence", "arousal"):
        values = [getattr(turn, label) for turn in turns]
        found = {name: np.corrcoef(values, column)[0, 1] for name, column in measured.items()}
        assert max(map(abs, found.values())) < 0.2, (label, found)


def level_range(waveform):
    """An estimate of the signal-to-noise ratio: between loud and quiet frames of 20 ms, in dB."""
    power = np.mean(waveform[: waveform.size // 320 * 320].reshape(-1, 320).astype(float) ** 2, axis=1)
    low, high = np.percentile(10 * np.log10(power + 1e-9), [5, 95])
    return high - low


def test_the_voice_tells_the_emotion():
    synthesizer, speaker = Synthesizer(), SPEAKERS["train"][0]

    def spoken(valence, arousal):
        expression = express(valence, arousal)
        return say(synthesizer, "the train is at nine this morning", speaker, expression, np.random.default_rng(0))

    calm, excited = spoken(0.5, 0.1), spoken(0.5, 0.9)
    assert excited.size < 0.8 * calm.size  # faster
    assert brightness(excited) > 1.3 * brightness(calm)
    assert np.std(excited) > 2 * np.std(calm)  # louder, beside the neutral phrases of a turn
    rough, pleasant = (modulation(spoken(valence, 0.5)) for valence in (0.05, 0.95))
    assert rough[70] > 3 * pleasant[70]
    assert pleasant[6] > 2 * rough[6]


def brightness(waveform):
    """Centre of the power spectrum in Hz."""
    power = np.abs(np.fft.rfft(waveform)) ** 2
    return power @ np.fft.rfftfreq(waveform.size, 1 / 16_000) / power.sum()


def modulation(waveform):
    """Strength of the modulation of loudness at 6 and 70 Hz."""
    envelope = np.convolve(np.abs(waveform), np.ones(64) / 64, "same")
    seconds = np.arange(waveform.size) / 16_000
    strength = {hertz: np.abs(np.mean(envelope * np.exp(2j * np.pi * hertz * seconds))) for hertz in (6, 70)}
    return {hertz: value / envelope.mean() for hertz, value in strength.items()}


@pytest.mark.parametrize("count", [1.0, 3.0, 8.0, 20.0])
def test_sentences_have_the_length_that_was_asked_for(count):
    generator = np.random.default_rng(0)
    lengths = [len(draw_words(count, opening, generator)) for opening in (False, True) for _ in range(50)]
    assert np.mean(lengths) == pytest.approx(max(6.7 * count, 9), abs=3)


def test_coupling_says_how_much_two_speakers_feel_the_same():
    def correlation(coupling):
        random = np.random.default_rng(0)
        pairs = np.concatenate([coupled_walks(2, coupling, random)[None] for _ in range(3000)])  # (pairs, speakers, 2)
        assert pairs.std(axis=0).min() > 0.2
        assert pairs.min() >= 0
        assert pairs.max() <= 1
        return np.corrcoef(pairs[:, 0, 1], pairs[:, 1, 1])[0, 1]

    alone, half, together = map(correlation, (0.0, 0.5, 1.0))
    assert abs(alone) < 0.06
    assert alone + 0.3 < half < together - 0.3
    assert np.array_equal(coupled_walks(9, 1.0, np.random.default_rng(1)), emotional_walk(9, np.random.default_rng(1)))


def test_each_speaker_of_an_uncoupled_conversation_drifts_alone(tmp_path):
    make(tmp_path, conversations=3, coupling=0)
    assert "--coupling 0`" in (tmp_path / "README.md").read_text()
    for line in (tmp_path / "metadata.jsonl").read_text().splitlines():
        assert 0 <= json.loads(line)["arousal"] <= 1
    with pytest.raises(ValueError, match=r"coupling is 1.5; allowed are numbers from 0 to 1"):
        next(synthesise_corpus(3, seed=0, coupling=1.5))


def test_emotion_drifts_within_the_scale():
    walk = emotional_walk(10_000, np.random.default_rng(0))
    assert walk.min() >= 0
    assert walk.max() <= 1
    assert np.abs(np.diff(walk, axis=0)).mean() < 0.15
    assert walk.std(axis=0).min() > 0.2


def test_audio_of_another_corpus_is_not_removed(tmp_path):
    (tmp_path / "mine.wav").write_bytes(b"speech")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "mine.wav"}\n')
    with pytest.raises(CorpusError, match=r"holds a metadata.jsonl of another corpus; name another folder"):
        write_synthetic_corpus(tmp_path, 3, 0)
    assert (tmp_path / "mine.wav").read_bytes() == b"speech"
