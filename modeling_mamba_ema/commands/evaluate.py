"""Measure a saved model on a split of a corpus.

    mamba-ema evaluate --model outputs/demo/model data/demo --split test --output outputs/demo/evaluation

Writes predictions (conversation, turn, label, prediction), metrics with 95 % intervals over conversations, and two
pictures: predicted against true, and the error by the position of a turn in its conversation. Of a model with intervals
it also writes how many of the labels they hold, and risk against coverage (risk_coverage.csv, .png): what is left, and
how wrong it is, where only predictions of some confidence are kept. Of labels that the corpus lacks there are
predictions only. Several processes share the work:
    accelerate launch --config_file configuration/accelerate/... -m modeling_mamba_ema evaluate ...
"""

import argparse
from pathlib import Path
from typing import Any

from .model_options import add_model_options, number_between, quiet_transformers
from .terminal import check_folder

HELP = "measure a model on a corpus with labels"


def renaming(text: str) -> tuple[str, str]:
    """NAME=COLUMN, as the command line gives it."""
    name, separator, column = text.partition("=")
    if not (name and separator and column):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=COLUMN")
    return name, column


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, device=False)
    parser.add_argument("source", help="a corpus: folder with metadata.jsonl/.csv/.parquet, or such a file")
    parser.add_argument(
        "--columns", nargs="*", default=[], type=renaming, metavar="NAME=COLUMN", help="such as valence=EmoVal"
    )
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--format", choices=["csv", "parquet"], default="csv", help="of the predictions")
    parser.add_argument(
        "--on-bad-audio", choices=["abort", "skip"], default="abort", help="files that cannot be used (%(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=number_between(1, 10_000, int),
        default=4,
        help="conversations a process and batch (%(default)s)",
    )
    parser.add_argument("--cache-frames", action="store_true", help="keep the frames of a frozen encoder on the disk")
    parser.add_argument("--cache-folder", default=".cache/frames", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    check_folder(options.output)
    import json
    import logging

    from .. import training
    from ..inference.loading import load_model
    from ..plots.training_pictures import plot_error_by_position, plot_predictions, plot_risk_against_coverage

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_transformers()
    no_training: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    arguments = training.MambaEMATrainingArguments(
        output_dir=str(options.output), per_device_eval_batch_size=options.batch_size, **no_training
    )
    model, extractor = load_model(options.model, options.revision)
    if options.int8:
        model.quantize_speech_encoder()
    data = training.DataSection(source=options.source, columns=dict(options.columns), on_bad_audio=options.on_bad_audio)
    data.cache_folder = options.cache_folder
    data.max_seconds = extractor.max_seconds
    splits = training.load_splits(data, model.config, options.output, wanted=[options.split], labels_optional=True)
    training.warn_of_labels(options.split, splits[options.split], model.config.labels)
    cache = None
    if options.cache_frames:
        cache = training.cache_frames(model, extractor, splits.values(), options.cache_folder, arguments)
    trainer = training.MambaEMATrainer(model, arguments, data_collator=training.ConversationCollator(extractor))
    (dataset,) = training.build_datasets(data, splits, model.config, cache).values()
    metrics, table = training.measure(trainer, dataset, model.config)
    if trainer.is_world_process_zero():
        training.save_predictions(table, options.output / f"predictions.{options.format}")
        (options.output / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        if table["reference"].notna().any():
            plot_predictions(table).savefig(options.output / "predicted_against_true.png")
            plot_error_by_position(table).savefig(options.output / "error_by_position.png")
            if "confidence" in table:
                risk = training.risk_against_coverage(table, model.config)
                training.save_predictions(risk, options.output / "risk_coverage.csv")
                plot_risk_against_coverage(risk).savefig(options.output / "risk_coverage.png")
        print(f"{training.describe_metrics(options.split, metrics, model.config)}\nwritten to {options.output}")
    trainer.accelerator.wait_for_everyone()  # a process that ends badly would take the first along while it writes
    return 0
