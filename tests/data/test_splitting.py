"""Splits for a corpus that has none."""

import numpy as np
import pytest
from datasets import Dataset

from modeling_mamba_ema.data.splitting import split_off
from modeling_mamba_ema.training import DataSection, load_splits
from tests.support.models import tiny_config


def table(conversations, speakers):
    return Dataset.from_dict(
        {"conversation_id": conversations, "speaker": speakers, "turn": list(range(len(speakers)))}
    )


def values(part, column="speaker"):
    return set(part[column])


def test_no_speaker_is_in_two_parts_and_the_parts_have_their_share_of_the_turns():
    random = np.random.default_rng(0)
    speakers = [f"s{number}" for number in range(30) for _ in range(random.integers(5, 30))]
    rows = table([f"c{number}" for number in range(len(speakers))], speakers)
    train, validation, test = split_off(rows, "speaker", ["validation", "test"])
    assert len(train) + len(validation) + len(test) == len(rows)
    assert not values(train) & values(validation) | values(train) & values(test) | values(validation) & values(test)
    for part in (validation, test):
        assert 0.15 < len(part) / len(rows) < 0.25
    again = split_off(rows, "speaker", ["validation", "test"])
    assert [part.to_dict() for part in again] == [part.to_dict() for part in (train, validation, test)]


def test_speakers_who_talk_to_each_other_stay_together():
    conversations = [f"c{pair}" for pair in range(10) for _ in range(4)]
    speakers = [f"s{pair}{turn % 2}" for pair in range(10) for turn in range(4)]
    speakers[4:8] = ["s01", "s10", "s01", "s10"]  # s01 talks to s00 and to s10
    parts = split_off(table(conversations, speakers), "speaker", ["validation"])
    for column in ("speaker", "conversation_id"):
        assert not values(parts[0], column) & values(parts[1], column)
    chain = [part for part in parts if values(part) & {"s00", "s01", "s10"}]
    assert len(chain) == 1


@pytest.mark.parametrize("groups", [3, 4])
def test_every_part_gets_a_group_even_of_few(groups):
    speakers = ["a"] * 50 + [str(number) for number in range(groups - 1)]
    parts = split_off(table([str(i) for i in range(len(speakers))], speakers), "speaker", ["validation", "test"])
    assert all(len(part) for part in parts)


@pytest.mark.parametrize(
    ("column", "speakers", "message"),
    [
        ("speakr", ["a", "b", "c"], "there is no column 'speakr'; there are conversation_id, speaker"),
        ("speaker", ["a", None, "c"], "speaker is empty in row 2"),
        ("speaker", ["a", "a", "b"], "there are 2 groups .* data.split_by=conversation_id divides more finely"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_a_sentence(column, speakers, message):
    with pytest.raises(ValueError, match=message):
        split_off(table(["x", "y", "z"], speakers), column, ["validation", "test"])


def test_a_run_gets_the_splits_that_its_corpus_lacks(corpus, tmp_path):
    lines = (corpus / "metadata.jsonl").read_text().replace('"split": "validation"', '"split": "train"')
    (tmp_path / "metadata.jsonl").write_text(lines.replace('"file_name": "', f'"file_name": "{corpus}/'))
    data = DataSection(source=str(tmp_path), cache_folder=str(tmp_path))
    with pytest.raises(ValueError, match="has no split validation; there are test, train: data.split_by=speaker makes"):
        load_splits(data, tiny_config(), tmp_path)
    data.split_by = "conversation_id"
    splits = load_splits(data, tiny_config(), tmp_path)
    assert list(splits) == ["train", "validation", "test"]
    assert not values(splits["train"], "conversation_id") & values(splits["validation"], "conversation_id")
    assert len(splits["test"]) == lines.count('"split": "test"')
