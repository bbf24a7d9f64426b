"""Files are written in one piece."""

import pytest

from modeling_mamba_ema.data.atomic_write import atomic_write


def test_a_file_is_replaced_when_it_is_complete_and_kept_where_writing_fails(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with atomic_write(path) as unfinished:
        unfinished.write_text("old")
    with atomic_write(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"

    def fail():
        with atomic_write(path) as unfinished:
            unfinished.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "new"
    assert [other.name for other in path.parent.iterdir()] == ["rows.jsonl"]
