"""Fine-tuning on transformers' Trainer."""

from ..metrics.confidence import calibrate, risk_against_coverage
from .arguments import MambaEMATrainingArguments
from .batches import ConversationCollator
from .building import (
    build_datasets,
    build_model,
    build_trainer,
    check_labels_vary,
    check_run,
    check_speakers,
    load_splits,
    warn_of_labels,
)
from .callbacks import EvaluationLog, KeepBestWeights, StopOnSignal
from .checkpoints import choose_checkpoint, differences, run_manifest, save_run
from .evaluation import describe_metrics, measure, prediction_table, save_predictions
from .frame_caching import cache_frames
from .lora import add_lora, load_lora, merge_lora
from .processes import (
    failing_together,
    lock_folder,
    naming_lost_processes,
    require_same_data,
    require_shared_folder,
    tell_launcher,
)
from .run_configuration import DataSection, RunConfiguration, load_run_configuration
from .trainer import MambaEMATrainer
