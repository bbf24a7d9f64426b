"""Fine-tune Mamba-EMA on a corpus of conversations (or single utterances).

    accelerate launch examples/run_finetune.py configuration/demo.yaml [section.field=value ...]

One program from top to bottom: configuration, data, model, training, evaluation, a folder that loads by itself.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import transformers
from huggingface_hub import get_token
from transformers import set_seed

from modeling_mamba_ema.data.dataset import ConversationDataset
from modeling_mamba_ema.plots import plot_learning_curve
from modeling_mamba_ema.publishing import TrainingFacts, prepare_release, publish
from modeling_mamba_ema.training import (
    EXIT_CODE,
    EvaluationLog,
    StopOnSigterm,
    build_datasets,
    build_model,
    build_trainer,
    cache_frames,
    ccc_of_predictions,
    check_labels_vary,
    check_speech_encoder,
    choose_checkpoint,
    load_run_configuration,
    load_splits,
    prediction_table,
    run_manifest,
    save_manifest,
    save_predictions,
    training_arguments,
)
from modeling_mamba_ema.training.batch_sampler import seconds_of_turns

logger = logging.getLogger("run_finetune")


def main() -> None:
    # 1. configuration
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configuration", type=Path, help="YAML file, see configuration/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. training.learning_rate=1e-5")
    arguments = parser.parse_args()
    try:
        run = load_run_configuration(arguments.configuration, arguments.overrides)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if run.training.push_to_hub and get_token() is None:
        parser.error("training.push_to_hub: log in first, with `hf auth login` and a token that may write")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    # WavLM gives torch masks of two types; nothing a reader of this log could do about it.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    set_seed(run.training.seed)
    output = Path(run.training.output_dir)

    # 2. model: one that was trained before, a new one, or a new head on a pretrained WavLM
    # 3. data: whole conversations for evaluation, windows of them for training where asked for
    try:
        model, extractor = build_model(run)
        config = model.config
        splits = load_splits(run, config)
    except ValueError as error:
        parser.error(str(error))
    trainer_arguments = training_arguments(run)
    frame_cache = None
    if run.data.cache_features:
        try:
            frame_cache = cache_frames(model, extractor, splits.values(), run.data.cache_folder, trainer_arguments)
        except ValueError as error:
            parser.error(str(error))
    train, validation = build_datasets(run, splits, config.labels, frame_cache)

    # 4. training
    stop_on_sigterm = StopOnSigterm()
    trainer = build_trainer(
        run, model, extractor, train, validation, trainer_arguments, [stop_on_sigterm, EvaluationLog(config.labels)]
    )
    manifest = run_manifest(
        {run.data.train_split: train, run.data.validation_split: validation}, trainer.args.world_size
    )
    try:
        check_labels_vary(run.data.train_split, train)
        check_labels_vary(run.data.validation_split, validation)
        check_speech_encoder(config, trainer.args.world_size, min(map(min, seconds_of_turns(train))))
        with trainer.args.main_process_first(desc="choosing a checkpoint"):
            main_process = trainer.is_world_process_zero()
            checkpoint = choose_checkpoint(run, output / "checkpoints", manifest, main_process)
    except ValueError as error:
        parser.error(str(error))
    if checkpoint is not None and (output / "results.json").exists():
        logger.info("%s holds a finished run; training.resume=never trains anew", output)
        return
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").unlink(missing_ok=True)
        run.save(output / "run_configuration.yaml")
        save_manifest(output, manifest)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%d conversations to learn from, %d trainable parameters", len(train), trainable)
        if checkpoint is not None:
            logger.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop_on_sigterm.interrupted:
        logger.info("SIGTERM: a checkpoint is saved; the same command goes on from it")
        sys.exit(EXIT_CODE)
    if trainer.state.best_model_checkpoint is None:
        sys.exit("no evaluation gave a CCC that is a number, so there is no best model to save")

    # 5. evaluation of the best checkpoint, with intervals over conversations; the test split is measured once
    trainer.compute_metrics = ccc_of_predictions(config.labels, intervals=True)
    results, tables = {}, {}
    for name in (run.data.validation_split, run.data.test_split):
        if name is not None:
            dataset = ConversationDataset(splits[name], config.labels, frame_cache=frame_cache)
            predicted = trainer.predict(dataset, metric_key_prefix=name)
            tables[name] = prediction_table(predicted.predictions, dataset)
            results[name] = {
                key.removeprefix(f"{name}_"): value
                for key, value in predicted.metrics.items()
                if any(part in key for part in ("ccc", "pearson", "rmse", "mae", "num_"))
            }

    # 6. a folder that loads by itself
    if trainer.is_world_process_zero():
        model.save_pretrained(output / "model")
        extractor.save_pretrained(output / "model")
        command = f"accelerate launch examples/run_finetune.py {arguments.configuration}"
        prepare_release(output / "model", TrainingFacts(results, run.data.source, command))
        for name, table in tables.items():
            save_predictions(table, output / f"predictions_{name}.csv")
        plot_learning_curve(trainer.state.log_history, config.labels).savefig(output / "learning_curve.png")
        for name, metrics in results.items():
            logger.info("%s: %d turns of %d conversations", name, metrics["num_turns"], metrics["num_conversations"])
            for label in [*(f"ccc_{label}" for label in config.labels), "ccc"]:
                interval = metrics[f"{label}_low"], metrics[f"{label}_high"]
                logger.info("  %-12s %.3f  (95 %% interval %.3f to %.3f)", label, metrics[label], *interval)
        logger.info("model and feature extractor are in %s", output / "model")
        # Last, and in one piece: this file says that the run is finished.
        unfinished = output / "results.json.part"
        unfinished.write_text(json.dumps(results, indent=2), encoding="utf-8")
        os.replace(unfinished, output / "results.json")
        if run.training.push_to_hub:
            logger.info("uploaded: %s", publish(output / "model", str(run.training.hub_model_id)))


if __name__ == "__main__":
    main()
