"""Long recordings: segments from files, windows and speech detection; rows as they come; constant memory."""

import csv
import itertools
import json

import numpy as np
import pytest
import soundfile as sf
import torch

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.audio_files import AudioFileError, Recording
from modeling_mamba_ema.inference import (
    EmotionTracker,
    Segment,
    TimelineWriter,
    emotion_timeline,
    read_segments,
    timeline_columns,
)
from modeling_mamba_ema.inference.voice_activity import BLOCK, detect_speech, spoken_turns
from modeling_mamba_ema.sample import load_sample_conversation
from tests.support.models import tiny_model
from tests.support.programs import run_program

RATE = 16_000


def tracker(**fields):
    return EmotionTracker(tiny_model(**fields), MambaEMAFeatureExtractor())


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """The sample conversation as one recording, a second of silence before each turn, and where its turns are."""
    parts, segments, at = [], [], 0
    for turn in load_sample_conversation():
        start = at + RATE
        at = start + turn["waveform"].size
        parts += [np.zeros(RATE, dtype=np.float32), turn["waveform"]]
        segments.append(Segment(start / RATE, at / RATE, turn["speaker"]))
    path = tmp_path_factory.mktemp("call") / "call.wav"
    sf.write(path, np.concatenate(parts), RATE, subtype="FLOAT")
    return path, segments


def values(rows):
    return np.array([list(row.heard.values.values()) for row in rows], dtype=float)


@pytest.mark.promise(
    "A-05", "longer recordings are scored in windows with the conversation's state carried over", "as the conversation"
)
def test_rows_are_the_numbers_of_the_conversation_with_its_state_carried_over_the_segments(call):
    path, segments = call
    with Recording(path) as recording:
        rows = list(emotion_timeline(tracker(label_ranges={"valence": (1, 7)}), recording, segments))
    live = tracker()
    wanted = [live.update(turn["waveform"], RATE) for turn in load_sample_conversation()]
    np.testing.assert_allclose(values(rows), [list(turn.values.values()) for turn in wanted], atol=1e-6)
    assert [(row.start, row.end, row.speaker) for row in rows] == [(s.start, s.end, s.speaker) for s in segments]
    flat = rows[0].to_dict()
    # Arousal's own scale is the unit scale, so it is there once.
    differences = ["valence_difference", "arousal_difference", "baseline_turns", "low_level", "reading"]
    assert list(flat)[:6] == ["start", "end", "speaker", "valence", "arousal", "valence_value"]
    assert [name for name in flat if name in differences] == differences
    assert list(flat) == timeline_columns(tracker(label_ranges={"valence": (1, 7)}))
    assert flat["valence_value"] == pytest.approx(1 + 6 * flat["valence"], abs=1e-3)
    assert all(len(repr(flat[name])) <= 6 for name in ("valence", "arousal", "valence_value"))


@pytest.mark.promise("A-05")
def test_long_segments_are_split_and_short_ones_have_no_values_and_leave_the_state_alone(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 70 * RATE).astype(np.float32)
    sf.write(tmp_path / "a.wav", noise, RATE, subtype="FLOAT")
    with Recording(tmp_path / "a.wav") as recording:
        short = Segment(61.0, 61.02)
        rows = list(emotion_timeline(tracker(), recording, [Segment(0, 61.0, "x"), short, Segment(62, 70.4)]))
        without = list(emotion_timeline(tracker(), recording, [Segment(0, 61.0, "x"), Segment(62, 70.4)]))
    assert [row.end - row.start for row in rows[:3]] == pytest.approx([61 / 3] * 3)
    assert [row.speaker for row in rows] == ["x", "x", "x", None, None]
    assert rows[3].heard is None
    assert {rows[3].to_dict()[name] for name in ("valence", "arousal", "valence_difference")} == {None}
    assert rows[4].end == 70.0
    assert np.array_equal(values([*rows[:3], rows[4]]), values(without))


