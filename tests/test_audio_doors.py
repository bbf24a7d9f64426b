"""The same file by every door (tracker, pipeline, timeline, page, training): the same numbers, the same sentences."""

import io
import os
import threading

import numpy as np
import pytest
import soundfile as sf
from datasets import Dataset
from transformers import pipeline

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAPipeline
from modeling_mamba_ema.audio_files import AudioFileError, Recording, load_audio
from modeling_mamba_ema.data.bad_audio import scan_audio
from modeling_mamba_ema.data.dataset import ConversationDataset
from modeling_mamba_ema.inference import EmotionTracker, Segment, emotion_timeline
from tests.support.audio_formats import EVERY_SUBTYPE, FORMATS
from tests.support.models import tiny_model

RATE = 16_000


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def doors(model):
    """For each door a function of a path that gives the values by label, or raises."""
    emotion = pipeline(
        "audio-classification",
        model=model,
        feature_extractor=MambaEMAFeatureExtractor(),
        pipeline_class=MambaEMAPipeline,
    )

    def scores(answer):
        return {row["label"]: row["score"] for row in answer}

    def tracker():
        return EmotionTracker(model, MambaEMAFeatureExtractor())

    def by_timeline(path):
        with Recording(path) as recording:
            (row,) = emotion_timeline(tracker(), recording, [Segment(0.0, recording.seconds)])
        return row.heard.values

    def by_page(path):
        from modeling_mamba_ema.page.conversation import Conversation, TurnError, read_turn

        try:
            return Conversation(tracker()).add(read_turn(str(path), 30.0), "anna")[1].values
        except TurnError as error:
            raise AudioFileError(str(error).removesuffix(".")) from error

    def by_training(path):
        row = {"file_name": str(path), "conversation_id": "c", "turn": 0}
        rows = Dataset.from_list([{**row, "valence": 0.5, "arousal": 0.5}])
        for bad in scan_audio({"train": rows}, 30.0, path.parent / "known.parquet")[0]:
            raise AudioFileError(bad.reason)
        (waveform,) = ConversationDataset(rows, ["valence", "arousal"])[0]["waveforms"]
        return tracker().update(waveform, RATE).values

    def by_pipe(path):
        pipe = path.parent / "pipe" / path.name
        pipe.parent.mkdir()
        os.mkfifo(pipe)
        threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()), daemon=True).start()
        return by_timeline(pipe)

    return {
        "timeline, pipe": by_pipe,
        "tracker": lambda path: tracker().update(path).values,
        "tracker, bytes": lambda path: tracker().update(path.read_bytes()).values,
        "pipeline": lambda path: scores(emotion(path, allow_paths=True)),
        "pipeline, bytes": lambda path: scores(emotion(path.read_bytes())),
        "timeline": by_timeline,
        "page": by_page,
        "training": by_training,
    }


def noise(channels=1, rate=RATE, seconds=1.0):
    return np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate), channels)).clip(-0.9, 0.9)


def of_channels(channels, rate, format="WAV"):
    buffer = io.BytesIO()
    sf.write(buffer, noise(channels, rate), rate, format=format)
    return buffer.getvalue()


GOOD = {
    "stereo flac": lambda: of_channels(2, 44_100, "FLAC"),
    "five channels": lambda: of_channels(5, 8_000),
    **{name: lambda case=case: case.content for name, case in {**FORMATS, **EVERY_SUBTYPE}.items()},
}


@pytest.mark.filterwarnings("ignore:.*channels hold different sound")
@pytest.mark.parametrize("name", GOOD)
def test_a_file_gets_the_same_numbers_by_every_door(model, doors, tmp_path, name):
    path = tmp_path / "speech.bin"
    path.write_bytes(GOOD[name]())
    wanted = EmotionTracker(model, MambaEMAFeatureExtractor()).update(load_audio(path), RATE).values
    for door, values in doors.items():
        assert values(path) == pytest.approx(wanted, abs=1e-6), door


def cut(path):
    sf.write(path, noise(), RATE)
    path.write_bytes(path.read_bytes()[:9_000])


def with_nan(path):
    samples = noise()
    samples[500] = np.nan
    sf.write(path, samples, RATE, subtype="FLOAT")


BAD = {
    "text.wav": lambda path: path.write_text("no audio"),
    "empty.wav": lambda path: sf.write(path, noise()[:0], RATE),
    "cut.wav": cut,
    "cut.flac": cut,
    "nan.wav": with_nan,
    "slow.wav": lambda path: sf.write(path, noise(), 1),
    "nine.wav": lambda path: sf.write(path, noise(9), RATE),
    "short.wav": lambda path: sf.write(path, noise()[:399], RATE),
    "long.wav": lambda path: sf.write(path, noise(seconds=30.02), RATE),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_gets_the_same_sentence_by_every_door(doors, tmp_path, name):
    BAD[name](tmp_path / name)
    with pytest.raises(AudioFileError, match=f"^{name} ") as wanted:
        load_audio(tmp_path / name, max_seconds=30.0)
    for door, values in doors.items():
        if door.startswith("timeline") and name in ("short.wav", "long.wav"):
            continue  # a recording may be of any length
        with pytest.raises(AudioFileError) as caught:
            values(tmp_path / name)
        assert str(caught.value).replace("the audio", name) == str(wanted.value), door
