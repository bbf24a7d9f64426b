"""A corpus as conversations of turns: windows, labels on the unit scale, and what is refused."""

import json

import numpy as np
import pytest
import soundfile as sf
from datasets import Dataset

from modeling_mamba_ema import audio_files
from modeling_mamba_ema.audio_files import load_audio
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from tests.support.tiny_corpus import LABELS


def test_windows_cut_conversations_in_order_and_lose_no_turn(corpus):
    rows = load_emotion_dataset(corpus, LABELS)["train"]
    windows = ConversationDataset(rows, LABELS, turns_per_item=3)
    assert [index for item in windows.items for index in item] == list(range(len(rows)))
    assert max(len(item) for item in windows.items) == 3
    for item in windows.items:
        assert len({rows[index]["conversation_id"] for index in item}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{k: v for k, v in row.items() if k != "arousal"} for row in rows], "no column 'arousal'"),
        (lambda rows: [{("Valence" if k == "valence" else k): v for k, v in row.items()} for row in rows], "'Valence'"),
        (lambda rows: [{**row, "turn": 0} for row in rows], "turn 0 of conversation 'a' twice"),
        (
            lambda rows: [{**row, "valence": 4.0} for row in rows],
            r"valence of turn 0 .* is 4, outside its scale \[0, 1\]",
        ),
    ],
)
def test_a_corpus_that_is_not_in_the_normal_form_is_refused(tmp_path, change, message):
    rows = [
        {"file_name": f"{turn}.wav", "conversation_id": "a", "turn": turn, "valence": 0.5, "arousal": 0.5}
        for turn in range(2)
    ]
    Dataset.from_list(change(rows)).to_json(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match=message):
        load_emotion_dataset(tmp_path, LABELS)


def test_labels_are_brought_to_the_unit_scale_and_missing_ones_marked(tmp_path):
    rows = [
        {"file_name": "a.wav", "conversation_id": "a", "turn": 0, "valence": 1.0, "arousal": None},
        {"file_name": "b.wav", "conversation_id": "a", "turn": 1, "valence": 4.0, "arousal": 7.05},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    loaded = load_emotion_dataset(tmp_path, LABELS, {"valence": (1, 7), "arousal": (1, 7)})["train"]
    assert list(loaded["valence"]) == [0.0, 0.5]
    assert list(loaded["arousal"]) == [-100.0, 1.0]


def test_turns_of_one_recording_are_read_from_it_opened_once(tmp_path, monkeypatch):
    rate, opened = 16_000, []
    sf.write(tmp_path / "call.mp3", np.random.default_rng(0).normal(0, 0.1, (6 * rate, 2)).clip(-1, 1), rate)
    places = [(4.0, 4.5, 1), (1.0, 1.5, 2), (2.0, 2.75, None)]
    rows = [
        {"file_name": "call.mp3", "conversation_id": "a", "turn": turn, "start": start, "end": end, "channel": channel}
        for turn, (start, end, channel) in enumerate(places)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({**row, "valence": 0.5}) for row in rows))
    dataset = ConversationDataset(load_emotion_dataset(tmp_path, ["valence"])["train"], ["valence"])
    expected = [load_audio(tmp_path / "call.mp3", *place) for place in places]
    recording = audio_files.Recording.__init__
    monkeypatch.setattr(
        audio_files.Recording, "__init__", lambda self, *given: (opened.append(given), recording(self, *given))[1]
    )
    for waveform, wanted in zip(dataset[0]["waveforms"], expected, strict=True):
        np.testing.assert_allclose(waveform, wanted, atol=1e-6)
    assert len(opened) == 1