@pytest.mark.parametrize(("window", "count"), [(10.0, 7), (30.0, 3), (1.0, 65)])
def test_windows_fill_the_recording(tmp_path, window, count):
    sf.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, round(64.3 * RATE)), RATE)
    with Recording(tmp_path / "a.wav") as recording:
        rows = list(emotion_timeline(tracker(), recording, window))
    assert len(rows) == count
    assert rows[0].start == 0
    assert rows[-1].end == pytest.approx(64.3)
    assert all(first.end == second.start for first, second in itertools.pairwise(rows))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_blocks_are_the_whole_recording_at_16_khz(tmp_path, rate):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(3.7 * rate)) / rate)
    sf.write(tmp_path / "a.wav", np.stack([tone, tone], axis=1), rate, subtype="FLOAT")
    with Recording(tmp_path / "a.wav") as recording:
        blocks = list(recording.blocks(512))
        whole = recording.read(0, 3.7)
    assert all(len(block) == 512 for block in blocks[:-1])
    np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-3)


def test_speech_is_found_where_it_is_spoken_and_threads_stay_as_they_were(call):
    path, segments = call
    torch.set_num_threads(2)
    with Recording(path) as recording:
        found = list(detect_speech(recording))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)

    def frames(stretches):
        mask = np.zeros(2_200, dtype=bool)  # 10 ms each
        for stretch in stretches:
            mask[round(100 * stretch.start) : round(100 * stretch.end)] = True
        return mask

    assert (frames(found) == frames(segments)).mean() > 0.93
    assert all(segment.speaker is None for segment in found)


def test_a_live_stream_is_cut_into_the_turns_that_a_recording_has(call):
    with Recording(call[0]) as recording:
        found = list(detect_speech(recording))
        turns = list(spoken_turns(recording.blocks(BLOCK)))
        assert len(turns) == len(found)
        for (start, waveform), segment in zip(turns, found):
            assert start == pytest.approx(segment.start, abs=0.001)
            np.testing.assert_array_equal(waveform, recording.read(segment.start, segment.end))
        # Cut by length as well: nothing lost or doubled, and of speech no more than the pause that ends it added.
        short = list(spoken_turns(recording.blocks(BLOCK), longest=1.0))
        for start, waveform in short:
            np.testing.assert_array_equal(waveform, recording.read(start, start + waveform.size / RATE))
    assert len(short) > len(turns)
    assert all(400 <= waveform.size <= 1.05 * RATE for _, waveform in short)
    covered = np.zeros(round(100 * recording.seconds) + 100)
    for start, waveform in short:
        covered[round(100 * start) : round(100 * (start + waveform.size / RATE))] += 1
    assert covered.max() <= 1
    for segment in found:
        assert covered[round(100 * segment.start) : round(100 * segment.end)].mean() > 0.97


@pytest.mark.parametrize("size", [1, 160, 512, 1_000, 48_000, None])
def test_a_live_stream_gives_the_same_turns_in_blocks_of_any_size(call, size):
    samples = sf.read(call[0], dtype="float32")[0][: 6 * RATE]
    wanted = list(spoken_turns(samples[at : at + BLOCK] for at in range(0, len(samples), BLOCK)))
    step = len(samples) if size is None else size
    blocks = (samples[at : at + step] for at in range(0, len(samples), step))
    if size == 160:  # as telephony and sound devices give them
        blocks = (np.round(block[:, None] * 2**15).astype(np.int16) for block in blocks)
    for (start, waveform), (wanted_start, wanted_waveform) in zip(spoken_turns(blocks), wanted, strict=True):
        assert start == wanted_start
        np.testing.assert_allclose(waveform, wanted_waveform, atol=2**-15)


@pytest.mark.parametrize(
    ("block", "message"),
    [(np.zeros((160, 2)), "block 1 has shape"), (np.full(160, 2e4), "block 1 holds samples that are not finite")],
)
def test_a_live_block_that_cannot_be_used_is_named(block, message):
    with pytest.raises(ValueError, match=message):
        list(spoken_turns([np.zeros(160), block]))


