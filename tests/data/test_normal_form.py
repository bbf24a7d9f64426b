"""Tables as people have them become the right rows, or one sentence with row and column."""

import json
import re

import numpy as np
import pandas as pd
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.inference import Segment, read_segments
from tests.support.tiny_corpus import LABELS

ROW = {"file_name": "a.wav", "conversation_id": "c", "turn": 0, "valence": 0.5, "arousal": 0.5}


def written(folder, rows, kind="csv"):
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif kind == "csv":
        pd.DataFrame(rows, dtype=object).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def loaded(path, **options):
    return load_emotion_dataset(path, LABELS, **options)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("write", [str, "{}.0".format, " {} ".format, int, float])
def test_turns_in_whatever_type_are_ordered_as_numbers(tmp_path, kind, write):
    order = np.random.default_rng(0).permutation(12).tolist()
    rows = loaded(written(tmp_path, [{**ROW, "turn": write(turn), "valence": turn / 12} for turn in order], kind))
    assert rows["train"]["turn"][:] == list(range(12))
    np.testing.assert_allclose(rows["train"]["valence"][:], np.arange(12) / 12)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("empty", [None, "", " ", "nan"])
def test_a_row_without_split_is_refused_with_its_number(tmp_path, kind, empty):
    rows = [{**ROW, "turn": turn, "split": split} for turn, split in enumerate(["train", empty, "test"])]
    with pytest.raises(ValueError, match=f"^metadata.{kind} has no split in row 2$"):
        loaded(written(tmp_path, rows, kind))


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("0 days 00:00:00.5", "0 days 00:00:01.250000"),
        ("00:00:00.5", "00:00:01,25"),
        ("0.5", "1.25"),
        (pd.Timedelta(seconds=0.5), pd.Timedelta(seconds=1.25)),
        (np.timedelta64(500, "ms"), np.timedelta64(1_250, "ms")),
    ],
    ids=["pandas", "subtitles", "seconds", "Timedelta", "timedelta64"],
)
def test_times_as_audformat_and_pandas_write_them_are_seconds(tmp_path, start, end):
    for kind in ("csv", "parquet")[isinstance(start, np.timedelta64) :]:
        (tmp_path / kind).mkdir()
        rows = loaded(written(tmp_path / kind, [{**ROW, "start": start, "end": end}], kind))["train"]
        assert (rows["start"][:], rows["end"][:]) == ([0.5], [1.25])
    if not isinstance(start, np.timedelta64):
        (tmp_path / "a.csv").write_text(f"start\tend\n{start}\t{end}\n")
        assert read_segments(tmp_path / "a.csv") == [Segment(0.5, 1.25)]


@pytest.mark.parametrize(("text", "seconds"), [("75:30", 4_530.0), ("1:05:00", 3_900.0), ("2 days 0:00:01", 172_801.0)])
def test_clocks_may_begin_with_many_minutes_hours_or_days(tmp_path, text, seconds):
    rows = loaded(written(tmp_path, [{**ROW, "start": text, "end": 200_000}]))["train"]
    assert rows["start"][:] == [seconds]


@pytest.mark.parametrize("text", ["0:61:99", "1:60:00", "0:99", "3:75.5"])
def test_clocks_with_more_than_59_minutes_or_seconds_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=f"has '{re.escape(text)}' as start in row 1"):
        loaded(written(tmp_path, [{**ROW, "start": text, "end": 200_000}]))
    (tmp_path / "a.csv").write_text(f"start\tend\n0\t{text}\n")
    with pytest.raises(ValueError, match=f"line 2 of a.csv has '{re.escape(text)}' where seconds"):
        read_segments(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "file_name,valence,valence\na.wav,0.1,0.2\n"),
        ("a.csv", "file_name;valence;valence\na.wav;0,1;0,2\n"),
        ("a.jsonl", '{"file_name": "a.wav", "valence": 0.1, "valence": 0.2}'),
        ("a.json", '[{"file_name": "a.wav", "valence": 0.1, "valence": 0.2}]'),
    ],
)
def test_two_columns_of_one_name_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="has the column 'valence' twice"):
        loaded(tmp_path / name)


def test_conversations_may_be_numbered_anew_in_each_split(tmp_path):
    rows = [
        {**ROW, "conversation_id": 1, "turn": turn, "split": split} for split in ("train", "test") for turn in (0, 1)
    ]
    splits = loaded(written(tmp_path, rows))
    assert {name: ConversationDataset(part, LABELS).items for name, part in splits.items()} == {
        "train": [[0, 1]],
        "test": [[0, 1]],
    }
    with pytest.raises(ValueError, match="has turn 1 of conversation 1 twice, the second time in row 5"):
        loaded(written(tmp_path, [*rows, rows[1]]))


def test_labels_may_be_left_out_for_predictions_but_not_misspelt(tmp_path):
    rows = [{name: value for name, value in ROW.items() if name != "arousal"}]
    with pytest.raises(ValueError, match="has no column 'arousal'"):
        loaded(written(tmp_path, rows))
    assert loaded(written(tmp_path, rows), labels_optional=True)["train"]["arousal"][:] == [-100.0]
    with pytest.raises(ValueError, match="did you mean 'arousl'"):
        loaded(written(tmp_path, [{**rows[0], "arousl": 0.5}]), labels_optional=True)


