"""A saved model and its feature extractor, or a sentence that says what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from ..configuration_mamba_ema import MambaEMAConfig
from ..feature_extraction_mamba_ema import MambaEMAFeatureExtractor
from ..modeling_mamba_ema import MambaEMAForRegression


def load_model(
    name: str | Path, revision: str, device: str | torch.device
) -> tuple[MambaEMAForRegression, MambaEMAFeatureExtractor]:
    """Load with this package's code, none of the model's folder, in evaluation mode.

    Args:
        name: a folder or a Hub name.
        revision: commit, tag or branch on the Hub.
        device: where the model runs.

    Raises:
        OSError, ValueError: see `EmotionTracker.from_pretrained`.
    """
    if not Path(name).is_dir():
        try:
            validate_repo_id(str(name))
        except HFValidationError as error:
            raise OSError(f"{name} is neither a folder that is there nor a name on the Hub (owner/model)") from error
    try:
        about, _ = MambaEMAConfig.get_config_dict(name, revision=revision)
        if about.get("model_type") != MambaEMAConfig.model_type:
            raise ValueError(
                f"{name} is a model of type {about.get('model_type')!r}; a {MambaEMAConfig.model_type!r} is needed"
            )
        loaded: Any = MambaEMAForRegression.from_pretrained(name, revision=revision, output_loading_info=True)
    except SafetensorError as error:
        raise OSError(f"the weights of {name} are damaged: {error}; copy or download them anew") from error
    model, loading = loaded
    if loading["missing_keys"]:
        first = min(loading["missing_keys"])
        raise ValueError(
            f"the checkpoint lacks {len(loading['missing_keys'])} weights of Mamba-EMA, first {first}; "
            "it is no complete Mamba-EMA model"
        )
    extractor = MambaEMAFeatureExtractor.from_pretrained(name, revision=revision)
    try:
        return model.eval().to(device), extractor
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the model cannot be moved to device {str(device)!r}: {error}") from error