@pytest.fixture
def two_sided(tmp_path, call):
    """A call of two channels: the sample conversation, and the same from its middle on."""
    samples = sf.read(call[0], dtype="float32")[0][: 12 * RATE]
    sides = np.stack([samples, np.roll(samples, 5 * RATE)], axis=1)
    sf.write(tmp_path / "call.wav", sides, RATE, subtype="FLOAT")
    return tmp_path / "call.wav", sides


def test_each_segment_is_read_from_its_channel(two_sided):
    path, sides = two_sided
    segments = [Segment(1, 3, "anna", 1), Segment(2, 4, "ben", 2), Segment(4, 5.5)]
    with Recording(path, channel=2) as recording:
        rows = list(emotion_timeline(tracker(), recording, segments))
        for wrong in (0, 3):
            with pytest.raises(AudioFileError, match=f"has the channels 1 to 2, no channel {wrong}"):
                emotion_timeline(tracker(), recording, [*segments, Segment(6, 7, channel=wrong)])
    live = tracker()
    pieces = [sides[RATE : 3 * RATE, 0], sides[2 * RATE : 4 * RATE, 1], sides[4 * RATE : round(5.5 * RATE), 1]]
    np.testing.assert_allclose(values(rows), [list(live.update(piece, RATE).values.values()) for piece in pieces])


def test_channels_are_the_speakers_of_one_conversation(two_sided, call):
    path, sides = two_sided
    with Recording(path) as recording:
        rows = list(emotion_timeline(tracker(), recording, 6.0, split_channels=True))
        spoken = list(detect_speech(recording, split_channels=True))
        with pytest.raises(ValueError, match="segments name their channels themselves"):
            emotion_timeline(tracker(), recording, spoken, split_channels=True)
    assert [(row.start, row.end, row.speaker) for row in rows] == [
        (start, start + 6, f"channel {channel}") for start in (0, 6) for channel in (1, 2)
    ]
    live = tracker()
    halves = [sides[start * RATE : (start + 6) * RATE, channel] for start in (0, 6) for channel in (0, 1)]
    np.testing.assert_allclose(values(rows), [list(live.update(half, RATE).values.values()) for half in halves])
    for channel in (1, 2):
        with Recording(path, channel) as recording:
            alone = [(segment.start, segment.end) for segment in detect_speech(recording)]
        found = [(segment.start, segment.end) for segment in spoken if segment.channel == channel]
        assert found == alone != []
    assert [segment.start for segment in spoken] == sorted(segment.start for segment in spoken)
    with Recording(call[0]) as recording:
        for split in (detect_speech, lambda *_, **__: emotion_timeline(tracker(), recording, 6.0, split_channels=True)):
            with pytest.raises(ValueError, match="has 1 channel; there is nothing to split"):
                split(recording, split_channels=True)


def test_segments_that_all_name_channel_1_of_several_are_warned_of(two_sided):
    with Recording(two_sided[0]) as recording, pytest.warns(UserWarning, match="all 2 speakers name channel 1 of call"):
        emotion_timeline(tracker(), recording, [Segment(1, 3, "anna", 1), Segment(2, 4, "ben", 1)])


