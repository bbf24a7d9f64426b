"""From a run configuration to what a program works with: the model, the splits, the trainer."""

import copy
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import TrainerCallback

from .. import tiny_wavlm
from ..ccc_loss import MISSING_LABEL
from ..configuration_mamba_ema import MambaEMAConfig
from ..conversation_encoder import CONTEXTS, SCOPES, number_speakers
from ..data.augmentation import AugmentedDataset
from ..data.bad_audio import describe_bad_audio, save_bad_audio, scan_audio
from ..data.dataset import ConversationDataset, load_emotion_dataset
from ..data.frame_cache import FrameCache
from ..data.sources import read_label_ranges
from ..data.splitting import in_several_splits, split_off
from ..data.utterances import SECONDS, seconds_of
from ..fast_speech_encoder import SPEC_AUGMENT_MIN_FRAMES
from ..feature_extraction_mamba_ema import SAMPLING_RATE, MambaEMAFeatureExtractor
from ..inference.loading import check_model_name, load_model
from ..modeling_mamba_ema import MambaEMAForRegression
from ..speech_encoder import num_frames
from .arguments import MambaEMATrainingArguments
from .batches import ConversationCollator
from .lora import add_lora
from .processes import first_on_each_machine
from .run_configuration import DataSection, RunConfiguration
from .trainer import MambaEMATrainer

logger = logging.getLogger(__name__)

# On the unit scale. The loss' epsilon, and a metric rounded to three places, are for labels that vary far more.
MIN_LABEL_SPREAD = 0.01


def build_model(run: RunConfiguration) -> tuple[MambaEMAForRegression, MambaEMAFeatureExtractor]:
    """The model that a run starts from, and its feature extractor.

    It is a trained model with what `model.params` changes in it, a new head on a pretrained speech encoder, or a new
    model; with adapters where the run has `training.lora`.

    Labels without a scale get the one that the corpus records.

    Raises:
        ImportError: peft is not installed, but needed.
        OSError: what is pretrained cannot be found.
        ValueError: values of `model.params` or `training.lora` that are not allowed, or a corpus.json that is damaged.
    """
    if run.model.pretrained_model is not None:
        model = load_model(run.model.pretrained_model, run.model.revision)[0].float()  # saved in half precision, maybe
        if run.model.params:
            model = model.with_changes(**run.model.params)
    elif run.model.pretrained_speech_encoder is None:
        model = MambaEMAForRegression(MambaEMAConfig(**run.model.params))
    else:
        encoder = run.model.pretrained_speech_encoder
        encoder = str(tiny_wavlm.FOLDER) if encoder == "tiny" else encoder
        check_model_name(encoder, run.model.revision)
        model = MambaEMAForRegression.from_pretrained_speech_encoder(
            encoder, revision=run.model.revision, **run.model.params
        )
    if run.model.freeze_feature_encoder:
        model.freeze_feature_encoder()
    model.config.interval_radii = None  # measured before this training
    known = read_label_ranges(run.data.source)
    ranges = {label: list(known[label]) for label in model.config.labels if label in known}
    if ranges:
        model.config.label_ranges = {**ranges, **(model.config.label_ranges or {})}
    if (lora := run.training.get("lora")) is not None:
        add_lora(model, lora, run.model.pretrained_model or run.model.pretrained_speech_encoder, run.model.revision)
    extractor = MambaEMAFeatureExtractor.for_model(model.config, max_seconds=run.data.max_seconds)
    return model, extractor


