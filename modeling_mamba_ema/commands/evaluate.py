"""Measure a saved model on a split of a corpus.

    python examples/evaluate_checkpoint.py outputs/demo/model data/demo --split test --output outputs/demo/evaluation

Writes predictions (conversation, turn, label, prediction), metrics with 95 % intervals over conversations, and two
pictures: predicted against true, and the error by the position of a turn in its conversation.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.data.bad_audio import describe_bad_audio, save_bad_audio, scan_audio, without
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.plots import plot_error_by_position, plot_predictions
from modeling_mamba_ema.training import (
    ConversationCollator,
    MambaEMATrainer,
    cache_frames,
    ccc_of_predictions,
    prediction_table,
    save_predictions,
)
from modeling_mamba_ema.training.run_configuration import DataSection

logger = logging.getLogger("evaluate_checkpoint")


def renaming(text: str) -> tuple[str, str]:
    """NAME=COLUMN, as the command line gives it."""
    name, separator, column = text.partition("=")
    if not (name and separator and column):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=COLUMN")
    return name, column


def main() -> None:
    # 1. arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a Mamba-EMA")
    parser.add_argument("source", help="a corpus: folder with metadata.jsonl/.csv/.parquet, or such a file")
    parser.add_argument(
        "--columns", nargs="*", default=[], type=renaming, metavar="NAME=COLUMN", help="such as valence=EmoVal"
    )
    parser.add_argument("--on-bad-audio", choices=["abort", "skip"], default="abort", help="default: %(default)s")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--format", choices=["csv", "parquet"], default="csv", help="of the predictions")
    parser.add_argument("--conversations-per-batch", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--cache-features", action="store_true", help="read the frames of a frozen encoder from the disk"
    )
    parser.add_argument("--cache-folder", default=DataSection.cache_folder, help="default: %(default)s")
    parser.add_argument("--revision", default="main", help="commit, tag or branch of the model on the Hub")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()

    # 2. model and data
    model = MambaEMAForRegression.from_pretrained(arguments.model, revision=arguments.revision)
    extractor = MambaEMAFeatureExtractor.from_pretrained(arguments.model, revision=arguments.revision)
    labels = model.config.labels
    try:
        splits = load_emotion_dataset(arguments.source, labels, model.config.label_ranges, dict(arguments.columns))
    except ValueError as error:
        parser.error(str(error))
    if arguments.split not in splits:
        parser.error(f"{arguments.source} has no split {arguments.split}; there are {', '.join(splits)}")
    used = {arguments.split: splits[arguments.split]}
    bad_audio = scan_audio(used, extractor.max_seconds)
    if bad_audio:
        logger.error(describe_bad_audio(bad_audio, used))
        if arguments.on_bad_audio == "abort":
            sys.exit("mend them, or give --on-bad-audio skip to measure without them")
        splits = without(used, bad_audio)
        save_bad_audio(bad_audio, arguments.output / "skipped_audio.jsonl")
    trainer_arguments = TrainingArguments(
        output_dir=str(arguments.output),
        per_device_eval_batch_size=arguments.conversations_per_batch,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
    )
    frame_cache = None
    if arguments.cache_features:
        rows = splits[arguments.split]
        try:
            frame_cache = cache_frames(model, extractor, [rows], arguments.cache_folder, trainer_arguments)
        except ValueError as error:
            parser.error(str(error))
    dataset = ConversationDataset(splits[arguments.split], labels, frame_cache=frame_cache)

    # 3. predictions of whole conversations
    arguments.output.mkdir(parents=True, exist_ok=True)
    trainer = MambaEMATrainer(
        model=model,
        args=trainer_arguments,
        data_collator=ConversationCollator(extractor),
        compute_metrics=ccc_of_predictions(labels, intervals=True),
    )
    predicted = trainer.predict(dataset, metric_key_prefix=arguments.split)
    table = prediction_table(predicted.predictions, dataset)
    speed = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    metrics = {
        name: value
        for key, value in predicted.metrics.items()
        if (name := key.removeprefix(f"{arguments.split}_")) not in speed
    }

    # 4. files
    if trainer.is_world_process_zero():
        save_predictions(table, arguments.output / f"predictions.{arguments.format}")
        (arguments.output / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        plot_predictions(table).savefig(arguments.output / "predicted_against_true.png")
        plot_error_by_position(table).savefig(arguments.output / "error_by_position.png")
        logger.info(
            "%s: %d turns of %d conversations", arguments.split, metrics["num_turns"], metrics["num_conversations"]
        )
        for name in [*(f"ccc_{label}" for label in labels), "ccc"]:
            interval = metrics[f"{name}_low"], metrics[f"{name}_high"]
            logger.info("  %-14s %.3f  (95 %% interval %.3f to %.3f)", name, metrics[name], *interval)
        logger.info("written to %s", arguments.output)


if __name__ == "__main__":
    main()
