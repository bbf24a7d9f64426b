"""SHA256SUMS beside the weights, so that anybody can tell whether a folder is as it was saved.

safetensors loads a file with a flipped byte without a word. The sums guard against damage; against somebody who can
change the files, and so the sums, pin the commit.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ..data.atomic_write import atomic_write

SUMS = "SHA256SUMS"
# The card is text that people edit, and nothing loads it.
_NOT_SUMMED = {SUMS, "README.md"}


def write_checksums(folder: str | os.PathLike[str]) -> None:
    """Write `SHA256SUMS` for the files of a folder, in the format of `sha256sum --check`."""
    folder = Path(folder)
    atomic_write(folder / SUMS, "".join(f"{sha256(folder / name)}  {name}\n" for name in _names(folder)))


def read_checksums(folder: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of each file that `SHA256SUMS` names, by its name. Raises `ValueError` where there is no such file, or a
    line of it is damaged or names a file outside the folder."""
    folder = Path(folder)
    if not (folder / SUMS).is_file():
        raise ValueError(f"there is no {SUMS}")
    sums = {}
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator:
            raise ValueError(f"{SUMS} is damaged")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{SUMS} names {name}, which is outside")
        sums[name] = digest
    return sums


def damaged_files(folder: str | os.PathLike[str]) -> list[str]:
    """What is not as it was saved, a sentence each; an empty list means that all files are."""
    folder = Path(folder)
    try:
        sums = read_checksums(folder)
    except ValueError as error:
        return [str(error)]
    present = set(_names(folder))
    return [
        *(f"{name} is missing" for name in sorted(set(sums) - present)),
        *(f"{name} is not in {SUMS}" for name in sorted(present - set(sums))),
        *(f"{name} is damaged" for name in sorted(present & set(sums)) if sha256(folder / name) != sums[name]),
    ]


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_sha256(tensors: Iterable[tuple[str, torch.Tensor]], start: str = "") -> str:
    """SHA-256 of a text and of tensors with their names, types and shapes; the order of the tensors does not matter."""
    digest = hashlib.sha256(start.encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor of any type."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _names(folder: Path) -> list[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in files if name.name not in _NOT_SUMMED and not name.name.startswith("."))
