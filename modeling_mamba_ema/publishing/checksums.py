"""SHA256SUMS beside the weights, so that anybody can tell whether a folder is as it was saved.

safetensors loads a file with a flipped byte without a word. The sums guard against damage; against somebody who can
change the files, and so the sums, pin the commit.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SUMS = "SHA256SUMS"
# The card is text that people edit, and nothing loads it.
_NOT_SUMMED = {SUMS, "README.md"}


def write_checksums(folder: str | os.PathLike[str]) -> None:
    """Write `SHA256SUMS` for the files of a folder, in the format of `sha256sum --check`."""
    folder = Path(folder)
    lines = [f"{sha256(folder / name)}  {name}\n" for name in _names(folder)]
    (folder / SUMS).write_bytes("".join(lines).encode())


def damaged_files(folder: str | os.PathLike[str]) -> list[str]:
    """What is not as it was saved, a sentence each; an empty list means that all files are.

    Example:

    ```python
    >>> from modeling_mamba_ema.publishing.checksums import damaged_files, write_checksums
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "config.json").write_text("{}")
    >>> write_checksums(folder)
    >>> damaged_files(folder)
    []
    >>> _ = (folder / "config.json").write_text("{ }")
    >>> damaged_files(folder)
    ['config.json is damaged']

    ```
    """
    folder = Path(folder)
    if not (folder / SUMS).is_file():
        return [f"there is no {SUMS}"]
    listed = {}
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    there = set(_names(folder))
    return [
        *(f"{name} is missing" for name in sorted(set(listed) - there)),
        *(f"{name} is not in {SUMS}" for name in sorted(there - set(listed))),
        *(f"{name} is damaged" for name in sorted(there & set(listed)) if sha256(folder / name) != listed[name]),
    ]


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _names(folder: Path) -> list[str]:
    files = (path.name for path in folder.iterdir() if path.is_file())
    return sorted(name for name in files if name not in _NOT_SUMMED and not name.startswith("."))
