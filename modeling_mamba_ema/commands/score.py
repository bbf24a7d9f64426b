"""Score a corpus of any size: a row a turn in Parquet files, by several processes.

    mamba-ema score --model outputs/demo/model data/demo --output outputs/scores --workers 2

SOURCE is a folder or a table in the normal form, a folder written by datasets, a name on the Hub, or a folder of audio
files, each then a conversation of its own. Stopped or killed, the same command goes on where it was. Audio that cannot
be used becomes a row with its reason in `error`, and ends nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .model_options import add_model_options

HELP = "score a corpus of any size into Parquet files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, device=False)
    parser.add_argument("source", help="a corpus, or a folder of audio files")
    parser.add_argument("--split", help="one split of the corpus alone")
    parser.add_argument("--output", type=Path, required=True, help="folder of the parts")
    parser.add_argument("--workers", type=int, help="processes on the CPU (default: 1, or one for each GPU)")
    parser.add_argument("--rows-per-part", type=int, default=2_000, help="turns in a file, about (%(default)s)")
    parser.add_argument("--seconds-per-batch", type=float, default=120.0, help="audio in one pass (%(default)s)")


def run(options: argparse.Namespace) -> int:
    import torch
    from transformers.utils import logging

    from ..inference.loading import check_model_name
    from ..inference.scoring import ScoringOptions, read_corpus, score_corpus

    for name in ("workers", "rows_per_part", "seconds_per_batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, but must be at least 1")
    check_model_name(options.model, options.revision)
    logging.disable_progress_bar()
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = ["cpu"] * options.workers if options.workers else gpus or ["cpu"]
    asked = ScoringOptions(
        options.model, options.revision, options.rows_per_part, options.seconds_per_batch, tuple(devices)
    )
    turns, without = score_corpus(read_corpus(options.source, options.split), options.output, asked)
    print(f"{turns} turns in {options.output}, {without} of them without values (their reason is in the column error)")
    return 0
