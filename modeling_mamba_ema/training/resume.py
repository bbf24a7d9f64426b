"""Where a run begins: anew, or at a checkpoint of the same run."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints import newest_complete_checkpoint, number_of_processes, why_incomplete
from .manifest import load_manifest, manifest_differences
from .run_configuration import RunConfiguration, load_run_configuration

logger = logging.getLogger(__name__)

CONFIGURATION_FILE = "run_configuration.yaml"
# What may change between a run and its continuation without changing the weights that come out.
_FREE = {
    "training.resume",
    "training.output_dir",
    "training.report_to",
    "training.dataloader_workers",
    "data.cache_folder",
    "training.process_timeout",
    "training.push_to_hub",
    "training.hub_model_id",
}


def choose_checkpoint(
    run: RunConfiguration, folder: Path, manifest: Mapping[str, Any], main_process: bool = True
) -> Path | None:
    """The checkpoint to resume from, by `training.resume`; None: begin anew.

    Call it in the main process first, then in the others: broken or unwanted checkpoints are renamed there.

    Args:
        run: the resolved configuration.
        folder: of the run's checkpoints, beside which its configuration was saved.
        manifest: of this run, see `run_manifest`; the one of the run before is beside its configuration.

    Raises:
        ValueError: the checkpoint named is incomplete, or the run in this folder had another configuration or other
            data. Other code, libraries or processes are warned of.
    """
    if run.training.resume == "never":
        if main_process and folder.is_dir() and any(folder.iterdir()):
            _keep_aside(folder)
        return None
    if run.training.resume != "auto":
        checkpoint = Path(run.training.resume)
        problem = why_incomplete(checkpoint)
        if problem is not None:
            raise ValueError(f"training.resume: {checkpoint} cannot be resumed: {problem}")
    else:
        newest = newest_complete_checkpoint(folder)
        if newest is None:
            return None
        checkpoint = newest
        changed = differences(folder.parent / CONFIGURATION_FILE, run)
        changed += [f"{name}: {change}" for name, change in _changes(folder, manifest).items() if _refused(name, run)]
        if changed:
            raise ValueError(
                f"{folder.parent} holds a run with other settings: {'; '.join(changed)}. Take another "
                "training.output_dir, or training.resume=never to begin anew (the old checkpoints are kept aside), or "
                f"training.resume={checkpoint} to go on all the same"
            )
    world_size = manifest["world_size"]
    if number_of_processes(checkpoint) != world_size:
        logger.warning(
            "%s was written by %d processes, this run has %d: dropout will differ from the uninterrupted run",
            checkpoint.name,
            number_of_processes(checkpoint),
            world_size,
        )
    for name, change in _changes(folder, manifest).items():
        logger.warning("WARNING: since %s was written, %s changed: %s", checkpoint.name, name, change)
    return checkpoint


def _changes(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    return manifest_differences(load_manifest(folder.parent), manifest)


def _refused(name: str, run: RunConfiguration) -> bool:
    """Other data are another run; so is another number of processes where each brings its own share of a batch."""
    return name.startswith("data.") or (name == "world_size" and run.data.max_seconds_per_batch is None)


def differences(saved: Path, run: RunConfiguration) -> list[str]:
    """Settings of a saved configuration that differ and matter, as `section.field: old -> new`."""
    if not saved.is_file():
        return []
    old, new = dataclasses.asdict(load_run_configuration(saved)), dataclasses.asdict(run)
    return [
        f"{section}.{name}: {old[section][name]!r} -> {new[section][name]!r}"
        for section in new
        for name in new[section]
        if old[section][name] != new[section][name] and f"{section}.{name}" not in _FREE
    ]


def _keep_aside(folder: Path) -> None:
    count = 1
    while (target := folder.with_name(f"{folder.name}-before-{count}")).exists():
        count += 1
    os.replace(folder, target)
    logger.info("checkpoints of the run before are kept in %s", target)
