"""Where corpora come from, what their columns may be called, and what is no corpus for regression."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
from datasets import Audio, Dataset, DatasetDict

from modeling_mamba_ema.ccc_loss import MISSING_LABEL
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.data.sources import read_label_ranges
from tests.support.local_hub import hub_with_dataset
from tests.support.miniature_corpora import write_crema_d
from tests.support.models import tiny_model
from tests.support.programs import call_command, call_program, run_program
from tests.support.tiny_corpus import LABELS, write_run

ROWS = [
    {"file_name": "a.wav", "conversation_id": "c1", "turn": 1, "valence": 0.1, "arousal": 0.9, "speaker": "ann"},
    {"file_name": "b.wav", "conversation_id": "c1", "turn": 0, "valence": 0.2, "arousal": 0.8, "speaker": "bob"},
    {"file_name": "c.wav", "conversation_id": "c2", "turn": 0, "valence": None, "arousal": 0.7, "speaker": None},
]


@pytest.fixture
def folder(tmp_path):
    for number, row in enumerate(ROWS):
        noise = np.random.default_rng(number).normal(0, 0.1, 4_000 + 400 * number)
        sf.write(tmp_path / row["file_name"], noise, 16_000)
    return tmp_path


def write_table(path, rows=ROWS):
    table = pd.DataFrame(rows)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_system_give_the_same_corpus(folder, end):
    expected = contents(load_emotion_dataset(write_table(folder / "ratings.csv"), LABELS))
    lines = (folder / "ratings.csv").read_text(encoding="utf-8").splitlines()
    (folder / "same.csv").write_bytes(end.join([*lines, ""]).encode())
    assert contents(load_emotion_dataset(folder / "same.csv", LABELS)) == expected


def as_hub_dataset(folder, rows=ROWS):
    """As a dataset on the Hub holds audio: bytes in an `audio` column."""
    table = [
        {"audio": {"bytes": (folder / row["file_name"]).read_bytes(), "path": row["file_name"]}, **row} for row in rows
    ]
    for row in table:
        del row["file_name"]
    return Dataset.from_list(table).cast_column("audio", Audio(decode=False)).cast_column("audio", Audio())


def contents(splits, split="train"):
    """What a source gave, without paths: turns, labels and samples."""
    dataset = ConversationDataset(splits[split], LABELS)
    return [
        (item["turns"], item["speakers"], item["labels"].tolist(), [w.tolist() for w in item["waveforms"]])
        for item in dataset
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["metadata", "ratings"])
def test_a_table_of_each_kind_gives_the_same_corpus_by_folder_and_by_file(folder, kind, name):
    table = write_table(folder / f"{name}.{kind}")
    splits = load_emotion_dataset(folder if name == "metadata" else table, LABELS)
    assert list(splits) == ["train"]
    turns, speakers, labels, waveforms = contents(splits)[0]
    assert (turns, speakers) == ([0, 1], ["bob", "ann"])
    np.testing.assert_allclose(labels, [[0.2, 0.8], [0.1, 0.9]], atol=1e-6)
    assert [len(waveform) for waveform in waveforms] == [4_400, 4_000]
    assert contents(splits)[1][2][0][0] == MISSING_LABEL


def test_an_audiofolder_a_saved_one_one_in_memory_and_one_of_bytes_give_what_the_table_gives(folder, tmp_path):
    expected = contents(load_emotion_dataset(write_table(folder / "ratings.csv"), LABELS))
    (folder / "audio" / "train").mkdir(parents=True)
    for row in ROWS:
        (folder / "audio" / "train" / row["file_name"]).write_bytes((folder / row["file_name"]).read_bytes())
    write_table(folder / "audio" / "train" / "metadata.jsonl")
    assert contents(load_emotion_dataset(folder / "audio", LABELS)) == expected
    rows = as_hub_dataset(folder)
    assert contents(load_emotion_dataset(rows, LABELS)) == expected
    assert contents(load_emotion_dataset(DatasetDict({"dev": rows}), LABELS), "dev") == expected
    rows.save_to_disk(tmp_path / "saved")
    assert contents(load_emotion_dataset(tmp_path / "saved", LABELS)) == expected


def read_from_hub(endpoint, tmp_path):
    code = (
        "from tests.data.test_sources import LABELS, contents, load_emotion_dataset\n"
        "import json\n"
        "print(json.dumps(contents(load_emotion_dataset('someone/ratings', LABELS))))"
    )
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    return run_program("-c", code, check=False, **hub)


def test_a_dataset_on_the_hub_is_read_by_its_name(folder, tmp_path):
    as_hub_dataset(folder).to_parquet(tmp_path / "train.parquet")
    files = {"data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes(), "README.md": b"Ratings"}
    with hub_with_dataset("someone/ratings", files) as endpoint:
        done = read_from_hub(endpoint, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = contents(load_emotion_dataset(write_table(folder / "ratings.csv"), LABELS))
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))


@pytest.mark.slow
def test_a_folder_of_audio_files_on_the_hub_is_read_by_its_name(folder, tmp_path):
    expected = contents(load_emotion_dataset(write_table(folder / "metadata.jsonl").parent, LABELS))
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with hub_with_dataset("someone/ratings", files) as endpoint:
        done = read_from_hub(endpoint, tmp_path)
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))


def test_the_splits_of_a_dataset_are_kept_unless_a_column_names_others(folder):
    first, second = as_hub_dataset(folder, ROWS[:2]), as_hub_dataset(folder, ROWS[2:])
    splits = load_emotion_dataset(DatasetDict({"train": first, "test": second}), LABELS)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "test": 1}
    folds = first.add_column("fold3", ["test", "test"])
    assert list(load_emotion_dataset(folds, LABELS, columns={"split": "fold3"})) == ["test"]


def test_columns_may_have_the_names_of_the_corpus(folder):
    names = {"file_name": "FileName", "conversation_id": "Call", "turn": "No", "valence": "EmoVal", "arousal": "EmoAct"}
    write_table(folder / "metadata.csv", [{names.get(key, key): value for key, value in row.items()} for row in ROWS])
    splits = load_emotion_dataset(folder, LABELS, columns=names)
    assert contents(splits) == contents(load_emotion_dataset(write_table(folder / "same.csv"), LABELS))


def test_a_column_that_is_named_goes_before_one_that_bears_the_normal_name(folder):
    write_table(folder / "metadata.csv", [{**row, "valence": 0.5, "mine": row["arousal"]} for row in ROWS])
    splits = load_emotion_dataset(folder, LABELS, columns={"valence": "mine"})
    assert splits["train"]["valence"] == splits["train"]["arousal"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"valenc": "EmoVal"}, "names 'valenc'.*did you mean 'valence'"),
        ({"valence": "EmoVal"}, "no column 'EmoVal' for valence"),
        ({"valence": "arousl"}, "no column 'arousl' for valence.*did you mean 'arousal'"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_the_nearest(folder, columns, message):
    write_table(folder / "metadata.csv")
    with pytest.raises(ValueError, match=message):
        load_emotion_dataset(folder, LABELS, columns=columns)


def test_without_conversations_every_utterance_stands_alone_and_that_is_said(folder, caplog):
    caplog.set_level(logging.INFO)
    write_table(folder / "metadata.csv", [{k: row[k] for k in ("file_name", *LABELS)} for row in ROWS])
    rows = load_emotion_dataset(folder, LABELS)["train"]
    assert [len(item) for item in ConversationDataset(rows, LABELS).items] == [1, 1, 1]
    assert "each of its 3 utterances stands alone" in caplog.text


def test_a_column_that_looks_like_conversations_is_not_passed_over(folder):
    write_table(folder / "metadata.csv", [{"conversation": row["conversation_id"], **row} for row in ROWS])
    table = pd.read_csv(folder / "metadata.csv").drop(columns="conversation_id")
    table.to_csv(folder / "metadata.csv", index=False)
    with pytest.raises(ValueError, match="no column 'conversation_id'; did you mean 'conversation'"):
        load_emotion_dataset(folder, LABELS)


def test_turns_without_numbers_are_ordered_by_their_start(folder):
    row = {"file_name": "c.wav", "conversation_id": "c", "arousal": 0}
    starts = [{"start": start, "end": start + 0.1, "valence": start} for start in (0.15, 0.0)]
    write_table(folder / "metadata.csv", [{**row, **start} for start in starts])
    rows = load_emotion_dataset(folder, LABELS)["train"]
    assert list(rows["turn"]) == [0, 1]
    assert list(rows["start"]) == [0.0, 0.15]
    table = pd.read_csv(folder / "metadata.csv").drop(columns="start")
    table.to_csv(folder / "metadata.csv", index=False)
    with pytest.raises(ValueError, match="no column 'turn'"):
        load_emotion_dataset(folder, LABELS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("happy", "has 'happy' as valence in row 1; allowed are numbers"),
        (float("inf"), "valence of turn 1 of conversation 'c1' is inf, outside"),
    ],
)
def test_a_label_that_is_no_number_is_named(folder, value, message):
    write_table(folder / "metadata.csv", [{**ROWS[0], "valence": value}, *ROWS[1:]])
    with pytest.raises(ValueError, match=message):
        load_emotion_dataset(folder, LABELS)


def test_two_tables_in_one_folder_are_not_chosen_from(folder):
    write_table(folder / "metadata.csv")
    write_table(folder / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"has metadata.csv, metadata.jsonl; name the one that is meant"):
        load_emotion_dataset(folder, LABELS)


def test_a_missing_column_is_named_with_both_ways_to_name_it(folder):
    write_table(folder / "metadata.csv", [{**row, "file_name": "a.wav", "conversation_id": None} for row in ROWS])
    table = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(table.replace("conversation_id", "call"))
    with pytest.raises(
        ValueError, match=r"share a file; data.columns can name it \(of mamba-ema evaluate: --columns\)"
    ):
        load_emotion_dataset(folder, LABELS)


def test_a_table_with_tabs_is_read(folder):
    write_table(folder / "metadata.csv", ROWS)
    wanted = load_emotion_dataset(folder, LABELS)["train"].to_list()
    table = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").unlink()
    (folder / "metadata.tsv").write_text(table.replace(",", "\t"))
    assert load_emotion_dataset(folder, LABELS)["train"].to_list() == wanted


def test_what_is_no_corpus_is_said(folder):
    with pytest.raises(ValueError, match="is no corpus: give a folder with metadata.jsonl"):
        load_emotion_dataset(folder, LABELS)
    with pytest.raises(ValueError, match="neither a file or folder here nor a dataset that the Hub gives"):
        load_emotion_dataset("/not/there", LABELS)
    with pytest.raises(ValueError, match="not a int"):
        load_emotion_dataset(3, LABELS)
    (folder / "notes.txt").write_text("valence 3")
    with pytest.raises(ValueError, match=r"notes.txt is no table that can be read"):
        load_emotion_dataset(folder / "notes.txt", LABELS)


def test_the_scale_that_the_corpus_records_goes_before_the_model_s(folder):
    write_table(folder / "metadata.csv", [{**row, "valence": 2.0, "arousal": 5.0} for row in ROWS])
    (folder / "corpus.json").write_text(json.dumps({"label_ranges": {"valence": [1, 5], "arousal": [1, 5]}}))
    assert read_label_ranges(folder) == {"valence": (1, 5), "arousal": (1, 5)}
    rows = load_emotion_dataset(folder, LABELS, {"valence": (1, 7), "arousal": (1, 7)})["train"]
    assert set(rows["valence"]) == {0.25}
    assert set(rows["arousal"]) == {1.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"label_ranges": {"valence": 5}}', "corpus.json must hold label_ranges"),
        ("[]", "corpus.json must hold label_ranges"),
        ('{"label_ranges": {"valence": [5, 1]}}', "corpus.json has valence from 5 to 1; label_ranges are"),
        ('{"label_ranges": {"valence": [NaN, 1]}}', "corpus.json has valence from nan to 1"),
        ('{"label_rangs": {"valence": [1, 5]}}', "corpus.json has 'label_rangs'; did you mean 'label_ranges'"),
    ],
)
def test_a_recorded_scale_that_is_none_is_refused(folder, text, says):
    write_table(folder / "metadata.csv", ROWS)
    (folder / "corpus.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        load_emotion_dataset(folder, LABELS)


def test_crema_d_and_tables_of_categories_are_no_regression_target(folder, tmp_path):
    with pytest.raises(ValueError, match="CREMA-D: emotion categories .* no regression target"):
        load_emotion_dataset(write_crema_d(tmp_path / "crema"), LABELS)
    write_table(folder / "metadata.csv", [{"file_name": row["file_name"], "Emotion": "happy"} for row in ROWS])
    with pytest.raises(ValueError, match=r"emotion categories only \(Emotion\), no rated dimensions: .*no regression"):
        load_emotion_dataset(folder, LABELS)


@pytest.mark.parametrize("program", ["run_finetune", "evaluate"])
def test_the_programs_end_with_that_sentence_and_without_a_traceback(tmp_path, program, capsys):
    crema = write_crema_d(tmp_path / "crema")
    if program == "run_finetune":
        code = call_program("examples/run_finetune.py", str(write_run(tmp_path / "run.yaml", crema, tmp_path / "run")))
    else:
        tiny_model().save_pretrained(tmp_path / "model")
        code = call_command("evaluate", "--model", tmp_path / "model", crema, "--output", tmp_path / "out")
    assert code == 1
    assert "no regression target" in capsys.readouterr().err


def test_a_model_is_measured_on_a_corpus_with_its_own_columns_and_without_its_bad_files(tmp_path, folder, capsys):
    rows = [{**row, "conversation_id": "c", "turn": number} for number, row in enumerate([*ROWS, ROWS[0]])]
    rows[3]["file_name"] = "gone.wav"
    write_table(folder / "ratings.csv", [{"EmoVal": row.pop("valence"), **row} for row in rows])
    tiny_model().save_pretrained(tmp_path / "model")
    command = ("evaluate", "--model", tmp_path / "model", folder / "ratings.csv", "--output", tmp_path / "out")
    assert call_command(*command, "--columns", "valence=EmoVal", "valence=arousal") == 1
    assert "--columns names one of valence twice" in capsys.readouterr().err
    command += ("--split", "train", "--columns", "valence=EmoVal")
    assert call_command(*command) == 1
    assert "gone.wav does not exist" in capsys.readouterr().err
    assert call_command(*command, "--on-bad-audio", "skip") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_turns"] == 3
    assert "gone.wav does not exist" in (tmp_path / "out" / "skipped_audio.jsonl").read_text()
