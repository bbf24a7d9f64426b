"""What commands print: rows as a table or as JSON lines on standard output, complaints on standard error."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEXT_COLUMNS = ("conversation", "file", "speaker", "reading")
# Endings of columns that tables have no room for.
ONLY_IN_FILES = ("_difference", "baseline_turns", "_confidence", "low_level", "reading")


def complain(message: str) -> None:
    """One line on standard error, and a line for each name that the message lists."""
    parts = (" ".join(part.split()) for part in message.split("\n  "))
    print("mamba-ema: " + "\n  ".join(parts), file=sys.stderr, flush=True)


def check_output(path: Path | None, overwrite: bool) -> None:
    """Raise `OSError` for a file that would be replaced without `--overwrite` or cannot be written, before there is
    anything to write; its folder is made."""
    if path is None:
        return
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")
    check_folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)


def check_folder(folder: Path) -> None:
    """Raise `OSError` for a folder that cannot be made or written to, before there is anything to write."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"the folder {folder} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"the folder {existing} cannot be written to")


class Table:
    """Prints rows as they come: as a table for people, whose header comes with the first row, or as JSON lines.

    Args:
        widths: of columns with text whose widest entry is known; others take the width of their name.
    """

    def __init__(self, as_json: bool, widths: Mapping[str, int] | None = None):
        self._as_json = as_json
        self._widths = dict(widths or {})
        self._begun = False

    def print(self, row: Mapping[str, Any]) -> None:
        """Print a row; its keys are the columns, the same for every row, and `low_level` is shown in words."""
        if self._as_json:
            print(json.dumps(row), flush=True)
            return
        cells = {name: value for name, value in row.items() if not name.endswith(ONLY_IN_FILES)}
        cells["reading"] = "near silence" if row["low_level"] else row["reading"]
        widths = {name: max(len(name), 8, self._widths.get(name, 0)) for name in cells}
        if not self._begun:
            print(_line({name: name.replace("_", " ") for name in cells}, widths))
            self._begun = True
        print(_line({name: _cell(value) for name, value in cells.items()}, widths), flush=True)


def _line(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    """Text begins where its column does, numbers end where theirs does."""
    aligned = [
        cell.ljust(widths[name]) if name in TEXT_COLUMNS else cell.rjust(widths[name]) for name, cell in cells.items()
    ]
    return "  ".join(aligned).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
