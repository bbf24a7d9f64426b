"""Mamba-EMA: valence, arousal and dominance from speech, followed over a conversation."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification

from ._version import __version__
from .configuration_mamba_ema import MambaEMAConfig
from .conversation_encoder import ConversationState
from .feature_extraction_mamba_ema import InvalidAudioError, MambaEMAFeatureExtractor
from .modeling_mamba_ema import MambaEMAForRegression, MambaEMAModel
from .pipeline_mamba_ema import MambaEMAPipeline

# With the package installed, the Auto classes need no remote code.
AutoConfig.register(MambaEMAConfig.model_type, MambaEMAConfig, exist_ok=True)
AutoModel.register(MambaEMAConfig, MambaEMAForRegression, exist_ok=True)
AutoModelForAudioClassification.register(MambaEMAConfig, MambaEMAForRegression, exist_ok=True)
AutoFeatureExtractor.register(MambaEMAConfig, MambaEMAFeatureExtractor, exist_ok=True)

__all__ = [
    "ConversationState",
    "InvalidAudioError",
    "MambaEMAConfig",
    "MambaEMAFeatureExtractor",
    "MambaEMAForRegression",
    "MambaEMAModel",
    "MambaEMAPipeline",
    "__version__",
]
