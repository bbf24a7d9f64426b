"""A saved model and its feature extractor, or an error that says in one sentence what is wrong with them."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from ..configuration_mamba_ema import MambaEMAConfig
from ..feature_extraction_mamba_ema import MambaEMAFeatureExtractor
from ..modeling_mamba_ema import MambaEMAForRegression


def load_model(
    name: str | Path, revision: str = "main", device: str | torch.device = "cpu"
) -> tuple[MambaEMAForRegression, MambaEMAFeatureExtractor]:
    """Load a folder or Hub name with this package's code, none of the model's folder, in evaluation mode. Raises what
    `EmotionTracker.from_pretrained` raises."""
    check_model_name(str(name), revision)
    check_device(device)
    try:
        about, _ = MambaEMAConfig.get_config_dict(name, revision=revision)
        if about.get("model_type") != MambaEMAConfig.model_type:
            raise ValueError(
                f"{name} is a model of type {about.get('model_type')!r}; a {MambaEMAConfig.model_type!r} is needed"
            )
        loaded: Any = MambaEMAForRegression.from_pretrained(
            name, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True
        )
        extractor = MambaEMAFeatureExtractor.from_pretrained(name, revision=revision)
    except SafetensorError as error:
        raise OSError(f"the weights of {name} are damaged: {error}; copy or download them again") from error
    except (AttributeError, KeyError, TypeError) as error:  # of transformers, about values it does not check
        raise ValueError(
            f"config.json or preprocessor_config.json of {name} holds a value that cannot be used: {error}"
        ) from error
    model, loading = loaded
    for mismatch in loading["mismatched_keys"]:
        weight = mismatch if isinstance(mismatch, str) else mismatch[0]  # transformers 5 adds the shapes
        raise ValueError(
            f"{weight} of {name} has another shape than its config.json asks for; one of the two files belongs to "
            "another model"
        )
    if loading["missing_keys"]:
        first = min(loading["missing_keys"])
        raise ValueError(
            f"the checkpoint lacks {len(loading['missing_keys'])} weights of Mamba-EMA, first {first}; "
            "it is no complete Mamba-EMA model"
        )
    return model.eval().to(device), extractor


def check_device(device: str | torch.device) -> None:
    """Raise `ValueError` where this machine has no such device; the message names those that it has."""
    accelerator, devices = torch.accelerator.current_accelerator(check_available=True), ["cpu"]
    if accelerator is not None:
        numbered = [f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count())]
        devices += [accelerator.type, *numbered]
    if str(device) not in devices:
        raise ValueError(f"this machine has no device {str(device)!r} that torch can use; it has {', '.join(devices)}")


def check_model_name(name: str, revision: str) -> None:
    """Find out at once what is a mistyped folder: the Hub would be asked for it again and again. Raises `OSError` where
    the name is neither a folder with a model nor that of a model on the Hub."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return
    if folder.is_dir():
        raise OSError(f"{folder} holds no config.json, so it is no saved model{_models_in(folder)}")
    if folder.is_file():
        raise OSError(
            f"{name} is no folder; Microsoft's file of a WavLM becomes one by `mamba-ema adopt {name} FOLDER`"
            if folder.suffix == ".pt"
            else f"{name} is a file; name the folder of a model, with its config.json, such as {folder.parent}"
        )
    try:
        validate_repo_id(name)
        is_hub_name = name.count("/") == 1
    except HFValidationError:
        is_hub_name = False
    if not is_hub_name:
        raise OSError(f"{name} is neither an existing folder nor a name on the Hub (owner/model)")
    parent = folder.parent
    if parent.is_dir() and not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        raise OSError(f"there is no folder {name}, although there is {parent}{_models_in(parent)}")


def _models_in(folder: Path) -> str:
    found = sorted({str(path.parent) for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json")})
    models = [name for name in found if not Path(name).name.startswith("checkpoint-")] or found
    return f"; did you mean {' or '.join(models[:3])}?" if models else ""
