"""`mamba-ema report`: worse recordings are as bad as they say, gaps are told from chance, leaks of labels are named."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.__main__ import main
from modeling_mamba_ema.behaviour import CONDITIONS, NO_SPEECH, correlations, measure_changes, measure_groups
from modeling_mamba_ema.behaviour.page import _ccc
from modeling_mamba_ema.data.recording_conditions import level_of_speech
from modeling_mamba_ema.data.text_files import json_text
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.metrics import concordance_cc
from modeling_mamba_ema.publishing import prepare_release
from modeling_mamba_ema.publishing.checksums import damaged_files
from modeling_mamba_ema.sample import load_sample_conversation
from tests.support.models import predict, pretrained_model, tiny_model
from tests.support.tiny_corpus import write_corpus

RATE = 16_000
LABELS = ["valence", "arousal"]


@pytest.fixture(scope="module")
def speech():
    return load_sample_conversation()[0]["waveform"].astype(np.float64)


def under(name, speech):
    return CONDITIONS[name](speech, np.random.default_rng(0))


@pytest.mark.parametrize(("kind", "snr_db"), [("white", 30), ("pink", 20), ("speech-shaped", 10)])
def test_noise_lies_as_far_below_the_speech_as_it_says(speech, kind, snr_db):
    noise = under(f"{kind} noise, {snr_db} dB", speech) - speech
    assert 20 * np.log10(level_of_speech(speech, RATE) / np.std(noise)) == pytest.approx(snr_db, abs=0.5)


def test_other_conditions_do_what_they_are_named_after(speech):
    power = np.abs(np.fft.rfft(under("telephone, mu-law", speech))) ** 2
    frequencies = np.fft.rfftfreq(speech.size, 1 / RATE)
    assert power[frequencies > 4_100].sum() < 1e-3 * power.sum()
    for share, name in ((0.01, "1 % clipped"), (0.1, "10 % clipped")):
        changed = under(name, speech)
        assert np.mean(np.abs(changed) == np.abs(changed).max()) == pytest.approx(share, abs=0.005)
    assert under("speed 1.1", speech).size == pytest.approx(speech.size / 1.1, abs=2)
    late = under("1 s of silence before", speech)
    assert not late[:RATE].any()
    assert np.array_equal(late[RATE:], speech)
    spectra = [np.fft.rfft(sound, 2**18) for sound in (under("MP3, 16 kbit/s", speech), speech)]
    alike = np.fft.irfft(spectra[0] * spectra[1].conj()).max()  # wherever the coder's delay puts it
    assert 0.5 < alike / np.prod([np.sqrt(2 * np.sum(np.abs(half) ** 2) / 2**18) for half in spectra]) < 0.9999
    for seconds in (0.3, 0.8):
        assert under(f"room, {seconds} s", speech).shape == speech.shape
    for name in CONDITIONS:
        changed = under(name, speech)
        assert np.isfinite(changed).all(), name
    for name, sound in NO_SPEECH.items():
        assert sound.shape == (3 * RATE,), name


@pytest.mark.parametrize("kind", ["white", "pink", "speech-shaped"])
def test_more_noise_moves_what_a_pretrained_encoder_hears_farther(kind):
    speech = [turn["waveform"] for turn in load_sample_conversation()]
    model = pretrained_model(speech_encoder_pooling="attention")
    clean = predict(model, speech).pooled_output
    moved = [
        (predict(model, [under(f"{kind} noise, {db} dB", turn) for turn in speech]).pooled_output - clean).norm()
        for db in (30, 20, 10)
    ]
    assert moved == sorted(moved)
    assert moved[0] < (clean - clean.roll(1, dims=0)).norm() / 2  # one turn lies farther from another


def turns_of(groups, speakers=None):
    turns = pd.DataFrame({"conversation_id": np.arange(len(groups)) // 5, "group": groups})
    return turns if speakers is None else turns.assign(speaker=speakers)


def test_a_gap_between_groups_is_told_from_chance():
    random = np.random.default_rng(0)
    references = random.random((400, 1))
    groups = np.repeat(["a", "b"], 200)
    noise = random.normal(0, 0.1, (400, 1))
    alike = measure_groups(references + noise, references, "group", turns_of(groups), ["valence"])
    noise[200:] *= 5
    worse = measure_groups(references + noise, references, "group", turns_of(groups), ["valence"])
    assert alike["gaps"][0]["p"] > 0.05
    assert worse["gaps"][0]["p"] < 0.01
    values = {name: rows[0]["ccc"] for name, rows in worse["groups"].items()}
    assert values["b"] == pytest.approx(concordance_cc(references[200:] + noise[200:], references[200:]))
    assert worse["gaps"][0]["gap"] == pytest.approx(values["a"] - values["b"])
    # four speakers, two in each group: of six ways to share them out, two have this gap
    few = turns_of(groups, np.repeat(["s", "t", "u", "v"], 100))
    assert 0.2 < measure_groups(references + noise, references, "group", few, ["valence"])["gaps"][0]["p"] < 0.5


def test_numbers_become_thirds_and_small_groups_are_counted_only():
    random = np.random.default_rng(0)
    references, values = random.random((90, 1)), np.arange(90.0)
    found = measure_groups(references, references, "group", turns_of(values), ["valence"])
    assert [rows[0]["turns"] for rows in found["groups"].values()] == [30, 30, 30]
    assert list(found["groups"]) == ["0 to 29.7", "29.7 to 59.3", "59.3 to 89"]
    falling = measure_groups(references, references, "group", turns_of(values[::-1]), ["valence"])
    assert list(falling["groups"]) == list(found["groups"])
    few = measure_groups(references, references, "group", turns_of(["a"] * 85 + ["b"] * 5), ["valence"])
    assert few["groups"]["b"] == [{"label": "valence", "turns": 5}]
    assert few["gaps"] == []


def test_changes_and_missing_labels():
    random = np.random.default_rng(0)
    references = random.random((60, 2))
    clean = references + random.normal(0, 0.05, (60, 2))
    changed = clean + np.array([0.04, 0.2])
    references[0, 1] = -100.0
    turns = turns_of(["a"] * 60)
    valence, arousal = measure_changes(changed, clean, references, turns, LABELS)
    assert (valence["moved"], arousal["moved"]) == (0.0, 1.0)
    assert arousal["shift"] == pytest.approx(0.2)
    t = references[1:, 1]
    assert arousal["difference"] == pytest.approx(concordance_cc(changed[1:, 1], t) - concordance_cc(clean[1:, 1], t))
    assert arousal["low"] < arousal["difference"] < arousal["high"] < 0


def test_what_the_recording_and_the_speaker_give_away_is_found():
    random = np.random.default_rng(0)
    speakers = np.repeat(np.arange(20), 20)
    references = np.stack([random.random(400), random.random(20)[speakers] + random.normal(0, 0.05, 400)], axis=1)
    facts = {"snr_db": 30 * references[:, 0] + random.normal(size=400), "level_db": random.normal(size=400)}
    turns = turns_of(["a"] * 400, speakers).assign(seconds=random.random(400), **facts)
    rows = {(row["label"], row["of"]): row for row in correlations(references, references, turns, LABELS)}
    assert rows["valence", "label"]["snr_db"] > 0.95
    assert abs(rows["valence", "label"]["level_db"]) < 0.15
    assert rows["valence", "label"]["speaker"] < 0.2 < 0.9 < rows["arousal", "label"]["speaker"]
    assert rows["valence", "error"]["snr_db"] == 0.0  # there are no errors


def test_what_a_single_conversation_cannot_tell_is_left_out_and_null_in_json():
    row = {"ccc": 0.5, "low": float("nan"), "high": float("nan")}
    assert _ccc(row) == "0.500"
    assert json.loads(json_text([row]), parse_constant=pytest.fail) == [{"ccc": 0.5, "low": None, "high": None}]


def test_the_command_writes_a_page_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    table = pd.read_json(corpus / "metadata.jsonl", lines=True)
    table["seconds"] = 1.0  # a column that every recording has, too
    table["sex"] = np.where(table["conversation_id"].str[-1].astype(int) % 2, "f", "m")
    table["age (years)"], table["年"], table["性"] = "30---40", "x", "y"
    table.to_json(corpus / "metadata.jsonl", orient="records", lines=True)
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    MambaEMAFeatureExtractor().save_pretrained(tmp_path / "model")
    for name in list(CONDITIONS)[2:]:
        monkeypatch.delitem(CONDITIONS, name)
    monkeypatch.setattr("modeling_mamba_ema.behaviour.measures.MIN_TURNS", 5)
    output = tmp_path / "report"
    command = ["report", "--model", str(tmp_path / "model"), str(corpus), "--split", "train", "--output", str(output)]
    columns = ["sex", "seconds", "age (years)", "年", "性"]
    assert main([*command, "--by", *columns]) == 0, capsys.readouterr().err
    found = json.loads((output / "report.json").read_text())
    assert set(found["changes"]) == set(CONDITIONS)
    assert set(found["groups"]["sex"]["groups"]) == {"f", "m"}
    assert len(found["groups"]["seconds"]["groups"]) == 3

    tracker, predicted = EmotionTracker(model.eval(), MambaEMAFeatureExtractor()), []
    train = table[table["split"] == "train"]
    for _, turns in train.groupby("conversation_id"):
        tracker.reset()
        predicted += [tracker.update(str(corpus / name)).values["arousal"] for name in turns["file_name"]]
    expected = concordance_cc(predicted, train.sort_values(["conversation_id", "turn"])["arousal"])
    assert found["overall"][1]["ccc"] == pytest.approx(expected, abs=1e-6)
    markdown, html = ((output / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "arousal goes with level_db (+" in markdown  # this corpus says arousal by loudness
    assert "![CCC by sex](report_sex.png)" in markdown
    assert (output / "report_sex.png").exists()
    assert html.count("data:image/png;base64") == 1 + len(columns) == len(set(re.findall(r"report_\S+png", markdown)))
    assert "<td>arousal: 30---40</td>" in html
    assert "<td>white noise, 30 dB</td>" in html

    monkeypatch.setattr("modeling_mamba_ema.commands.report._predict", lambda *_: pytest.fail("predicted again"))
    assert main([*command, "--by", "sex"]) == 0
    monkeypatch.setattr("modeling_mamba_ema.behaviour.measures.MIN_TURNS", 1_000)  # more than there are
    assert main([*command, "--by", "sex"]) == 0
    few = (output / "report.md").read_text()
    assert f"| arousal | {len(train)} | - |" in few
    assert "Gap between the best and the worst group: none can be measured" in few
    monkeypatch.setattr("modeling_mamba_ema.behaviour.measures.MIN_TURNS", 5)
    capsys.readouterr()
    assert main([*command, "--by", "age"]) == 1
    message = capsys.readouterr().err
    assert "--by names age, which" in message
    assert message.count("snr_db") == 1

    assert main([*command, "--card"]) == 1
    assert "model is no folder with a README.md" in capsys.readouterr().err
    prepare_release(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    for _ in range(2):
        assert main([*command, "--by", "sex", "--card"]) == 0
    text = (tmp_path / "model" / "README.md").read_text()
    lines = text.splitlines()
    table = [row for row in markdown.splitlines() if row.startswith("| valence: f |")]
    assert [row for row in lines if row.startswith("| valence: f |")] == table
    assert len([row for row in lines if row.startswith("| white noise, 30 dB |")]) == 1
    assert text.startswith(card.rstrip())
    assert damaged_files(tmp_path / "model") == []
