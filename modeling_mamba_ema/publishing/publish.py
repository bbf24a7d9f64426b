"""Uploading a model's folder to the Hub: all of it, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi

from .checksums import SUMS, damaged_files, sha256

# What save_pretrained writes. Pickles (training_args.bin and optimizers among them) run code where they are loaded;
# anything else in the folder got there by accident.
ALLOWED = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*.py",
    "requirements.txt",
    "README.md",
    "sample*.wav",
    SUMS,
)
NEEDED = ("config.json", "preprocessor_config.json", "model*.safetensors", "README.md", SUMS)


@dataclass(frozen=True)
class PublishedFile:
    """A file as it will be on the Hub."""

    name: str
    size: int
    sha256: str


def files_to_publish(folder: str | Path) -> list[PublishedFile]:
    """What publishing a folder would upload; nothing is sent.

    Args:
        folder: as `MambaEMAForRegression.save_pretrained` wrote it.

    Raises:
        ValueError: files that do not belong there, are missing, or are not as they were saved; all are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the one that save_pretrained wrote, such as outputs/run/model")
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    links = [name for name in names if (folder / name).is_symlink()]
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in ALLOWED)]
    problems = [f"{name} is a link" for name in links]
    problems += [f"{name} does not belong to a published model" for name in foreign]
    problems += [f"there is no {needed}" for needed in NEEDED if not any(fnmatch(name, needed) for name in names)]
    if not problems:
        problems = [f"{problem} (save_pretrained writes it anew)" for problem in damaged_files(folder)]
    if problems:
        raise ValueError(f"{folder} is not published: {'; '.join(problems)}")
    return [PublishedFile(name, (folder / name).stat().st_size, sha256(folder / name)) for name in names]


def publish(folder: str | Path, repository: str, private: bool = True, message: str = "Upload Mamba-EMA") -> str:
    """Upload a model's folder as one commit; the repository is made if it is not there.

    Args:
        folder: as `MambaEMAForRegression.save_pretrained` wrote it.
        repository: `owner/name` on the Hub.
        private: of a repository that is made now; one that is there stays as it is.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: see [`files_to_publish`].
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, most often for want of `hf auth login`.
    """
    names = [file.name for file in files_to_publish(folder)]
    hub = HfApi()
    hub.create_repo(repository, private=private, exist_ok=True)
    commit = hub.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=names, commit_message=message)
    return commit.commit_url
