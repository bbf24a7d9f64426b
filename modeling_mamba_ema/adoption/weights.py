"""Reading published weights without running code: safetensors, or a pickle of nothing but tensors."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

# In the order of preference; an index names the files that a large model is cut into.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# The two factors of a weight norm, as torch named them before 2.0 and as it names them since.
_WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def find_file(source: str, name: str, revision: str) -> Path | None:
    """A file of a folder or of a repository on the Hub; None where it has no such file. Raises `OSError` where the Hub
    cannot be reached and its cache does not hold the model."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except LocalEntryNotFoundError as error:
        if not isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
            raise OSError(
                f"the Hub cannot be reached, and {source} is not in its cache; download it where there is a network, "
                f"by `hf download {source} --local-dir FOLDER`, and adopt FOLDER (--published-as keeps its licence)"
            ) from error
        return None  # a model in the cache, which needs no network
    except EntryNotFoundError:
        return None


def read_weights(source: str, revision: str) -> dict[str, torch.Tensor]:
    """The weights of a folder or of a repository on the Hub, weight norms under their present names.

    Raises:
        OSError: no weights, or damaged ones.
        ValueError: a file that holds something else than tensors.
    """
    for name in WEIGHT_FILES:
        path = find_file(source, name, revision)
        if path is None:
            continue
        parts = _parts(path) if name.endswith(".json") else [path.name]
        weights: dict[str, torch.Tensor] = {}
        for part in parts:
            found = find_file(source, part, revision)
            if found is None:
                raise OSError(f"{source} lacks {part}, which {name} names")
            for key, weight in _read_file(found).items():
                key = with_present_weight_norm(key)
                if key in weights:
                    raise ValueError(f"{part} holds {key}, which is there already under this or its old name")
                weights[key] = weight
        return weights
    raise OSError(f"{source} has no weights; looked for {', '.join(WEIGHT_FILES)}")


def _parts(index: Path) -> list[str]:
    parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for part in parts:
        if Path(part).name != part:
            raise ValueError(f"{index.name} names {part!r}; allowed are files of its own folder")
    return parts


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
    except SafetensorError as error:
        raise OSError(f"{path.name} is damaged: {error}; copy or download it again") from error
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise ValueError(f"{path.name} is no plain state dict, names and tensors, so it is not one of these models")
    return weights


def load_pickle(path: Path) -> Any:
    """What a file of `torch.save` holds, of plain values and tensors. Raises `OSError` where it is damaged,
    `ValueError` where it holds more than that."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} is damaged or holds more than tensors, which could run code, and is not opened"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise OSError(f"{path.name} is damaged: {error}; copy or download it again") from error


def with_present_weight_norm(name: str) -> str:
    """The name of a weight under which the factors of its norm go now."""
    return re.sub(r"(?<=\.conv\.)weight_[gv]$", lambda match: _WEIGHT_NORM[match[0]], name)
