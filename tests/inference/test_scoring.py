"""Scoring a corpus: the tracker's rows, whatever the batches, processes and interruptions."""

import io
import itertools
import json
import os
import re
import signal

import fsspec
import pandas as pd
import pytest
import soundfile as sf

from modeling_mamba_ema.audio_files import load_audio
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.inference.scoring import PLAN_FILE, ScoringOptions, read_corpus, score_corpus, score_part
from tests.support.models import tiny_model
from tests.support.programs import Forked, call_command, wait_until
from tests.support.tiny_corpus import LABELS


def by_the_tracker(model, corpus):
    """Each turn's values, one at a time."""
    tracker, values = EmotionTracker.from_pretrained(model), []
    previous = None
    for turn in corpus.to_dict("records"):
        if turn["conversation_id"] != previous:
            tracker.reset()
        previous = turn["conversation_id"]
        heard = tracker.update(load_audio(turn["file_name"]), 16_000, turn.get("speaker"))
        values.append(list(heard.values.values()))
    return values


def scores(folder):
    return pd.concat([pd.read_parquet(path) for path in sorted(folder.glob("part-*.parquet"))], ignore_index=True)


@pytest.mark.parametrize("plan", ["[1]", "{"])
def test_a_folder_with_a_damaged_plan_is_refused(saved_model, corpus, tmp_path, plan):
    (tmp_path / PLAN_FILE).write_text(plan)
    with pytest.raises(OSError, match=f"{tmp_path} cannot be used: {PLAN_FILE} is damaged"):
        score_corpus(read_corpus(str(corpus)), tmp_path, ScoringOptions(str(saved_model)))


@pytest.mark.parametrize("seconds", [0.1, 3, 1_000])
def test_rows_are_the_trackers_however_batches_are_filled(saved_model, corpus, seconds):
    turns = read_corpus(str(corpus))
    rows = pd.DataFrame(score_part(EmotionTracker.from_pretrained(saved_model), turns.to_dict("records"), seconds))
    assert list(rows["file_name"]) == list(turns["file_name"])
    expected = pd.DataFrame(by_the_tracker(saved_model, turns), columns=LABELS)
    pd.testing.assert_frame_equal(rows[LABELS], expected, atol=1.2e-4, check_dtype=False)


def test_two_processes_write_parts_of_whole_conversations_and_nothing_twice(saved_model, corpus, tmp_path, capsys):
    command = ["score", "--model", saved_model, corpus, "--output", tmp_path, "--rows-per-part", "7"]
    assert call_command(*command, "--workers", "2") == 0
    turns, rows = read_corpus(str(corpus)), scores(tmp_path)
    assert f"{len(turns)} turns in {tmp_path}, 0 of them without values" in capsys.readouterr().out
    assert list(rows["file_name"]) == list(turns["file_name"])
    expected = pd.DataFrame(by_the_tracker(saved_model, turns), columns=LABELS)
    pd.testing.assert_frame_equal(rows[LABELS], expected, atol=1.2e-4, check_dtype=False)
    assert list(rows["valence_value"]) == pytest.approx(list(1 + 6 * rows["valence"]), abs=1e-3)
    parts = [pd.read_parquet(path) for path in sorted(tmp_path.glob("part-*.parquet"))]
    assert len(parts) > 2
    for first, second in itertools.pairwise(parts):
        assert not set(first["conversation_id"]) & set(second["conversation_id"])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    (tmp_path / "part-00001.parquet").unlink()
    assert call_command(*command) == 0  # makes the missing part and no other
    pd.testing.assert_frame_equal(scores(tmp_path), rows)
    assert times.pop(tmp_path / "part-00001.parquet")
    assert times == {path: path.stat().st_mtime_ns for path in times}
    other = tmp_path / "other"
    tiny_model(label_ranges={"valence": (1, 7)}, seed=1).save_pretrained(other)
    assert call_command("score", "--model", other, *command[3:]) == 1
    message = capsys.readouterr().err
    assert f"(model {saved_model} then, {other} now; other weights of the model). Name another folder" in message
    assert call_command(*command[:-1], "8") == 1
    assert "(rows_per_part 7 then, 8 now). Name another folder, or repeat the command" in capsys.readouterr().err
    assert call_command(*command, "--split", "test") == 1
    message, test = capsys.readouterr().err, read_corpus(str(corpus), "test")
    assert (
        f"(another corpus or other rows of it, {len(turns)} turns then, {len(test)} now). Name another folder"
        in message
    )
    assert not re.search("[0-9a-f]{64}", message)