def load_splits(
    data: DataSection,
    config: MambaEMAConfig,
    output: Path,
    wanted: Sequence[str] | None = None,
    labels_optional: bool = False,
) -> DatasetDict:
    """The splits that a run names, every utterance of which has audio that can be used.

    Utterances that cannot be used end the run, or are left out and recorded in `skipped_audio.jsonl`, as `on_bad_audio`
    says. The first process of each machine looks at the audio; what it finds good, the others take from the cache
    folder. The rows get the column `audio_seconds`.

    Args:
        config: the model's; names the labels and their scales.
        output: folder for the lists of utterances that cannot be used.
        wanted: names of the splits; None: those that `data` names for training.
        labels_optional: labels for which the corpus has no column are missing.

    Raises:
        ValueError: a corpus that cannot be read, lacks a split, has bad audio, or conversations of more speakers than
            the model has contexts for.
    """
    hint = "give --split one of them; a run with data.split_by has written predictions_test.csv"
    named = wanted is not None
    if wanted is None:
        hint = (
            "data.split_by=speaker makes the missing ones from the training split, with no speaker in two splits; "
            "data.test_split=null leaves out the test, data.validation_split=null the choice of the best checkpoint"
        )
        wanted = [name for name in (data.train_split, data.validation_split, data.test_split) if name is not None]
    scales = {label: config.label_range(label) for label in config.labels}
    splits = load_emotion_dataset(
        data.source, config.labels, scales, data.columns, labels_optional, config.predict_spread
    )
    parts_of = {name: name.split("+") for name in wanted}
    missing = [part for parts in parts_of.values() for part in parts if part not in splits]
    if missing and data.split_by is not None and data.train_split in splits:
        parts = split_off(splits[data.train_split], data.split_by, missing)
        splits |= dict(zip([data.train_split, *missing], parts))
        logger.info("%s", ", ".join(f"{name}: {len(splits[name])} turns" for name in wanted))
    elif missing:
        raise ValueError(f"{data.source} has no split {', '.join(missing)}; there are {', '.join(splits)}: {hint}")
    joined = {name: concatenate_datasets([splits[part] for part in parts]) for name, parts in parts_of.items()}
    unused = {name: rows for name, rows in splits.items() if not any(name in parts for parts in parts_of.values())}
    if unused and not named:  # which a misspelt name would be
        turns = ", ".join(f"{name} ({len(rows)} turns)" for name, rows in unused.items())
        logger.info("splits of %s that are not used: %s", data.source, turns)
    uses = [part for name in wanted for part in parts_of[name]]
    for part in sorted({part for part in uses if uses.count(part) > 1}):
        logger.warning("the split %s is used twice: what is measured on it is not what the model does on others", part)
    for line in in_several_splits({**unused, **joined}, wanted):
        logger.warning("%s", line)
    splits = DatasetDict(joined)
    check_speakers(config, splits)
    corpus = hashlib.sha256(os.path.abspath(data.source).encode()).hexdigest()[:16]
    with first_on_each_machine():
        bad_audio, seconds = scan_audio(splits, data.max_seconds, Path(data.cache_folder) / f"audio-{corpus}.parquet")
    if bad_audio and data.on_bad_audio == "abort":
        save_bad_audio(bad_audio, output / "bad_audio.jsonl")
        raise ValueError(
            f"{describe_bad_audio(bad_audio, splits)}\nThey are listed in {output / 'bad_audio.jsonl'}. Mend them, or "
            "leave them out by data.on_bad_audio=skip (of mamba-ema evaluate: --on-bad-audio skip); data.max_seconds "
            "allows longer ones"
        )
    if data.on_bad_audio == "skip":
        save_bad_audio(bad_audio, output / "skipped_audio.jsonl")
    if bad_audio:
        logger.warning("%s\nThey are left out.", describe_bad_audio(bad_audio, splits))
    for split, rows in splits.items():
        good = [row for row, length in enumerate(seconds[split]) if length is not None]
        if not good:
            raise ValueError(f"no utterance of the split {split} is left; is the disk with its audio there?")
        rows = rows.remove_columns(SECONDS) if SECONDS in rows.column_names else rows
        rows = rows if len(good) == len(rows) else rows.select(good)
        splits[split] = rows.add_column(SECONDS, np.array([seconds[split][row] for row in good]))
    return splits


def build_datasets(
    data: DataSection, splits: DatasetDict, config: MambaEMAConfig, frame_cache: FrameCache | None = None
) -> dict[str, ConversationDataset]:
    """A dataset for each split: conversations, or windows of them to learn from where `data` asks for these."""
    labels = config.target_columns
    datasets = {name: ConversationDataset(rows, labels, frame_cache=frame_cache) for name, rows in splits.items()}
    if data.train_split in splits:
        datasets[data.train_split] = ConversationDataset(
            splits[data.train_split], labels, data.turns_per_item, frame_cache, data.context_turns
        )
    return datasets


