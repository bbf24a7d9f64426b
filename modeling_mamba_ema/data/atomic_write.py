"""Writing a file in one piece: a reader sees the old file or the new one, never a part."""

import os
import uuid
from pathlib import Path


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write text, in UTF-8, or bytes to a file, whose folder is made if need be.

    Several processes may write the same file at once: one of them is the last.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a killed process leaves is hidden: whoever reads all Parquet files of a folder would have its rows twice.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
