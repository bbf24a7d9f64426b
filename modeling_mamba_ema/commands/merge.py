"""Make an ordinary model of LoRA adapters: they are added to the weights on which they were trained.

FOLDER is the `adapter` folder of a training with LoRA, or one of its checkpoints. Its config.json names what the frozen
weights come from, a folder or a name on the Hub; they must be the same as in the training. The training itself leaves
its best model in `model`, with the adapters merged.
"""

import argparse
from pathlib import Path

from .model_options import quiet_transformers

HELP = "merge LoRA adapters into a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="adapters, e.g. outputs/finetune_lora/adapter")
    parser.add_argument("output", type=Path, help="folder to write; it must be empty or not exist")


def run(options: argparse.Namespace) -> int:
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise OSError(f"{options.output} exists and is not empty; name another folder")
    from ..feature_extraction_mamba_ema import MambaEMAFeatureExtractor
    from ..training import load_lora, merge_lora

    quiet_transformers()
    model = load_lora(options.folder)
    merge_lora(model)
    MambaEMAFeatureExtractor.from_pretrained(options.folder).save_pretrained(options.output)
    model.save_pretrained(options.output)
    print(f"the model is in {options.output}")
    return 0
