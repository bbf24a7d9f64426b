"""The trainings of a comparison of poolings: what they share, and one of them from the model to its predictions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
from datasets import DatasetDict
from transformers import PrinterCallback, set_seed

from ..data.dataset import ConversationDataset
from ..data.frame_cache import FrameCache
from .best_weights import KeepBestWeights
from .building import build_datasets, build_model, build_trainer, training_arguments
from .pooling_comparison import BASELINE, Cell
from .predictions import prediction_table
from .run_configuration import RunConfiguration


def check_comparable(run: RunConfiguration, poolings: list[str], seeds: int, split: str) -> None:
    """Refuse before any training what could not be compared in the end.

    Args:
        run: the configuration that all trainings share.
        poolings: to compare.
        seeds: number of trainings of each kind.
        split: "validation" or "test", what they are measured on.

    Raises:
        ValueError: with what to change.
    """
    if run.model.pretrained_model is not None:
        raise ValueError(
            "every training needs a new head: name model.pretrained_speech_encoder instead of model.pretrained_model "
            "(a Mamba-EMA's folder gives its encoder)"
        )
    if BASELINE not in poolings or len(set(poolings)) < 2:
        raise ValueError(f"poolings are compared with {BASELINE}; give it and another one to --poolings")
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}, but each kind needs one training at least")
    if run.model.params.get("freeze_speech_encoder") and run.model.pretrained_speech_encoder is None:
        raise ValueError(
            "a frozen encoder with random weights would be another one in each training; name "
            "model.pretrained_speech_encoder, or leave model.params.freeze_speech_encoder out"
        )
    if getattr(run.data, f"{split}_split") is None:
        raise ValueError(f"data.{split}_split is null; name a split, or choose another --split")


def run_of_fold(run: RunConfiguration, fold: str | None) -> RunConfiguration:
    """The run whose splits are in the column `fold`."""
    if fold is None:
        return run
    return dataclasses.replace(run, data=dataclasses.replace(run.data, columns={**run.data.columns, "split": fold}))


def run_of_cell(run: RunConfiguration, cell: Cell) -> RunConfiguration:
    """The run of one training of the comparison."""
    params = {**run.model.params, "speech_encoder_pooling": cell.pooling, "context": cell.context}
    return dataclasses.replace(
        run_of_fold(run, cell.fold),
        model=dataclasses.replace(run.model, params=params),
        training=dataclasses.replace(run.training, seed=cell.seed),
    )


def train_and_predict(
    run: RunConfiguration, splits: DatasetDict, frame_cache: FrameCache | None
) -> dict[str, pd.DataFrame]:
    """Train as run_finetune.py does, with the best evaluation's weights in memory instead of checkpoints on the disk.

    Args:
        run: of one training.
        splits: of [`load_splits`].
        frame_cache: with the frames of its utterances, or None.

    Returns:
        Predictions on the validation and the test split, see `prediction_table`.

    Raises:
        ValueError: nothing could be learned, as the message says.
    """
    set_seed(run.training.seed)
    model, extractor = build_model(run)
    labels = model.config.labels
    best = KeepBestWeights()
    trainer = build_trainer(
        run,
        model,
        extractor,
        *build_datasets(run, splits, labels, frame_cache),
        training_arguments(run, save_strategy="no", load_best_model_at_end=False, disable_tqdm=True),
        [best],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    best.restore(model)
    tables = {}
    for name in (run.data.validation_split, run.data.test_split):
        if name is not None:
            dataset = ConversationDataset(splits[name], labels, frame_cache=frame_cache)
            tables[name] = prediction_table(np.asarray(trainer.predict(dataset).predictions), dataset)
    return tables