def test_bad_audio_is_a_row_with_its_reason_and_the_conversation_goes_on(saved_model, tmp_path):
    noise = pd.Series(range(8_000)).sample(frac=1, random_state=0).to_numpy() / 10_000 - 0.4
    for name in ("a.wav", "b.wav", "c.wav"):
        sf.write(tmp_path / name, noise, 16_000)
    (tmp_path / "b.wav").write_bytes(b"no sound")
    sf.write(tmp_path / "d.wav", noise[:100], 16_000)
    rows = [{"file_name": f"{name}.wav", "conversation_id": "one", "turn": turn} for turn, name in enumerate("abcd")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    turns = read_corpus(str(tmp_path))
    assert score_corpus(turns, tmp_path / "scores", ScoringOptions(str(saved_model))) == (4, 2)
    table = scores(tmp_path / "scores")
    assert list(table["error"].isna()) == [True, False, True, False]
    assert "b.wav" in table["error"][1]
    assert "d.wav lasts 0.00625 s; an utterance lasts 0.025 to 30 s" in table["error"][3]
    score_corpus(turns.iloc[::2], tmp_path / "good", ScoringOptions(str(saved_model)))
    assert list(scores(tmp_path / "good").dtypes) == list(table.dtypes)  # so that all parts can be read as one
    expected = by_the_tracker(saved_model, turns.iloc[[0, 2]])
    assert table["valence"][2] == pytest.approx(expected[1][0], abs=1.2e-4)


def test_a_folder_of_audio_files_gives_each_a_conversation_of_its_own(corpus, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("train_0_0.wav", "train_1_0.wav"):
        (tmp_path / "in" / name).write_bytes((corpus / name).read_bytes())
    turns = read_corpus(str(tmp_path))
    assert [os.path.basename(name) for name in turns["file_name"]] == ["train_0_0.wav", "train_1_0.wav"]
    assert turns["conversation_id"].is_unique


def test_an_audiofolder_with_tables_in_its_splits_keeps_its_conversations(corpus, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        rows = [f"{split}_3_{turn}.wav,c,{turn}" for turn in range(4)]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,conversation_id,turn", *rows]))
        for turn in range(4):
            (tmp_path / split / f"{split}_3_{turn}.wav").write_bytes((corpus / f"{split}_3_{turn}.wav").read_bytes())
    assert read_corpus(str(tmp_path))["conversation_id"].nunique() == 2


def test_a_folder_without_audio_is_refused_with_what_is_read(saved_model, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert call_command("score", "--model", saved_model, tmp_path / "in", "--output", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "in holds neither audio files (.wav, .flac, .mp3" in message
    assert "nor a table that names them, such as metadata.csv with the column file_name" in message


def test_a_table_comes_from_standard_input(saved_model, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(corpus)
    rows = [{"file_name": f"train_3_{turn}.wav", "conversation_id": "007", "turn": turn} for turn in range(4)]
    by_rows = {}
    for name, text in {
        "csv": pd.DataFrame(rows).to_csv(index=False),
        "jsonl": "\n".join(map(json.dumps, rows)),
    }.items():
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert call_command("score", "--model", saved_model, "-", "--output", tmp_path / name) == 0
        by_rows[name] = scores(tmp_path / name)
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        capsys.readouterr()
        assert call_command("predict", "--model", saved_model, "--json", "-") == 0
        predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["arousal"] for row in predicted] == list(by_rows[name]["arousal"])
    pd.testing.assert_frame_equal(by_rows["csv"], by_rows["jsonl"])
    assert list(by_rows["csv"]["file_name"]) == [str(corpus / row["file_name"]) for row in rows]


def test_corpus_audio_and_output_in_a_store_give_the_rows_of_local_files(saved_model, corpus, tmp_path):
    store = fsspec.filesystem("memory")
    for path in corpus.iterdir():
        store.pipe_file(f"/bucket/corpus/{path.name}", path.read_bytes())
    store.rm("/bucket/corpus/test_0_0.wav")
    options, turns = ScoringOptions(str(saved_model), rows_per_part=20), read_corpus("memory://bucket/corpus")
    local = read_corpus(str(corpus))
    score_corpus(local, tmp_path, options)
    for _ in range(2):  # the second time all is there
        assert score_corpus(turns, "memory://bucket/scores", options) == (len(turns), 1)
    parts = sorted(store.glob("/bucket/scores/part-*.parquet"))
    rows = pd.concat([pd.read_parquet(store.open(part)) for part in parts], ignore_index=True)
    wanted = scores(tmp_path)
    names = wanted["file_name"].str.replace(str(corpus), "memory:///bucket/corpus", regex=False)
    assert list(rows["file_name"]) == list(names)
    bad = rows["error"].notna()
    assert list(rows["error"][bad]) == ["memory:///bucket/corpus/test_0_0.wav does not exist"]
    pd.testing.assert_frame_equal(rows[~bad].drop(columns="file_name"), wanted[~bad].drop(columns="file_name"))
    store.rm("/bucket/corpus/metadata.jsonl")
    assert list(read_corpus("memory://bucket/corpus")["file_name"]) == sorted(set(rows["file_name"][~bad]))


def test_a_run_that_is_killed_leaves_whole_parts_and_goes_on(saved_model, corpus, tmp_path):
    command = ["score", "--model", saved_model, corpus, "--output", tmp_path, "--rows-per-part", "1"]
    running = Forked("-m", "modeling_mamba_ema", *command)
    wait_until(lambda: len(list(tmp_path.glob("part-*.parquet"))) >= 2, running)
    running.kill()
    running.wait()
    assert call_command(*command) == 0
    assert list(scores(tmp_path)["file_name"]) == list(read_corpus(str(corpus))["file_name"])


# A process that is killed when a part is written and does not have its name yet.
KILLED = """
import os, signal, sys
from modeling_mamba_ema.__main__ import main
name = os.replace
os.replace = lambda old, new: os.kill(os.getpid(), signal.SIGKILL) if "part-00001" in str(new) else name(old, new)
main(sys.argv[1:])
"""


def test_a_part_that_a_killed_process_was_writing_is_not_read_with_the_others(saved_model, corpus, tmp_path):
    command = ["score", "--model", saved_model, corpus, "--output", tmp_path, "--rows-per-part", "7"]
    assert Forked("-c", KILLED, *command).wait() == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if "part-00001" in path.name)
    assert left.stat().st_size > 0
    assert call_command(*command) == 0
    assert list(pd.read_parquet(tmp_path)["file_name"]) == list(read_corpus(str(corpus))["file_name"])
