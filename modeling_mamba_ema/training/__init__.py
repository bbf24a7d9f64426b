"""Fine-tuning on transformers' Trainer."""

from .building import build_datasets, build_model, build_trainer, load_splits, training_arguments
from .checkpoints import newest_complete_checkpoint, why_incomplete
from .collator import ConversationCollator
from .frame_caching import cache_frames
from .interruption import EXIT_CODE, StopOnSigterm
from .manifest import load_manifest, manifest_differences, run_manifest, save_manifest
from .predictions import prediction_table, save_predictions
from .preflight import check_labels_vary, check_speech_encoder
from .resume import choose_checkpoint
from .run_configuration import RunConfiguration, load_run_configuration
from .trainer import EvaluationLog, MambaEMATrainer, ccc_of_predictions

__all__ = [
    "EXIT_CODE",
    "ConversationCollator",
    "EvaluationLog",
    "MambaEMATrainer",
    "RunConfiguration",
    "StopOnSigterm",
    "build_datasets",
    "build_model",
    "build_trainer",
    "cache_frames",
    "ccc_of_predictions",
    "check_labels_vary",
    "check_speech_encoder",
    "choose_checkpoint",
    "load_manifest",
    "load_run_configuration",
    "load_splits",
    "manifest_differences",
    "newest_complete_checkpoint",
    "prediction_table",
    "run_manifest",
    "save_manifest",
    "save_predictions",
    "training_arguments",
    "why_incomplete",
]
