"""What a run was made of: code, libraries, data, processes. A continuation is compared with it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..data.dataset import ConversationDataset

MANIFEST_FILE = "run_manifest.json"
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy")


def run_manifest(datasets: Mapping[str, ConversationDataset], world_size: int) -> dict[str, Any]:
    """
    Args:
        datasets: by the name of their split.
        world_size: number of processes.

    Returns:
        `code` (version and SHA-256 of the package's sources), `libraries`, `world_size`, and for each split `data`
        (turns, and SHA-256 of the rows in their order with the sizes of the audio files).
    """
    return {
        "code": {"version": __version__, "sha256": _code_hash()},
        "libraries": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        "world_size": world_size,
        "data": {
            split: {"turns": len(dataset.rows), "sha256": _data_hash(dataset)} for split, dataset in datasets.items()
        },
    }


def manifest_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs, as `{"libraries.torch": "2.12 -> 2.13"}`; what an older manifest does not tell is left out."""
    old, new = _flat(saved), _flat(now)
    return {name: f"{old[name]} -> {value}" for name, value in new.items() if name in old and old[name] != value}


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a run's folder; empty where there is none."""
    path = folder / MANIFEST_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def _code_hash() -> str:
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _data_hash(dataset: ConversationDataset) -> str:
    digest = hashlib.sha256()
    for row in dataset.rows:
        path = Path(row["file_name"])
        # The corpus may move to another folder; the size tells most files that were replaced without reading them.
        known = {**row, "file_name": path.name, "bytes": path.stat().st_size if path.is_file() else None}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()
