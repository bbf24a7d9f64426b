"""Writing a file in one piece: a reader sees the old file or the new one, never a part."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` when the block ends, and is removed if it fails.

    Several processes may write the same file at once: one of them is the last. Folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a killed process leaves is hidden: whoever reads all Parquet files of a folder would have its rows twice.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
