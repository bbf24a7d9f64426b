"""What intervals hold on turns that were neither learned from nor calibrated on, over many splits of a corpus.

    mamba-ema prepare synthetic --output data/demo
    python benchmarks/coverage.py configuration/demo.yaml --splits 20

Each split is one training as run_finetune.py does it, the frames of a frozen encoder computed once: the validation
split chooses the epoch and makes the intervals, the test split is held by them or not. `--splits` draws conversations
at random, as many for each split as the corpus has there; `--folds` takes columns of the corpus that name the split of
each row, such as those with speakers left out. With `model.params.predict_spread=true`, intervals scaled by the spread
stand beside those that are not, and over all splits together what the spread is worth.
"""

import argparse
import copy
import dataclasses
import logging
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import transformers
from datasets import DatasetDict, concatenate_datasets
from transformers import set_seed

from modeling_mamba_ema.comparison.runs import run_of_fold, train_and_predict
from modeling_mamba_ema.comparison.statistics import cell_ccc
from modeling_mamba_ema.metrics.confidence import add_intervals, calibrate, coverage, spread_metrics
from modeling_mamba_ema.training import build_model, cache_frames, load_run_configuration, load_splits


def random_split(splits: DatasetDict, seed: int) -> DatasetDict:
    """Conversations drawn anew, as many for each split as it had."""
    named = [
        rows.map(lambda row, split=name: {"conversation_id": f"{split}/{row['conversation_id']}"})
        for name, rows in splits.items()
    ]
    counts = [len(set(rows["conversation_id"])) for rows in named]
    rows = concatenate_datasets(named)
    drawn = np.random.default_rng(seed).permutation(np.unique(rows["conversation_id"]))
    parts = np.split(drawn, np.cumsum(counts)[:-1])
    own = rows.to_pandas()["conversation_id"]
    return DatasetDict(
        {name: rows.select(np.flatnonzero(own.isin(part))) for name, part in zip(splits, parts, strict=True)}
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configuration", type=Path, help="YAML file, see configuration/")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="directly behind it")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--splits", type=int, help="random splits of the conversations, each with a seed of its own")
    chosen.add_argument("--folds", nargs="+", metavar="COLUMN", help="columns that name each row's split")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    run = load_run_configuration(options.configuration, options.overrides)
    if run.data.validation_split is None:
        raise ValueError("data.validation_split is null, but a validation split makes the intervals: name one")
    arguments = run.training_arguments()
    output = Path(str(arguments.output_dir)) / "coverage"
    set_seed(arguments.seed)
    model, extractor = build_model(run)
    config = model.config
    folds = [load_splits(run_of_fold(run, fold).data, config, output) for fold in options.folds or [None]]
    everything = [rows for splits in folds for rows in splits.values()]
    frozen = config.freeze_speech_encoder
    cache = cache_frames(model, extractor, everything, run.data.cache_folder, arguments) if frozen else None
    if options.splits:
        folds = [random_split(folds[0], seed) for seed in range(options.splits)]

    kinds = {"scaled by the spread": True} if config.predict_spread else {}
    kinds["of one length"] = False
    rows, tables = [], []
    for number, splits in enumerate(folds):
        seed = arguments.seed + (number if options.splits else 0)
        own = dataclasses.replace(run, training={**run.training, "seed": seed, "report_to": "none"})
        predicted = train_and_predict(own, splits, cache)
        tables.append(predicted[str(run.data.test_split)])
        for kind, scaled in kinds.items():
            measured = copy.deepcopy(config)
            measured.predict_spread = scaled
            calibrate(measured, predicted[str(run.data.validation_split)])
            if measured.interval_radii is None:
                raise ValueError("the validation split has too few conversations for model.params.interval_level")
            table = add_intervals(tables[-1], measured)
            held = coverage(table, measured)
            for label in config.labels:
                lengths = (table["high"] - table["low"])[table["label"] == label]
                rows.append((kind, number, label, held[f"coverage_{label}"], lengths.mean()))
                print(f"split {number}, {kind}: {label} held {rows[-1][3]:.1%}, length {rows[-1][4]:.3f}", flush=True)

    found = pd.DataFrame(rows, columns=["intervals", "split", "label", "held", "length"])
    print(f"\nasked for {config.interval_level:.0%}, over {len(folds)} splits:")
    for (kind, label), part in found.groupby(["intervals", "label"], sort=False):
        held = part["held"]
        print(
            f"  intervals {kind}, {label}: held {held.mean():.1%} on average, {held.min():.0%} to {held.max():.0%} in "
            f"single splits (standard deviation {100 * held.std():.1f} points); mean length {part['length'].mean():.3f}"
        )
    table = pd.concat(tables, ignore_index=True)
    ccc = cell_ccc(table, config.labels)
    print(f"  CCC over all test turns: {', '.join(f'{label} {ccc[label]:.3f}' for label in config.labels)}")
    worth = spread_metrics(table, config)
    for name in (name for name in worth if not name.endswith(("_low", "_high"))):
        print(f"  {name} {worth[name]:.3f} (95 % interval {worth[f'{name}_low']:.3f} to {worth[f'{name}_high']:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
