"""Fine-tuning on transformers' Trainer."""

from .collator import ConversationCollator
from .run_configuration import RunConfiguration, load_run_configuration
from .trainer import EvaluationLog, MambaEMATrainer, ccc_of_predictions

__all__ = [
    "ConversationCollator",
    "EvaluationLog",
    "MambaEMATrainer",
    "RunConfiguration",
    "ccc_of_predictions",
    "load_run_configuration",
]
