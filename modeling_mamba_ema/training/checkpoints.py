"""Checkpoints that are complete or are not there.

Trainer writes a checkpoint in place, over seconds; killed meanwhile, it leaves half of one, and a resume from that
crashes or, where the optimizer or the random state is missing, silently trains something else. Here a checkpoint is
written under another name, its files' hashes are added, and it gets its name by one rename. A resume takes the newest
checkpoint whose hashes are right, and sets broken ones aside.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from ..publishing.checksums import SUMS, sha256

logger = logging.getLogger(__name__)

# Without one of these a resumed run differs from the run it continues. Sharded training (FSDP) names the optimizer's
# file otherwise, and several processes write a random state each; hence beginnings of names.
REQUIRED = ("model", "optimizer", "scheduler.pt", "rng_state", "trainer_state.json", "config.json")
STAGING = "tmp-saving"


def seal_checkpoint(staging: Path, final: Path) -> None:
    """Make a checkpoint that was written to `staging` durable, add `SHA256SUMS`, and rename it to `final`."""
    lines = [f"{sha256(path)}  {path.relative_to(staging).as_posix()}\n" for path in _files(staging)]
    (staging / SUMS).write_text("".join(lines), encoding="utf-8")
    for path in [*_files(staging), staging / SUMS, staging]:
        _fsync(path)
    replaced = final.with_name(f"tmp-replaced-{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # saved twice in one step
        os.replace(final, replaced)
    os.replace(staging, final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def why_incomplete(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None: nothing, all hashes are right and no file is missing."""
    sums = checkpoint / SUMS
    if not sums.is_file():
        return f"it has no {SUMS}"
    listed = {}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator:
            return f"{SUMS} is damaged"
        listed[name] = digest
    for required in REQUIRED:
        if not any(name.startswith(required) for name in listed):
            return f"it has no {required}"
    for name, digest in listed.items():
        path = checkpoint / name
        if not path.resolve().is_relative_to(checkpoint.resolve()):
            return f"{SUMS} names {name}, which is outside"
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is damaged"
    return None


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be resumed; newer broken ones are renamed `broken-...`, none is deleted.

    Args:
        folder: holds `checkpoint-<step>` folders; may be missing.
    """
    found = sorted(
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else [])
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    )
    for _, checkpoint in reversed(found):
        problem = why_incomplete(checkpoint)
        if problem is None:
            return checkpoint
        set_aside(checkpoint, problem)
    return None


def set_aside(checkpoint: Path, reason: str) -> None:
    """Rename a checkpoint to `broken-...`, and say so."""
    target, count = checkpoint.with_name(f"broken-{checkpoint.name}"), 1
    while target.exists():
        count += 1
        target = checkpoint.with_name(f"broken-{checkpoint.name}-{count}")
    os.replace(checkpoint, target)
    logger.warning("%s cannot be resumed (%s); it is now %s", checkpoint.name, reason, target.name)


def number_of_processes(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint: each has a random state of its own."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
