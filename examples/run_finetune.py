"""Fine-tune Mamba-EMA on a corpus of conversations (or single utterances).

    accelerate launch examples/run_finetune.py configuration/demo.yaml [section.field=value ...]

One program from top to bottom: configuration, data, model, training, evaluation, a folder that loads by itself.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch
import transformers
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.training import (
    ConversationCollator,
    EvaluationLog,
    MambaEMATrainer,
    ccc_of_predictions,
    load_run_configuration,
)

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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    # WavLM gives torch masks of two types; nothing a reader of this log could do about it.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    set_seed(run.training.seed)
    output = Path(run.training.output_dir)

    # 2. model: a new one, or a new head on a pretrained WavLM
    if run.model.pretrained_speech_encoder is None:
        model = MambaEMAForRegression(MambaEMAConfig(**run.model.params))
    else:
        model = MambaEMAForRegression.from_pretrained_speech_encoder(
            run.model.pretrained_speech_encoder, revision=run.model.revision, **run.model.params
        )
    config = model.config
    extractor = MambaEMAFeatureExtractor(do_normalize=config.do_normalize, max_seconds=run.data.max_seconds)

    # 3. data: whole conversations for evaluation, windows of them for training where asked for
    splits = load_emotion_dataset(run.data.source, config.labels, config.label_ranges)
    wanted = [run.data.train_split, run.data.validation_split, run.data.test_split]
    missing = [split for split in wanted if split is not None and split not in splits]
    if missing:
        parser.error(f"{run.data.source} has no split {', '.join(missing)}; there are {', '.join(splits)}")
    train = ConversationDataset(splits[run.data.train_split], config.labels, run.data.turns_per_item)
    validation = ConversationDataset(splits[run.data.validation_split], config.labels)

    # 4. training
    trainer = MambaEMATrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output / "checkpoints"),
            num_train_epochs=run.training.epochs,
            per_device_train_batch_size=run.training.conversations_per_batch,
            per_device_eval_batch_size=run.training.conversations_per_batch,
            dataloader_drop_last=True,  # a last batch of one turn has no CCC
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            dataloader_num_workers=run.training.dataloader_workers,
            learning_rate=run.training.learning_rate,
            weight_decay=run.training.weight_decay,
            lr_scheduler_type=run.training.scheduler,
            warmup_steps=run.training.warmup_ratio,
            max_grad_norm=run.training.max_grad_norm,
            bf16=run.training.bf16,
            gradient_checkpointing=run.training.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="ccc",  # never the loss: a mean over batches is no CCC
            greater_is_better=True,
            logging_strategy="epoch",
            logging_nan_inf_filter=False,  # with the filter NaN reads as loss 0.0, a perfect CCC
            report_to=run.training.report_to,
            seed=run.training.seed,
            remove_unused_columns=False,
            label_names=["labels"],
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=ConversationCollator(extractor),
        processing_class=extractor,
        compute_metrics=ccc_of_predictions(config.labels),
        encoder_learning_rate=run.training.encoder_learning_rate,
        callbacks=[
            EvaluationLog(config.labels),
            *([] if run.training.patience is None else [EarlyStoppingCallback(run.training.patience)]),
        ],
    )
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        run.save(output / "run_configuration.yaml")
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%d conversations to learn from, %d trainable parameters", len(train), trainable)
    trainer.train()

    # 5. evaluation of the best checkpoint, with intervals over conversations; the test split is measured once
    trainer.compute_metrics = ccc_of_predictions(config.labels, intervals=True)
    results = {}
    for name in (run.data.validation_split, run.data.test_split):
        if name is not None:
            dataset = ConversationDataset(splits[name], config.labels)
            metrics = trainer.evaluate(dataset, metric_key_prefix=name)
            results[name] = {
                key.removeprefix(f"{name}_"): value
                for key, value in metrics.items()
                if "ccc" in key or "rmse" in key or "num_" in key
            }

    # 6. a folder that loads by itself
    if trainer.is_world_process_zero():
        model.save_pretrained(output / "model")
        extractor.save_pretrained(output / "model")
        (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        for name, metrics in results.items():
            logger.info("%s: %d turns of %d conversations", name, metrics["num_turns"], metrics["num_conversations"])
            for label in [*(f"ccc_{label}" for label in config.labels), "ccc"]:
                interval = metrics[f"{label}_low"], metrics[f"{label}_high"]
                logger.info("  %-12s %.3f  (95 %% interval %.3f to %.3f)", label, metrics[label], *interval)
        logger.info("model and feature extractor are in %s", output / "model")


if __name__ == "__main__":
    main()