# For each column what a value may be written as, and what is none. Missing ones are missing where that is allowed.
NUMBER = (int, float, str, "{:.1f}".format, " {} ".format)
TIME = (float, str, "0 days 00:00:{:09.6f}".format, "00:{:09.6f}".format)
WRITTEN_AS = {
    "file_name": (str,),
    "conversation_id": (int, float, str),
    "turn": NUMBER,
    "split": (str, " {}".format),
    "speaker": (str, int, " {} ".format),
    "channel": NUMBER,
    "start": TIME,
    "end": TIME,
    "valence": (float, str, "{:.6f}".format, " {}".format),
    "arousal": (float, str),
}
NEEDED = ("file_name", "conversation_id", "turn", "split")
NONE_OF_IT = {
    "turn": ["first", 1.5, "1.5", "1_0", "inf", "0x1"],
    "channel": ["left", 0, -1, 1.5],
    "start": ["soon", -1.0, "inf", "1:2:3:4"],
    "end": ["later", "-0.5"],
    "valence": ["happy", "1,5", "0.5 (high)"],
    "arousal": ["low"],
}
NOT_IN_CSV = {  # where everything is text
    "turn": [True, [1], {"n": 1}],
    "speaker": [["anna"], {"name": "anna"}, True],
    "file_name": [["a.wav"], {"path": "a.wav"}],
    "split": [False, ["train"]],
    "valence": [True, [0.5]],
    "conversation_id": [[1]],
}
MISSING = (None, "", " ", "nan", "None", float("nan"))


@st.composite
def tables(draw):
    """(kind of file, the rows that are meant, the same as written, cells that are wrong)"""
    kind = draw(st.sampled_from(["csv", "jsonl", "parquet"]))
    count = draw(st.integers(1, 6))
    turns = draw(st.permutations(range(8, 8 + count)))  # with one digit and with two
    meant, rows = [], []
    for number in range(count):
        start = draw(st.sampled_from([0.0, 0.5, 7.25]))
        meant.append(
            {
                "file_name": f"{number}.wav",
                "conversation_id": draw(st.integers(9, 11)),
                "turn": turns[number],
                "split": draw(st.sampled_from(["train", "test"])),
                "speaker": str(draw(st.integers(7, 11))),
                "channel": draw(st.integers(1, 2)),
                "start": start,
                "end": start + 1.5,
                "valence": draw(st.sampled_from([0.0, 0.25, 1.0])),
                "arousal": draw(st.sampled_from([0.5, 0.125])),
            }
        )
        rows.append(dict(meant[-1]))
    columns = [name for name in WRITTEN_AS if name in (*NEEDED, *LABELS) or draw(st.booleans())]
    meant, rows = ([{name: row[name] for name in columns} for row in some] for some in (meant, rows))
    for name in columns:
        # Most columns are of one type, others of several.
        every = [draw(st.sampled_from(WRITTEN_AS[name]))] if draw(st.booleans()) else WRITTEN_AS[name]
        if name == "conversation_id" and kind == "csv":
            every = [str]  # there 9.0 is a name, not a number
        for row in rows:
            row[name] = draw(st.sampled_from(every))(row[name])
    wrong = []
    for _ in range(draw(st.integers(0, 2))):
        name, number = draw(st.sampled_from(columns)), draw(st.integers(0, count - 1))
        values = [*NONE_OF_IT.get(name, []), *([] if kind == "csv" else NOT_IN_CSV.get(name, []))]
        if values and draw(st.booleans()):
            rows[number][name] = draw(st.sampled_from(values))
            wrong.append((name, number))
        else:
            rows[number][name] = draw(st.sampled_from(MISSING))
            wrong = [cell for cell in wrong if cell != (name, number)]
            meant[number][name] = None
            wrong += [(name, number)] * (name in NEEDED)
    return kind, meant, rows, wrong


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(tables())
def test_any_table_ends_in_the_right_rows_or_in_a_sentence_with_row_and_column(tmp_path_factory, table):
    kind, meant, rows, wrong = table
    if any(isinstance(value, bool) for row in rows for value in row.values()):
        kind = "jsonl"  # beside numbers Parquet makes a number of True
    folder = tmp_path_factory.mktemp("corpus")
    try:
        path = written(folder, rows, kind)
    except (pyarrow.ArrowException, ValueError, TypeError):  # parquet has columns of one type
        path = written(folder, rows, "jsonl")
    if wrong:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
            loaded(path)
        message = str(caught.value)
        assert "\n" not in message
        assert any(re.search(rf"\b{name}\b.* in row {number + 1}\b", message) for name, number in wrong), message
        return
    splits = loaded(path)
    assert {name: len(part) for name, part in splits.items()} == pd.Series(
        [row["split"] for row in meant]
    ).value_counts().to_dict()
    for name, part in splits.items():
        wanted = sorted(
            (row for row in meant if row["split"] == name), key=lambda row: (row["conversation_id"], row["turn"])
        )
        found = part.to_list()
        for row, meant_row in zip(found, wanted, strict=True):
            for column, value in meant_row.items():
                if column in LABELS:
                    assert row[column] == (-100.0 if value is None else value)
                elif column == "file_name":
                    assert row[column] == str(folder / value)
                elif column in ("start", "end") and value is None:
                    assert row[column] is None or np.isnan(row[column])
                elif column != "split":
                    assert row[column] == value, column


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"turn": 1.5}, "has 1.5 as turn in row 2; allowed are whole numbers"),
        ({"channel": 0}, "has 0.0 as channel in row 2; allowed are whole numbers from 1"),
        ({"start": -1.0}, "has -1.0 as start in row 2; allowed are seconds from 0"),
    ],
)
def test_a_wrong_number_is_shown_as_people_write_it(tmp_path, change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        loaded(written(tmp_path, [ROW, {**ROW, "turn": 1, **change}], "jsonl"))


def test_a_label_cannot_have_the_name_of_another_column(tmp_path):
    with pytest.raises(ValueError, match=r"'turn' is a column of every corpus .*; give the label another name"):
        load_emotion_dataset(written(tmp_path, [ROW]), ["valence", "turn"])
