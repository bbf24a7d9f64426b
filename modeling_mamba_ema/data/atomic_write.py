"""Writing a file in one piece."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader finds all of it or what was there before, whenever the program is killed.

    Several processes may write the same file; the last one wins. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
