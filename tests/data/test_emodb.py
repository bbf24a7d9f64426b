"""`mamba-ema prepare emodb`: single ratings become means, deviations and counts; speakers are left out in turn."""

import json

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from modeling_mamba_ema.__main__ import main
from modeling_mamba_ema.data.corpora import CorpusError, read_corpus
from modeling_mamba_ema.data.dataset import load_emotion_dataset

SPEAKERS = ["03", "08", "09", "10", "11", "12", "13", "14", "15", "16"]
RATINGS = "sievers2019_study_5_data.csv"


@pytest.fixture
def delivered(tmp_path):
    """Two utterances of each speaker, one that nobody rated, and the study's file, which rates videos too."""
    audio, votes = tmp_path / "wav", [(0, "sa/boo_walk_sa_1_fin.mp4", "videos", 24, 71)]
    audio.mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, 8_000)
    for number, name in enumerate([f"{speaker}a01{code}" for speaker in SPEAKERS for code in ("Fa", "Wb")]):
        sf.write(audio / f"{name}.{'wav' if number % 2 else 'flac'}", noise, 16_000)
        votes += [(rater, f"{name[5]}/{name}.wav", "sounds", 10 * rater + number, 100) for rater in range(3)]
    votes.append((0, "F/03a01Fa.wav", "sounds", 6, 40))  # a second rating by the same listener
    sf.write(audio / "03a02Na.wav", noise, 16_000)
    columns = ["subID", "stimFile", "stimType", "valenceRating", "arousalRating"]
    pd.DataFrame(votes, columns=columns).to_csv(tmp_path / RATINGS, index=False)
    return audio, tmp_path / RATINGS


def test_votes_become_means_deviations_and_counts_of_listeners(delivered, tmp_path, capsys):
    output = tmp_path / "emodb"
    assert main(["prepare", "emodb", *map(str, delivered), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for named in ("Burkhardt", "CC0-1.0", "Sievers", "BSD", "acted"):
        assert named in printed
        assert named in (output / "corpus.json").read_text()
    rows = pd.read_json(output / "metadata.jsonl", lines=True, dtype={"speaker": str}).set_index("conversation_id")
    first = rows.loc["03a01Fa"]
    listeners = [(0 + 6) / 2, 10, 20]  # one of them rated twice
    assert first["valence"] == pytest.approx(np.mean(listeners))
    assert first["valence_sd"] == pytest.approx(np.std(listeners, ddof=1))
    assert first["arousal"] == pytest.approx((70 + 100 + 100) / 3)
    assert (first["raters"], first["emotion"], first["sex"], first["speaker"]) == (3, "happiness", "male", "03")
    assert rows.loc["08a01Wb", ["emotion", "sex"]].tolist() == ["anger", "female"]
    assert "dominance" not in rows.columns
    assert json.loads((output / "skipped.jsonl").read_text())["name"] == "03a02Na.wav"
    scale = json.loads((output / "corpus.json").read_text())["label_ranges"]
    assert scale == {"valence": [0, 100], "arousal": [0, 100]}
    loaded = load_emotion_dataset(output, ["valence", "arousal"], dict.fromkeys(scale, (0, 100)))
    assert loaded["test"]["arousal"][0] == pytest.approx(0.9)


def test_each_pair_of_speakers_is_tested_once_and_validated_on_once(delivered):
    audio, ratings = delivered
    rows = read_corpus("emodb", audio, 2, ratings).rows
    assert set(rows[rows["split"] == "test"]["speaker"]) == {"08", "13"}
    for split in ("test", "validation"):
        pairs = [set(rows[rows[f"split_fold{fold}"] == split]["speaker"]) for fold in range(1, 6)]
        assert sorted(speaker for pair in pairs for speaker in pair) == SPEAKERS
        assert all(len(pair) == 2 for pair in pairs)


def test_what_is_missing_is_named(delivered):
    audio, ratings = delivered
    with pytest.raises(CorpusError, match=r"mamba-ema prepare emodb AUDIO_FOLDER RATINGS.csv"):
        read_corpus("emodb", audio)
    (audio / "16a01Wb.wav").unlink()
    with pytest.raises(CorpusError, match=r"(?s)no WAV or FLAC file .*\(1\):.*16a01Wb"):
        read_corpus("emodb", audio, 1, ratings)
    pd.read_csv(ratings).drop(columns="subID").to_csv(ratings, index=False)
    with pytest.raises(CorpusError, match=r"has no column subID; there are stimFile"):
        read_corpus("emodb", audio, 1, ratings)


def test_the_real_ratings_give_the_means_that_others_computed(emodb):
    rows = read_corpus("emodb", emodb / "audio", 1, emodb / RATINGS).rows.set_index("conversation_id")
    theirs = pd.read_csv(emodb / "metadata_full.csv").set_index("conversation_id")
    assert set(rows.index) == set(theirs.index)
    theirs = theirs.loc[rows.index]
    for name, tolerance in (("valence", 1e-3), ("arousal", 1e-3), ("valence_sd", 6e-3), ("arousal_sd", 6e-3)):
        np.testing.assert_allclose(rows[name], theirs[name], atol=tolerance)
    assert (rows["raters"] == theirs["n_raters"]).all()
    assert (rows["emotion"] == theirs["emotion"]).all()
    assert (rows["sex"].str[0] == theirs["gender"]).all()