def test_segments_are_read_from_csv_and_rttm_in_the_order_of_time(tmp_path):
    (tmp_path / "a.csv").write_text("﻿start,end,text,speaker\n3.5,4,hello,ben\n1,2.5,hi,anna\n5,6,,\n", encoding="utf-8")
    wanted = [Segment(1, 2.5, "anna"), Segment(3.5, 4, "ben"), Segment(5, 6)]
    assert read_segments(tmp_path / "a.csv") == wanted
    (tmp_path / "b.csv").write_text("end;channel;start\n0 days 00:00:02.5;2;0 days 00:00:00.5\n1;;1")
    assert read_segments(tmp_path / "b.csv") == [Segment(0.5, 2.5, channel=2), Segment(1, 1)]
    lines = [
        "SPKR-INFO call 1 <NA> <NA> <NA> unknown anna <NA> <NA>",
        "SPEAKER call B 3.5 0.5 <NA> <NA> ben <NA>",
        "SPEAKER call 1 1.0 1.5 <NA> <NA> anna <NA> <NA>",
        "SPEAKER call <NA> 5 1 <NA> <NA> <NA> <NA> <NA>",
        "SPEAKER call 0 7 0 <NA> <NA> ben <NA> 0.9",
        "",
    ]
    wanted = [Segment(1, 2.5, "anna", 1), Segment(3.5, 4, "ben", 2), Segment(5, 6), Segment(7, 7, "ben")]
    (tmp_path / "a.rttm").write_text("\n".join(lines))
    assert read_segments(tmp_path / "a.rttm", "anything") == wanted
    (tmp_path / "two.rttm").write_text("\n".join([*lines, "SPEAKER other 1 7 1 <NA> <NA> anna <NA> <NA>"]))
    assert read_segments(tmp_path / "two.rttm", "call") == wanted
    with pytest.raises(ValueError, match="call, other; none of them is third"):
        read_segments(tmp_path / "two.rttm", "third")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "begin,end\n1,2\n", "'start' and 'end' are needed"),
        ("a.csv", "", "'start' and 'end' are needed"),
        ("a.csv", "start,end\n", "no segments"),
        ("a.csv", "start,end\n1,2\n2,one\n", "line 3 of a.csv has 'one'"),
        ("a.csv", "start,end\n1,nan\n", "line 2 of a.csv has 'nan'"),
        ("a.csv", "start,end\n-1,2\n", "line 2 of a.csv has '-1'"),
        ("a.csv", "start,end\n1\n", "line 2 of a.csv has None"),
        (
            "a.csv",
            "start,end\n1,5,2,5\n",
            "line 2 of a.csv has more fields than there are columns; decimal commas need",
        ),
        ("a.csv", "start,end,start\n1,2,3\n", "a.csv has the column 'start' twice"),
        ("a.csv", "start,end\n2,1.5\n", "line 2 of a.csv runs from 2 to 1.5 s"),
        ("a.rttm", "SPEAKER call 1 1.0\n", "line 1 of a.rttm has 4 fields"),
        ("a.rttm", "SPEAKER call 1 x 1 <NA> <NA> anna <NA>\n", "line 1 of a.rttm has 'x'"),
        ("a.rttm", "SPEAKER my call 1 1 2 <NA> <NA> anna <NA> <NA>\n", "line 1 of a.rttm has 11 fields"),
        ("a.rttm", "\nSPEAKER my call 1 1 2 <NA> <NA> anna <NA>\n", "line 2 of a.rttm has 10 fields"),
        ("a.rttm", "SPEAKER call 1 1 2 <NA> <NA> anna lee <NA> <NA>\n", "line 1 of a.rttm has 11 fields"),
        ("a.rttm", "SPEAKER call 1 1 2 <NA> <NA> anna lee <NA>\n", "line 1 of a.rttm has 10 fields"),
        ("a.rttm", "SPEAKER call x 1 2 <NA> <NA> anna <NA>\n", "line 1 of a.rttm has the channel 'x'"),
    ],
)
def test_wrong_segment_files_are_refused_with_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_segments(tmp_path / name)


def test_segments_of_another_recording_are_refused_before_anything_is_scored(call):
    live = tracker()
    with Recording(call[0]) as recording:
        for bad in ([Segment(0, 1), Segment(30, 31)], [Segment(0, 1), Segment(18, 25)]):
            with pytest.raises(ValueError, match="do the segments belong to it"):
                emotion_timeline(live, recording, bad)
            with pytest.raises(ValueError, match="do the segments belong to it"):
                list(emotion_timeline(tracker(), recording, iter(bad)))
        for window in (0.5, 31.0):
            with pytest.raises(ValueError, match="allowed are 1 to 30 s"):
                emotion_timeline(live, recording, window)
    assert live.num_turns == 0


