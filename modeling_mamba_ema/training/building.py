"""From a run configuration to what a program works with: the model, the splits, the trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import DatasetDict
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from .. import tiny_wavlm
from ..configuration_mamba_ema import MambaEMAConfig
from ..data.bad_audio import describe_bad_audio, drop_bad_audio, save_bad_audio, scan_audio
from ..data.dataset import ConversationDataset, load_emotion_dataset
from ..data.frame_cache import FrameCache
from ..data.sources import read_label_ranges
from ..feature_extraction_mamba_ema import MambaEMAFeatureExtractor
from ..modeling_mamba_ema import MambaEMAForRegression
from .augmentation import AugmentedDataset
from .collator import ConversationCollator
from .run_configuration import RunConfiguration
from .trainer import MambaEMATrainer, ccc_of_predictions

logger = logging.getLogger(__name__)


def build_model(run: RunConfiguration) -> tuple[MambaEMAForRegression, MambaEMAFeatureExtractor]:
    """A model that was trained before, a new head on a pretrained WavLM, or a new model; and its feature extractor.

    Where nothing names the labels' scale, a new model takes the one that the corpus records.

    Raises:
        ValueError: a configuration or a corpus.json that is not what it must be.
    """
    if run.model.pretrained_model is not None:
        model = MambaEMAForRegression.from_pretrained(run.model.pretrained_model, revision=run.model.revision)
    elif run.model.pretrained_speech_encoder is None:
        model = MambaEMAForRegression(MambaEMAConfig(**run.model.params))
    else:
        encoder = run.model.pretrained_speech_encoder
        model = MambaEMAForRegression.from_pretrained_speech_encoder(
            tiny_wavlm.FOLDER if encoder == "tiny" else encoder, revision=run.model.revision, **run.model.params
        )
    known = read_label_ranges(run.data.source)
    if model.config.label_ranges is None and known:
        model.config.label_ranges = {label: list(known[label]) for label in model.config.labels if label in known}
    extractor = MambaEMAFeatureExtractor(do_normalize=model.config.do_normalize, max_seconds=run.data.max_seconds)
    return model, extractor


def load_splits(run: RunConfiguration, config: MambaEMAConfig) -> DatasetDict:
    """The splits that a run names, every utterance of which has audio that can be used.

    Utterances that cannot be used end the run, or are left out and recorded in `skipped_audio.jsonl`, as
    `data.on_bad_audio` says. Each process looks for itself, and finds the same.

    Raises:
        ValueError: a corpus that cannot be read, or without a split that the run names, or with bad audio.
    """
    scales = {label: config.label_range(label) for label in config.labels}
    splits = load_emotion_dataset(run.data.source, config.labels, scales, run.data.columns)
    wanted = [run.data.train_split, run.data.validation_split, run.data.test_split]
    missing = [split for split in wanted if split is not None and split not in splits]
    if missing:
        raise ValueError(f"{run.data.source} has no split {', '.join(missing)}; there are {', '.join(splits)}")
    splits = DatasetDict({split: splits[split] for split in wanted if split is not None})
    bad_audio = scan_audio(splits, run.data.max_seconds)
    output = Path(run.training.output_dir)
    if bad_audio and run.data.on_bad_audio == "abort":
        save_bad_audio(bad_audio, output / "bad_audio.jsonl")
        raise ValueError(
            f"{describe_bad_audio(bad_audio, splits)}\nThey are listed in {output / 'bad_audio.jsonl'}. Mend them, or "
            "go on without them by data.on_bad_audio=skip; data.max_seconds allows longer utterances"
        )
    if run.data.on_bad_audio == "skip":
        save_bad_audio(bad_audio, output / "skipped_audio.jsonl")
    if bad_audio:
        logger.warning("%s\nThey are left out.", describe_bad_audio(bad_audio, splits))
        splits = drop_bad_audio(splits, bad_audio)
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(f"no utterance of the split {split} is left; is the disk with its audio there?")
    return splits


def build_datasets(
    run: RunConfiguration, splits: DatasetDict, labels: Sequence[str], frame_cache: FrameCache | None = None
) -> tuple[ConversationDataset, ConversationDataset]:
    """What a run learns from, in windows where asked for, and the whole conversations of its validation split."""
    windows: dict[str, Any] = {"turns_per_item": run.data.turns_per_item, "context_turns": run.data.context_turns}
    train = ConversationDataset(splits[run.data.train_split], labels, frame_cache=frame_cache, **windows)
    return train, ConversationDataset(splits[run.data.validation_split], labels, frame_cache=frame_cache)


def training_arguments(run: RunConfiguration, **changes: Any) -> TrainingArguments:
    """Trainer's arguments for a run.

    Args:
        run: the resolved configuration.
        changes: arguments to replace, by their name in `TrainingArguments`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available() and not dist.is_initialized():
        # On a CPU, TrainingArguments would start the processes' group without its ddp_timeout: half an hour.
        dist.init_process_group("gloo", timeout=timedelta(seconds=run.training.process_timeout))
    when = "epoch" if run.training.save_steps is None else "steps"
    arguments: dict[str, Any] = {
        "output_dir": str(Path(run.training.output_dir) / "checkpoints"),
        "num_train_epochs": run.training.epochs,
        "per_device_train_batch_size": run.training.conversations_per_batch,
        "per_device_eval_batch_size": run.training.conversations_per_batch,
        "gradient_accumulation_steps": run.training.gradient_accumulation,
        "dataloader_drop_last": True,  # a last batch of one turn has no CCC
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": run.training.dataloader_workers,
        "learning_rate": run.training.learning_rate,
        "weight_decay": run.training.weight_decay,
        "lr_scheduler_type": run.training.scheduler,
        "warmup_steps": run.training.warmup_ratio,
        "max_grad_norm": run.training.max_grad_norm,
        "bf16": run.training.bf16,
        "eval_strategy": when,
        "save_strategy": when,
        "logging_strategy": when,
        "eval_steps": run.training.save_steps,
        "save_steps": run.training.save_steps or 500,
        "logging_steps": run.training.save_steps or 500,
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # else a resumed run forgets its patience
        "load_best_model_at_end": True,
        "metric_for_best_model": "ccc",  # never the loss: a mean over batches is no CCC
        "greater_is_better": True,
        "logging_nan_inf_filter": False,  # with the filter NaN reads as loss 0.0, a perfect CCC
        "report_to": run.training.report_to,
        "ddp_timeout": round(run.training.process_timeout),
        "seed": run.training.seed,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    if run.training.gradient_checkpointing:
        arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(**{**arguments, **changes})


def build_trainer(
    run: RunConfiguration,
    model: MambaEMAForRegression,
    extractor: MambaEMAFeatureExtractor,
    train: ConversationDataset,
    validation: ConversationDataset,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> MambaEMATrainer:
    """The trainer of a run.

    Args:
        run: the resolved configuration.
        model, extractor: of [`build_model`].
        train, validation: to learn from, and to choose the best evaluation on.
        arguments: of [`training_arguments`].
        callbacks: beside those that the configuration asks for.

    Raises:
        ValueError: options that cannot be meant, or do not go together.
    """
    patience = run.training.patience
    changes = {"noise_snr_db": run.data.noise_snr_db, "speed_factors": run.data.speed_factors}
    learnt: ConversationDataset | AugmentedDataset = train
    if any(change is not None for change in changes.values()):
        learnt = AugmentedDataset(train, run.training.seed, **changes, max_seconds=run.data.max_seconds)
    return MambaEMATrainer(
        model=model,
        args=arguments,
        train_dataset=learnt,
        eval_dataset=validation,
        data_collator=ConversationCollator(extractor),
        processing_class=extractor,
        compute_metrics=ccc_of_predictions(model.config.labels),
        encoder_learning_rate=run.training.encoder_learning_rate,
        max_seconds_per_batch=run.data.max_seconds_per_batch,
        mixup_alpha=run.training.mixup,
        callbacks=[*callbacks, *([] if patience is None else [EarlyStoppingCallback(patience)])],
    )
