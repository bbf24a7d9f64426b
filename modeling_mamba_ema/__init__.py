"""Mamba-EMA: valence, arousal and dominance from speech, followed over a conversation."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .configuration_mamba_ema import MambaEMAConfig
    from .conversation_encoder import ConversationState
    from .feature_extraction_mamba_ema import InvalidAudioError, MambaEMAFeatureExtractor
    from .modeling_mamba_ema import MambaEMAForRegression, MambaEMAModel
    from .pipeline_mamba_ema import MambaEMAPipeline

_MODULES = {
    "ConversationState": "conversation_encoder",
    "InvalidAudioError": "feature_extraction_mamba_ema",
    "MambaEMAConfig": "configuration_mamba_ema",
    "MambaEMAFeatureExtractor": "feature_extraction_mamba_ema",
    "MambaEMAForRegression": "modeling_mamba_ema",
    "MambaEMAModel": "modeling_mamba_ema",
    "MambaEMAPipeline": "pipeline_mamba_ema",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def _register_with_transformers() -> None:
    """With the package installed and imported, the Auto classes need no remote code."""
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, AutoProcessor

    from .configuration_mamba_ema import MambaEMAConfig
    from .feature_extraction_mamba_ema import MambaEMAFeatureExtractor
    from .modeling_mamba_ema import MambaEMAForRegression

    AutoConfig.register(MambaEMAConfig.model_type, MambaEMAConfig, exist_ok=True)
    AutoModel.register(MambaEMAConfig, MambaEMAForRegression, exist_ok=True)
    AutoModelForAudioClassification.register(MambaEMAConfig, MambaEMAForRegression, exist_ok=True)
    AutoFeatureExtractor.register(MambaEMAConfig, MambaEMAFeatureExtractor, exist_ok=True)
    AutoProcessor.register(MambaEMAConfig, MambaEMAFeatureExtractor, exist_ok=True)


# The command line answers `--help` at once: it imports torch and transformers only for a command that needs them.
# `-m` is what sys.argv holds while Python looks for the module of `python -m modeling_mamba_ema`.
if Path(sys.argv[0] if sys.argv else "").stem not in ("mamba-ema", "-m"):
    _register_with_transformers()