def test_recordings_that_cannot_be_used_are_refused(tmp_path):
    sf.write(tmp_path / "stereo.wav", np.zeros((RATE, 2)), RATE)
    with pytest.raises(AudioFileError, match=r"stereo.wav has the channels 1 to 2, no channel 3"):
        Recording(tmp_path / "stereo.wav", channel=3)
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * RATE)
    noise[3 * RATE] = np.nan
    sf.write(tmp_path / "nan.wav", noise, RATE, subtype="FLOAT")
    with Recording(tmp_path / "nan.wav") as recording:
        rows = emotion_timeline(tracker(), recording, 1.0)
        given = [next(rows) for _ in range(3)]
        with pytest.raises(AudioFileError, match=r"nan.wav at 3.000 to 4.000 s has a peak of nan"):
            next(rows)
    assert [row.end for row in given] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_a_written_file_is_whole_after_every_row(tmp_path, call, suffix):
    path = tmp_path / f"rows.{suffix}"
    with Recording(call[0]) as recording:
        rows = list(emotion_timeline(tracker(), recording, [*call[1][:3], Segment(5.0, 5.01)]))

    def read():
        text = path.read_text(encoding="utf-8")
        if suffix == "csv":
            return list(csv.DictReader(text.splitlines()))
        return json.loads(text) if suffix == "json" else [json.loads(line) for line in text.splitlines()]

    with TimelineWriter(path, timeline_columns(tracker())) as writer:
        assert read() == []
        for number, row in enumerate(rows, start=1):
            writer.write(row.to_dict())
            assert len(read()) == number
    for written, row in zip(read(), rows):
        given = row.to_dict()
        assert list(written) == list(given)
        if suffix == "csv":
            given = {name: "" if value is None else str(value) for name, value in given.items()}
        assert written == given
    with pytest.raises(ValueError, match=r"written as .csv, .json, .jsonl"):
        TimelineWriter(tmp_path / "rows.txt", ["start"])


MEMORY = """
import resource, sys
import numpy as np, soundfile as sf, torch
from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.audio_files import Recording
from modeling_mamba_ema.inference import EmotionTracker, TimelineWriter, emotion_timeline, timeline_columns
from modeling_mamba_ema.inference.voice_activity import detect_speech
from tests.support.models import tiny_model

torch.set_num_threads(1)
path, detect = sys.argv[1], sys.argv[2] == "vad"
tracker = EmotionTracker(tiny_model(), MambaEMAFeatureExtractor())
with Recording(path) as recording, TimelineWriter(sys.argv[3], timeline_columns(tracker)) as writer:
    segments = detect_speech(recording) if detect else 10.0
    for row in emotion_timeline(tracker, recording, segments):
        writer.write(row.to_dict())
print(tracker.num_turns, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(path, kind, output):
    """Turns scored, and the peak of resident memory in MB."""
    turns, kilobytes = map(int, run_program("-c", MEMORY, path, kind, output).stdout.split())
    return turns, kilobytes / 1024


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("kind", ["window", "vad"])
def test_an_hour_takes_no_more_memory_than_two_minutes(tmp_path, call, kind):
    minute = np.concatenate([sf.read(call[0], dtype="float32")[0]] * 4)[: 60 * RATE]
    peaks = {}
    for minutes in (2, 60):
        path = tmp_path / f"{minutes}.flac"
        with sf.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(minutes):
                file.write(minute)
        turns, peaks[minutes] = peak_memory(path, kind, tmp_path / "rows.csv")
        assert turns >= (6 * minutes if kind == "window" else 10 * minutes)
    print(kind, peaks)
    assert peaks[60] - peaks[2] < 40
