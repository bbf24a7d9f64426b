"""Fine-tune Mamba-EMA on a corpus of conversations (or single utterances).

    python examples/run_finetune.py configuration/demo.yaml [section.name=value ...]

One program from top to bottom: arguments, data, model, trainer, training, evaluation, a folder that loads by itself.
Several processes or GPUs: `accelerate launch --config_file configuration/accelerate/... examples/run_finetune.py ...`.
"""

import argparse
import json
import logging
import shlex
import sys
import warnings
from pathlib import Path

try:
    import datasets
    import transformers
    from accelerate.utils import broadcast_object_list
    from huggingface_hub import get_token
    from transformers import set_seed

    from modeling_mamba_ema import training
    from modeling_mamba_ema.data.atomic_write import atomic_write
    from modeling_mamba_ema.data.sources import read_table
    from modeling_mamba_ema.plots.training_pictures import plot_learning_curve
    from modeling_mamba_ema.publishing import TrainingFacts, prepare_release, publish
except KeyboardInterrupt:  # these imports take seconds
    sys.exit(130)
except ModuleNotFoundError as error:
    sys.exit(f"run_finetune.py: {error}; training needs pip install 'modeling-mamba-ema[train]'")

logger = logging.getLogger("run_finetune")


def main() -> int:
    # 1. arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configuration", help="YAML file, see configuration/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.name=value", help="e.g. training.learning_rate=1e-5"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving
    datasets.disable_progress_bars()
    # WavLM gives torch masks of two types, which a reader of this log can do nothing about.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    run = training.load_run_configuration(options.configuration, options.overrides)
    arguments = run.training_arguments()
    if arguments.push_to_hub and (arguments.hub_model_id is None or get_token() is None):
        raise ValueError("training.push_to_hub needs training.hub_model_id (owner/name) and a login: hf auth login")
    set_seed(arguments.seed)
    output = Path(arguments.output_dir)

    # 2. model and data: whole conversations, or windows of them for training where asked for
    with training.failing_together():
        if not Path(run.data.source).exists():  # a misspelt one is noticed before an encoder is downloaded
            read_table(run.data.source)
        model, extractor = training.build_model(run)
        splits = training.load_splits(run.data, model.config, output)
        parts = training.build_datasets(run.data, splits, model.config)
        train, validation = parts[run.data.train_split], parts.get(str(run.data.validation_split))

    # 3. trainer, and the checkpoint of this run that it goes on from
    stop, checkpoint = training.StopOnSignal(), None
    with training.failing_together():
        trainer = training.build_trainer(run, model, extractor, train, validation, arguments, [stop])
        training.check_run(model.config, arguments, run.data, splits)
        manifest = training.run_manifest(splits, arguments.world_size)
    training.require_same_data(manifest)
    training.require_shared_folder(output)
    with training.failing_together():
        if trainer.is_world_process_zero():
            lock = training.lock_folder(output)  # noqa: F841 (held until the program ends)
            checkpoint = training.choose_checkpoint(run, manifest)
    (checkpoint,) = broadcast_object_list([checkpoint])
    if checkpoint is not None and (output / "results.json").exists():
        logger.info("%s holds a finished run; training.resume_from_checkpoint=null trains anew", output)
        return 0
    if trainer.is_world_process_zero():
        (output / "results.json").unlink(missing_ok=True)
        training.save_run(run, manifest)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%d conversations to learn from, %d trainable parameters", len(train), trainable)
        logger.info("beginning anew" if checkpoint is None else f"going on from {checkpoint}")
    if run.data.cache_frames:
        cache = training.cache_frames(model, extractor, splits.values(), run.data.cache_folder, arguments)
        for dataset in parts.values():
            dataset.frame_cache = cache

    # 4. training; the best evaluation's weights are loaded at its end, where there is a validation split
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.received is not None:
        logger.info("%s: a checkpoint is saved; the same command goes on from it", stop.received.name)
        return stop.exit_code
    if arguments.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        raise ValueError("no evaluation gave a CCC that is a number, so there is no best model to save")
    if arguments.lora is not None:
        if trainer.is_world_process_zero():
            model.save_pretrained(output / "adapter")
            extractor.save_pretrained(output / "adapter")
        training.merge_lora(model)
    results = {}
    if validation is not None:
        # What the model is wrong by where it has not learned makes its intervals.
        results[run.data.validation_split], table = training.measure(trainer, validation, model.config)
        training.calibrate(model.config, table)
        if trainer.is_world_process_zero():
            training.save_predictions(table, output / f"predictions_{run.data.validation_split}.csv")
    weights = trainer.accelerator.get_state_dict(trainer.model)  # FSDP collects them from all processes
    if trainer.is_world_process_zero():
        model.save_pretrained(output / "model", state_dict=weights)
        extractor.save_pretrained(output / "model")
        picture = plot_learning_curve(trainer.state.log_history, model.config.labels, trainer.state.best_global_step)
        picture.savefig(output / "learning_curve.png")

    # 5. evaluation with intervals over conversations; the test split is measured once
    if run.data.test_split is not None:
        results[run.data.test_split], table = training.measure(trainer, parts[run.data.test_split], model.config)
        if trainer.is_world_process_zero():
            training.save_predictions(table, output / f"predictions_{run.data.test_split}.csv")
    if trainer.is_world_process_zero():
        for name, metrics in results.items():
            logger.info("%s", training.describe_metrics(name, metrics, model.config))

    # 6. a release: the model's folder with its card, ready to be published
    if trainer.is_world_process_zero():
        processes = arguments.world_size
        launcher = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
        command = f"{launcher} {shlex.join(['examples/run_finetune.py', options.configuration, *options.overrides])}"
        base = run.model.pretrained_model or run.model.pretrained_speech_encoder
        base = None if base in (None, "tiny") or Path(base).exists() else base  # the card names what is on the Hub
        prepare_release(output / "model", TrainingFacts(results, run.data.source, command, base))
        logger.info("the model is in %s", output / "model")
        atomic_write(output / "results.json", json.dumps(results, indent=2))  # says that the run is finished
        if arguments.push_to_hub:
            private = arguments.hub_private_repo is not False
            logger.info("uploaded: %s", publish(output / "model", arguments.hub_model_id, private))
    return 0


if __name__ == "__main__":
    try:
        with training.naming_lost_processes():
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:  # what its reader can mend
        training.tell_launcher(f"run_finetune.py: {error}")
        sys.exit(f"run_finetune.py: {error}")
