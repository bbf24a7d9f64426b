"""A corpus of noise that takes no time to write, and a run configuration small enough to train on it in seconds."""

import json
from pathlib import Path

import numpy as np
import soundfile as sf
import yaml

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.training import ConversationCollator, MambaEMATrainer, MambaEMATrainingArguments
from tests.support.models import tiny_model

LABELS = ["valence", "arousal"]
SPLITS = {"train": 10, "validation": 5, "test": 4}

TINY_RUN = {
    "model": {
        "params": {
            "speech_encoder_pooling": "attention",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "state_size": 8,
            "head_dim": 8,
            "dropout": 0.1,
            "speech_encoder_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "conv_dim": [8] * 7,
                "num_conv_pos_embeddings": 16,
                "num_conv_pos_embedding_groups": 2,
            },
        }
    },
    "training": {
        "num_train_epochs": 4,
        "max_seconds_per_batch": 4.0,
        "learning_rate": 2e-3,
        "seed": 0,
        **{f"{what}_strategy": "steps" for what in ("eval", "save", "logging")},
        **{f"{what}_steps": 2 for what in ("eval", "save", "logging")},
    },
}


def write_corpus(folder: Path) -> Path:
    """Conversations of 1 to 4 turns of 0.3 to 0.7 s; loudness carries arousal. Raters differ most in the middle."""
    random = np.random.default_rng(0)
    lines = []
    for split, count in SPLITS.items():
        for conversation in range(count):
            for turn in range(1 + conversation % 4):
                arousal, valence = random.random(2)
                name = f"{split}_{conversation}_{turn}.wav"
                folder.mkdir(parents=True, exist_ok=True)
                samples = random.normal(size=int(16_000 * random.uniform(0.3, 0.7)))
                sf.write(folder / name, (0.02 + 0.2 * arousal) * np.clip(samples, -4, 4), 16_000)
                row = {"file_name": name, "conversation_id": f"{split}_{conversation}", "turn": turn, "split": split}
                row |= {"valence": round(valence, 3), "arousal": round(arousal, 3)}
                row |= {f"{label}_sd": round(0.05 + 0.8 * row[label] * (1 - row[label]), 3) for label in LABELS}
                lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_run(path: Path, corpus: Path, output: Path) -> Path:
    run = {**TINY_RUN, "data": {"source": str(corpus), "cache_folder": str(path.parent / "cache")}}
    run["training"] = {**TINY_RUN["training"], "output_dir": str(output)}
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def make_trainer(tmp_path, dataset, model=None, **arguments):
    """A trainer for two steps of a tiny model; `arguments` are those of MambaEMATrainingArguments."""
    quiet = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "steps", "load_best_model_at_end": False}
    usual = {"max_steps": 2, "max_seconds_per_batch": 6.0, "seed": 0, "dataloader_drop_last": False}
    # What these tests were made with: no decay, no warm-up, a constant fall.
    plain = {"learning_rate": 5e-5, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "linear"}
    return MambaEMATrainer(
        model=tiny_model() if model is None else model,
        args=MambaEMATrainingArguments(
            output_dir=str(tmp_path), disable_tqdm=True, **{**quiet, **usual, **plain, **arguments}
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=ConversationCollator(MambaEMAFeatureExtractor()),
    )
