"""The trainings of a comparison: what they share, and one of them from the model to its predictions."""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from transformers import set_seed

from .. import training
from ..conversation_encoder import CONTEXTS, SCOPES
from ..data.atomic_write import atomic_write
from ..data.frame_cache import FrameCache
from ..data.utterances import utterances_of
from ..modeling_mamba_ema import MambaEMAForRegression
from ..pooling import POOLINGS
from ..training import RunConfiguration
from .statistics import BASELINE, BASELINE_SCOPE, MEAN, Cell, cell_ccc

logger = logging.getLogger(__name__)


def check_comparable(
    run: RunConfiguration,
    poolings: Sequence[str],
    contexts: Sequence[str],
    split: str,
    scopes: Sequence[str] = (BASELINE_SCOPE,),
) -> None:
    """Raise `ValueError` before any training for what could not be compared in the end, with what to change."""
    chosen = (("poolings", poolings, POOLINGS), ("contexts", contexts, CONTEXTS), ("scopes", scopes, SCOPES))
    for what, names, known in chosen:
        unknown = [name for name in names if name not in known]
        if unknown:
            hint = "; settings stand directly behind the configuration" if any("=" in name for name in unknown) else ""
            raise ValueError(f"--{what} names {', '.join(unknown)}; allowed are {', '.join(known)}{hint}")
    if run.model.pretrained_model is not None:
        raise ValueError(
            "every training needs a new head: name model.pretrained_speech_encoder instead of model.pretrained_model "
            "(a Mamba-EMA's folder gives its encoder)"
        )
    if len(set(scopes)) > 1 and BASELINE_SCOPE not in scopes:
        raise ValueError(f"scopes are compared with {BASELINE_SCOPE}; give it to --scopes, too")
    if (BASELINE not in poolings or len(set(poolings)) < 2) and (len(set(poolings)) > 1 or len(set(scopes)) < 2):
        raise ValueError(f"poolings are compared with {BASELINE}; give it and another one to --poolings")
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
    params = {
        **run.model.params,
        **{"speech_encoder_pooling": cell.pooling, "context": cell.context, "context_scope": cell.scope},
    }
    return dataclasses.replace(
        run_of_fold(run, cell.fold),
        model=dataclasses.replace(run.model, params=params),
        training={**run.training, "seed": cell.seed},
    )


@dataclasses.dataclass(frozen=True)
class Trainings:
    """What all trainings gave."""

    model: MambaEMAForRegression  # one as they began, for its costs
    folds: dict[str | None, DatasetDict]  # the splits of each; a single one, None, where there are no folds
    tables: dict[Cell, pd.DataFrame]  # predictions on the split that was asked for, see `prediction_table`


def train_all(run: RunConfiguration, cells: Sequence[Cell], split: str, output: Path) -> Trainings:
    """Train every cell that is not finished, in this order; its predictions are kept in a folder of its name.

    Where the encoder is frozen, its frames are computed once and every training reads them from the disk. Tables are of
    the predictions on `split`.

    Raises:
        ValueError: what [`load_splits`] or a training refuses, or a folder with trainings on another corpus.
    """
    arguments = run.training_arguments()
    set_seed(arguments.seed)
    model, extractor = training.build_model(run)
    folds = {
        fold: training.load_splits(run_of_fold(run, fold).data, model.config, output)
        for fold in dict.fromkeys(cell.fold for cell in cells)
    }
    scopes = dict.fromkeys(cell.scope for cell in cells)
    for splits in folds.values():
        for scope in scopes:
            training.check_speakers(model.config.with_changes(context_scope=scope), splits, required=len(scopes) > 1)
        for name in dict.fromkeys(filter(None, (run.data.train_split, run.data.validation_split, split))):
            training.check_labels_vary(name, splits[name], model.config.labels)
    rows = [part for splits in folds.values() for part in splits.values()]
    frame_cache = None
    if model.config.freeze_speech_encoder and not run.data.changes_audio:
        frame_cache = training.cache_frames(model, extractor, rows, run.data.cache_folder, arguments)
    fingerprint = _fingerprint(rows, frame_cache)
    tables: dict[Cell, pd.DataFrame] = {}
    for number, cell in enumerate(cells, start=1):
        folder, took = output / "trainings" / cell.name, "finished before"
        finished = folder / "finished.json"
        if not finished.exists():
            started = time.perf_counter()
            for name, table in train_and_predict(run_of_cell(run, cell), folds[cell.fold], frame_cache).items():
                folder.mkdir(parents=True, exist_ok=True)
                training.save_predictions(table, folder / f"{name}.parquet")
            atomic_write(finished, json.dumps({"inputs": fingerprint}))
            took = f"{time.perf_counter() - started:.0f} s"
        elif json.loads(finished.read_text(encoding="utf-8"))["inputs"] != fingerprint:
            raise ValueError(f"{folder} was trained on another corpus, or with another encoder; take another --output")
        tables[cell] = pd.read_parquet(folder / f"{split}.parquet")
        ccc = cell_ccc(tables[cell], model.config.labels)[MEAN]
        logger.info("%d of %d: %s, %s %.3f (%s)", number, len(cells), cell.name, MEAN, ccc, took)
    return Trainings(model, folds, tables)


def train_and_predict(
    run: RunConfiguration, splits: DatasetDict, frame_cache: FrameCache | None
) -> dict[str, pd.DataFrame]:
    """Train as run_finetune.py does, with the best evaluation's weights in memory instead of checkpoints on the disk.

    Returns:
        Predictions on the validation and the test split, where the run names them, see `prediction_table`.
    """
    arguments = run.training_arguments(
        save_strategy="no", load_best_model_at_end=False, disable_tqdm=True, push_to_hub=False
    )
    set_seed(arguments.seed)
    model, extractor = training.build_model(run)
    datasets = training.build_datasets(run.data, splits, model.config, frame_cache)
    train, validation = datasets[run.data.train_split], datasets.get(str(run.data.validation_split))
    best = None if validation is None else training.KeepBestWeights()
    trainer = training.build_trainer(run, model, extractor, train, validation, arguments, [best] if best else [])
    trainer.remove_callback(training.EvaluationLog)
    trainer.train()
    if best is not None:
        best.restore(model)
    return {
        name: training.prediction_table(
            np.asarray(trainer.predict(datasets[name]).predictions), datasets[name], model.config
        )
        for name in (run.data.validation_split, run.data.test_split)
        if name is not None
    }


def _fingerprint(rows: Sequence[Dataset], frame_cache: FrameCache | None) -> str:
    """SHA-256 of what the trainings learn from: tables, and audio with the encoder where frames are cached."""
    inputs = [part.to_pandas().to_csv() for part in rows]
    if frame_cache is not None:
        inputs += [frame_cache.key(utterance) for part in rows for utterance in utterances_of(part)]
    return hashlib.sha256("".join(inputs).encode()).hexdigest()
