"""Which pooling is best on your corpus? Every pooling x context x seed (x fold), trained, measured and compared.

    python examples/compare_pooling.py configuration/finetune.yaml data.source=PATH --output outputs/pooling --seeds 5

Takes a run configuration and overrides as run_finetune.py does; pooling, context and seed are set by the comparison.
Where the encoder is frozen, its frames are computed once and every training reads them from the disk. Killed and
started again, the program goes on with the trainings that are not finished.

Writes comparison.md (tables and the verdict in words), .json, .csv (a row a training), .png and .svg.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import transformers
from transformers import set_seed

from modeling_mamba_ema.configuration_mamba_ema import CONTEXTS, POOLINGS
from modeling_mamba_ema.data.dataset import ConversationDataset
from modeling_mamba_ema.data.frame_cache import utterances_of
from modeling_mamba_ema.plots import plot_pooling_comparison, write_picture
from modeling_mamba_ema.training import (
    build_model,
    cache_frames,
    load_run_configuration,
    load_splits,
    save_predictions,
    training_arguments,
)
from modeling_mamba_ema.training.batch_sampler import seconds_of_turns
from modeling_mamba_ema.training.comparison_runs import check_comparable, run_of_cell, run_of_fold, train_and_predict
from modeling_mamba_ema.training.pooling_comparison import MEAN, Cell, cell_ccc, compare_poolings
from modeling_mamba_ema.training.pooling_costs import encoder_cost, pooling_costs
from modeling_mamba_ema.training.pooling_report import Measured, comparison_page, verdict
from modeling_mamba_ema.training.resume import differences

logger = logging.getLogger("compare_pooling")


def main() -> None:
    # 1. configuration
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configuration", type=Path, help="YAML file, see configuration/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. training.epochs=5")
    parser.add_argument("--output", type=Path, default=Path("outputs/pooling"), help="default: %(default)s")
    parser.add_argument("--poolings", nargs="+", choices=POOLINGS, default=list(POOLINGS), help="default: all")
    parser.add_argument("--contexts", nargs="+", choices=CONTEXTS, default=["mamba_ema"], help="default: mamba_ema")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each kind (default: %(default)s)")
    parser.add_argument("--folds", nargs="+", metavar="COLUMN", help="columns that name each row's split, one a fold")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="default: %(default)s")
    arguments = parser.parse_intermixed_args()
    output: Path = arguments.output
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    try:
        run = load_run_configuration(arguments.configuration, arguments.overrides)
        run = dataclasses.replace(
            run, training=dataclasses.replace(run.training, output_dir=str(output), report_to="none")
        )
        check_comparable(run, arguments.poolings, arguments.seeds, arguments.split)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("the comparison trains in one process; start it with python, not with accelerate launch")
    if changed := differences(output / "run_configuration.yaml", run):
        parser.error(f"{output} holds a comparison with other settings: {'; '.join(changed)}; take another --output")
    output.mkdir(parents=True, exist_ok=True)
    run.save(output / "run_configuration.yaml")

    # 2. the corpus, once for each fold, and, where the encoder is frozen, its frames, once for all trainings
    set_seed(run.training.seed)
    frame_cache = None
    try:
        model, extractor = build_model(run)
        folds = {fold: load_splits(run_of_fold(run, fold), model.config) for fold in arguments.folds or [None]}
        rows = [split for splits in folds.values() for split in splits.values()]
        # Noise and speed change the audio each time, so that there are no frames to keep.
        changing = run.data.noise_snr_db is not None or run.data.speed_factors is not None
        if model.config.freeze_speech_encoder and not changing:
            frame_cache = cache_frames(model, extractor, rows, run.data.cache_folder, training_arguments(run))
    except ValueError as error:
        parser.error(str(error))
    labels = model.config.labels
    inputs = [split.to_pandas().to_csv() for split in rows]
    if frame_cache is not None:
        inputs += [frame_cache.key(utterance) for split in rows for utterance in utterances_of(split)]
    fingerprint = hashlib.sha256("".join(inputs).encode()).hexdigest()

    # 3. every training that is not finished; seeds outermost, so that a comparison that is stopped has all kinds
    cells = [
        Cell(pooling, context, run.training.seed + seed, fold)
        for seed in range(arguments.seeds)
        for fold in folds
        for context in arguments.contexts
        for pooling in arguments.poolings
    ]
    split: str = getattr(run.data, f"{arguments.split}_split")
    tables: dict[Cell, pd.DataFrame] = {}
    for number, cell in enumerate(cells, start=1):
        folder = output / "trainings" / cell.name
        finished = folder / "finished.json"
        took = "finished before"
        if not finished.exists():
            started = time.perf_counter()
            predictions = train_and_predict(run_of_cell(run, cell), folds[cell.fold], frame_cache)
            folder.mkdir(parents=True, exist_ok=True)
            for name, table in predictions.items():
                save_predictions(table, folder / f"{name}.parquet")
            write_in_one_piece(finished, {"inputs": fingerprint})
            took = f"{time.perf_counter() - started:.0f} s"
        elif json.loads(finished.read_text(encoding="utf-8"))["inputs"] != fingerprint:
            parser.error(f"{folder} was trained on another corpus, or with another encoder; take another --output")
        tables[cell] = pd.read_parquet(folder / f"{split}.parquet")
        ccc = cell_ccc(tables[cell], labels)[MEAN]
        logger.info("%d of %d: %s, %s %.3f (%s)", number, len(cells), cell.name, MEAN, ccc, took)

    # 4. comparison
    results = compare_poolings(tables, labels)
    measured_rows = [splits[split] for splits in folds.values()]
    named = all("speaker" in part.column_names for part in measured_rows)
    measured = Measured(
        split=split,
        chose_the_epoch=split == run.data.validation_split,
        turns=sum(len(part) for part in measured_rows),
        conversations=sum(len(set(part["conversation_id"])) for part in measured_rows),
        speakers=len({speaker for part in measured_rows for speaker in part["speaker"]}) if named else None,
        seeds=arguments.seeds,
        folds=len(folds),
    )
    lengths = [seconds_of_turns(ConversationDataset(part, labels)) for part in measured_rows]
    seconds = float(np.median([turn for part in lengths for item in part for turn in item]))
    costs, encoder = pooling_costs(model.config, arguments.poolings, seconds), encoder_cost(model, seconds)

    # 5. files
    command = " ".join(["python examples/compare_pooling.py", *sys.argv[1:]])
    page = comparison_page(results, costs, encoder, measured, seconds, command)
    (output / "comparison.md").write_text(page, encoding="utf-8")
    everything = {
        "command": command,
        "measured": dataclasses.asdict(measured),
        "verdict": verdict(results, measured),
        "results": [dataclasses.asdict(result) for result in results],
        "utterance_seconds": seconds,
        "encoder_cost": dataclasses.asdict(encoder),
        "pooling_costs": {pooling: dataclasses.asdict(cost) for pooling, cost in costs.items()},
    }
    write_in_one_piece(output / "comparison.json", everything)
    trainings = [{**dataclasses.asdict(cell), **cell_ccc(table, labels)} for cell, table in tables.items()]
    pd.DataFrame.from_records(trainings).to_csv(output / "comparison.csv", index=False)
    title = f"{split}: {measured.conversations} conversations, {arguments.seeds} seeds"
    write_picture(plot_pooling_comparison(results, MEAN, title), output / "comparison")
    logger.info("\n%s\nwritten to %s", page, output)


def write_in_one_piece(path: Path, content: dict) -> None:
    """Whoever finds the file finds all of it, whenever the program was killed."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


if __name__ == "__main__":
    main()
