"""Files are written in one piece."""

import os

import pytest

from modeling_mamba_ema.data.atomic_write import atomic_write


def test_a_file_is_replaced_when_it_is_complete_and_kept_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "new" / "rows.jsonl"
    atomic_write(path, "old")
    atomic_write(path, "né".encode())
    assert path.read_text(encoding="utf-8") == "né"

    def fail(unfinished, target):
        assert unfinished.read_text(encoding="utf-8") == "ñ"
        assert path.read_text(encoding="utf-8") == "né"
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        atomic_write(path, "ñ")
    assert path.read_text(encoding="utf-8") == "né"
    assert [other.name for other in path.parent.iterdir()] == ["rows.jsonl"]