def build_trainer(
    run: RunConfiguration,
    model: MambaEMAForRegression,
    extractor: MambaEMAFeatureExtractor,
    train: ConversationDataset,
    validation: ConversationDataset | None,
    arguments: MambaEMATrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> MambaEMATrainer:
    """The trainer of a run, which learns from `train` and chooses the best evaluation on `validation`, if there is one.
    Raises `ValueError` for options that are not allowed, or do not go together."""
    arguments = copy.copy(arguments)
    arguments.push_to_hub = False  # left to the program: Trainer would upload checkpoints, not a release
    learnt: ConversationDataset | AugmentedDataset = train
    if run.data.changes_audio:
        noise, speeds = run.data.noise_snr_db, run.data.speed_factors
        learnt = AugmentedDataset(train, arguments.seed, noise, speeds, run.data.max_seconds)
    return MambaEMATrainer(
        model=model,
        args=arguments,
        train_dataset=learnt,
        eval_dataset=validation,
        data_collator=ConversationCollator(extractor),
        processing_class=extractor,
        callbacks=list(callbacks),
    )


def check_run(
    config: MambaEMAConfig, arguments: MambaEMATrainingArguments, data: DataSection, splits: DatasetDict
) -> None:
    """Find what would ruin a run before its first step.

    A test split without labels is no reason to refuse a run: its predictions are written, and what it cannot be
    measured on is said.

    Raises:
        ValueError: a metric that no evaluation gives, labels that do not vary, or settings of WavLM that stop or spoil
            training.
    """
    kinds = ("ccc", "pearson", "rmse", "mae")
    metrics = [*kinds, *(f"{kind}_{label}" for kind in kinds for label in config.labels)]
    chosen = str(arguments.metric_for_best_model).removeprefix("eval_")
    if chosen not in (*metrics, "loss"):
        raise ValueError(f"training.metric_for_best_model is {chosen}; evaluations give {', '.join(metrics)} and loss")
    for name in filter(None, (data.train_split, data.validation_split)):
        check_labels_vary(name, splits[name], config.labels, ", or leave this label out of model.params.id2label")
    for column in config.target_columns[len(config.labels) :]:
        if max(splits[data.train_split][column]) == MISSING_LABEL:
            raise ValueError(
                f"model.params.predict_spread is true, but the split {data.train_split} of {data.source} has no "
                f"{column}: it needs the standard deviation of the raters for each label (data.columns can name it)"
            )
    if data.test_split is not None:
        warn_of_labels(data.test_split, splits[data.test_split], config.labels)
    check_speech_encoder(config, arguments.world_size, splits[data.train_split])
    learns = arguments.lora is not None or not config.freeze_speech_encoder
    if learns and arguments.device.type == "cpu" and arguments.world_size == 1 and torch.get_num_threads() > 1:
        logger.info(
            "one process trains the speech encoder with %d threads; on a CPU a process for each core is often faster: "
            "accelerate launch --config_file configuration/accelerate/cpu_two_processes.yaml --num_processes %d",
            *[torch.get_num_threads()] * 2,
        )


def warn_of_labels(split: str, rows: Dataset, labels: Sequence[str]) -> None:
    """Log for which labels a split gives no figure, or one that says nothing."""
    for label in labels:
        try:
            check_labels_vary(split, rows, [label])
        except ValueError as error:
            logger.warning("%s", error)


def check_speakers(config: MambaEMAConfig, splits: DatasetDict, required: bool = False) -> None:
    """A context of each speaker needs their names, and no more of them than the model has room for.

    Raises:
        ValueError: a conversation has more speakers than `max_speakers`, or no speaker is named where that is
            `required`; else a warning is logged.
    """
    if not (SCOPES[config.context_scope].speaker and any(CONTEXTS[config.context])):
        return
    for split, rows in splits.items():
        if "speaker" not in rows.column_names:
            text = (
                f"context_scope is {config.context_scope}, but the split {split} has no column 'speaker': all "
                "turns of a conversation count as those of one speaker"
            )
            if required:
                raise ValueError(text)
            logger.warning("%s", text)
            continue
        table = rows.select_columns(["conversation_id", "speaker"]).to_pandas()
        for conversation, names in table.groupby("conversation_id", sort=False)["speaker"]:
            count = 1 + max(number_speakers(names.where(names.notna(), None)))
            if count > config.max_speakers:
                raise ValueError(
                    f"conversation {conversation!r} of the split {split} has {count} speakers, but the model keeps a "
                    f"context for {config.max_speakers}; set model.params.max_speakers={count}, or "
                    "model.params.context_scope=conversation"
                )


def check_labels_vary(split: str, rows: Dataset, labels: Sequence[str], way_out: str = "") -> None:
    """Refuse a split in which a label is missing, or (nearly) the same in all turns; `way_out` ends the message."""
    for label in labels:
        values = np.asarray(rows[label][:], dtype=np.float64)
        values = values[values != MISSING_LABEL]
        if values.size < 2 or values.std() < MIN_LABEL_SPREAD:
            what = "missing" if values.size == 0 else f"{values.mean():.3g} throughout"
            raise ValueError(
                f"{label} is {what} in the split {split} ({values.size} labelled turns): a CCC needs two turns or more "
                f"with labels that vary. Check the column and its scale{way_out}"
            )


def check_speech_encoder(config: MambaEMAConfig, world_size: int, rows: Dataset) -> None:
    """Refuse layer drop with several processes, and SpecAugment with short utterances."""
    encoder = config.speech_encoder_config
    if config.freeze_speech_encoder:  # it stays in evaluation mode, where neither is done
        return
    if encoder.layerdrop > 0 and world_size > 1:
        raise ValueError(
            f"speech_encoder_config.layerdrop is {encoder.layerdrop:g} with {world_size} processes: a layer that is "
            "left out has no gradient, for which the other processes wait. Set it to 0"
        )
    if encoder.apply_spec_augment:
        shortest = min(seconds_of(rows))
        if num_frames(round(shortest * SAMPLING_RATE), encoder) < SPEC_AUGMENT_MIN_FRAMES:
            raise ValueError(
                "speech_encoder_config.apply_spec_augment is on and the shortest utterance lasts "
                f"{shortest:.2f} s; SpecAugment hides most of an utterance of fewer than {SPEC_AUGMENT_MIN_FRAMES} "
                "frames (a second). Set it to false, or leave short utterances out"
            )
