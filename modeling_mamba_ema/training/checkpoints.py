"""Checkpoints: complete or not used; and the run that they belong to.

Trainer writes a checkpoint over seconds; killed meanwhile, it leaves half of one. A resume from that crashes or, where
the optimizer or the random state is missing, silently trains something else. Here `SHA256SUMS` is written last, after
everything else is on the disk: a checkpoint without it, or with another hash, is incomplete. A resume takes the newest
complete checkpoint of the same run, which is known by its configuration and by its manifest: code, libraries, data and
number of processes.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from .._version import __version__
from ..data.atomic_write import atomic_write
from ..publishing.checksums import SUMS, read_checksums, sha256, write_checksums
from .run_configuration import RunConfiguration, read_yaml

logger = logging.getLogger(__name__)

# Without one of these a resumed run differs from the run it continues. Sharded training (FSDP) names the optimizer's
# file otherwise, and several processes write a random state each; hence beginnings of names.
REQUIRED = ("model", "optimizer", "scheduler.pt", "rng_state", "trainer_state.json", "config.json")
CONFIGURATION_FILE = "run_configuration.yaml"
MANIFEST_FILE = "run_manifest.json"
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy")
# Settings that do not change the weights: a run may go on with others.
_FREE = re.compile(
    r"data\.cache_folder|training\.(output_dir|resume_from_checkpoint|report_to|run_name|project|ddp_timeout|use_cpu|"
    r"worker_timeout|turns_per_chunk|save_total_limit|disable_tqdm|push_to_hub|dataloader_(?!drop_last).*|hub_.*|log_.*|"
    r"logging_.*|trackio_.*)"
)


# complete checkpoints


def seal_checkpoint(checkpoint: Path) -> None:
    """Make a checkpoint that Trainer has written durable, and complete by `SHA256SUMS`."""
    (checkpoint / SUMS).unlink(missing_ok=True)  # of a save in the same step
    for path in (path for path in checkpoint.rglob("*") if path.is_file()):
        _fsync(path)
    write_checksums(checkpoint)
    for path in (checkpoint / SUMS, checkpoint, checkpoint.parent):
        _fsync(path)


def why_incomplete(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None: nothing, all hashes are right and no file is missing."""
    try:
        sums = read_checksums(checkpoint)
    except ValueError as error:
        return str(error)
    for required in REQUIRED:
        if not any(name.startswith(required) for name in sums):
            return f"there is no {required}"
    for name, digest in sums.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if sha256(checkpoint / name) != digest:
            return f"{name} is damaged"
    return None


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoint-<step>` that can be resumed; newer broken ones are renamed, none is deleted."""
    for checkpoint in reversed(checkpoints_in(folder)):
        problem = why_incomplete(checkpoint)
        if problem is None:
            return checkpoint
        target = _unused(folder / f"broken-{checkpoint.name}")
        os.replace(checkpoint, target)
        logger.warning("%s cannot be resumed (%s); it is now %s", checkpoint.name, problem, target.name)
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders `checkpoint-<step>`, by their step."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.split("-")[1]))


def require_space_for_checkpoints(folder: Path, model: nn.Module, count: int) -> None:
    """Refuse a disk without room for some checkpoints: the weights, and AdamW's two moments of what is trained."""
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()  # what adapters are trained on
    weights = sum(
        p.numel() * p.element_size() * (3 if p.requires_grad else 1)
        for name, p in model.named_parameters()
        if name not in unsaved
    )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < count * weights:
        raise OSError(
            f"{folder} has {free / 1e9:.3f} GB free, but {count} checkpoints need {count * weights / 1e9:.3f} GB. Free "
            "some, or choose another training.output_dir"
        )


# the run that a checkpoint belongs to


def choose_checkpoint(run: RunConfiguration, manifest: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from, by `training.resume_from_checkpoint`; None: begin anew.

    Call it in one process and give the others what it chose: it renames broken or unwanted checkpoints. What the run
    before was is read from its output folder.

    Raises:
        ValueError: the checkpoint named is incomplete, or the run in this folder had another configuration or other
            data. Other code, libraries or processes are warned of.
    """
    settings = run.to_dict()["training"]
    folder, wanted = Path(settings["output_dir"]), settings["resume_from_checkpoint"]
    if wanted is None:
        _keep_aside(folder)
        return None
    saved = folder / MANIFEST_FILE
    changes = _differences(json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}, manifest)
    if wanted == "auto":
        checkpoint = newest_complete_checkpoint(folder)
        if checkpoint is None:
            return None
        # Other data are another run; so is another number of processes where each brings its own share of a batch.
        by_items = settings["max_seconds_per_batch"] is None
        refused = differences(folder / CONFIGURATION_FILE, run)
        others = {name.split(".")[1]: None for name in changes if name.startswith("data.")}
        refused += [f"other rows or audio files in split {split}" for split in others]
        if by_items and "world_size" in changes:
            refused.append(f"world_size: {changes['world_size']}")
        if refused:
            raise ValueError(
                f"{folder} holds a run with other settings: {'; '.join(refused)}. Take another training.output_dir, or "
                "training.resume_from_checkpoint=null to begin anew (the old checkpoints are kept aside), or "
                f"training.resume_from_checkpoint={checkpoint} to go on all the same"
            )
    else:
        checkpoint = Path(wanted)
        problem = why_incomplete(checkpoint)
        if problem is not None:
            raise ValueError(f"training.resume_from_checkpoint: {checkpoint} cannot be resumed: {problem}")
    before, now = len(list(checkpoint.glob("rng_state*.pth"))), manifest["world_size"]  # a random state a process
    if before != now:
        what = f"{checkpoint.name} was written by {before} processes, this run has {now}"
        logger.warning("%s: dropout will differ from the uninterrupted run", what)
    for name, change in changes.items():
        change = "" if name.endswith(".sha256") else f": {change}"
        logger.warning("WARNING: since %s was written, %s changed%s", checkpoint.name, name, change)
    return checkpoint


def run_manifest(splits: Mapping[str, Dataset], world_size: int) -> dict[str, Any]:
    """`code` (version and SHA-256 of the package's sources), `libraries`, `world_size`, and for each split `data`
    (turns, and SHA-256 of the rows in their order with the sizes of the audio files)."""
    return {
        "code": {"version": __version__, "sha256": _code_hash()},
        "libraries": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        "world_size": world_size,
        "data": {split: {"turns": len(rows), "sha256": _data_hash(rows)} for split, rows in splits.items()},
    }


def save_run(run: RunConfiguration, manifest: Mapping[str, Any]) -> None:
    """Write what [`choose_checkpoint`] compares a later run with into the run's output folder."""
    folder = Path(run.to_dict()["training"]["output_dir"])
    run.save(folder / CONFIGURATION_FILE)
    atomic_write(folder / MANIFEST_FILE, json.dumps(manifest, indent=2))


def differences(saved: Path, run: RunConfiguration) -> list[str]:
    """Settings of a saved configuration that differ and matter, as `section.name: old -> new`."""
    return [
        f"{name}: {change}"
        for name, change in _differences(read_yaml(saved) if saved.is_file() else {}, run.to_dict()).items()
        if not _FREE.fullmatch(name)
    ]


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs, as `{"libraries.torch": "2.12 -> 2.13"}`; nothing where nothing was saved."""
    old, new = _flat(saved), _flat(now)
    names = {**old, **new} if old else {}
    return {
        name: f"{old.get(name, 'default')} -> {new.get(name, 'default')}"
        for name in names
        if old.get(name, "default") != new.get(name, "default")
    }


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


def _data_hash(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for column in sorted(rows.column_names):
        values = rows[column][:]
        if column == "file_name":
            # The corpus may move to another folder. A file's size shows most replacements without reading the file.
            values = [[os.path.basename(name), _size(name)] for name in values]
        digest.update(json.dumps([column, values], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _size(name: str) -> int | None:
    try:
        return os.stat(name).st_size
    except OSError:
        return None


def _keep_aside(folder: Path) -> None:
    old = checkpoints_in(folder)
    if old:
        target = _unused(folder / "earlier-run")
        target.mkdir()
        for checkpoint in old:
            os.replace(checkpoint, target / checkpoint.name)
        logger.info("checkpoints of the run before are kept in %s", target)


def _unused(path: Path) -> Path:
    """The path itself, or with the first number behind it that is not taken."""
    target, count = path, 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}-{count}")
    return target


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
