"""Score a corpus of any size: a row a turn in Parquet files, by several processes.

    mamba-ema score --model outputs/demo/model data/demo --output outputs/scores --workers 2

SOURCE is a folder or a table in the normal form, a folder written by datasets, a name on the Hub, a folder of audio
files, each then a conversation of its own, or - for a table (CSV or JSON lines) from standard input. SOURCE, the files
that it names and the output may be in a store such as s3://bucket/folder. Stopped or killed, the same command goes on
where it was. Audio that cannot be used becomes a row with its reason in `error`, and ends nothing.
"""

import argparse

from .model_options import add_model_options, number_between, quiet_transformers

HELP = "score a corpus of any size into Parquet files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, device=False)
    parser.add_argument("source", help="a corpus, or a folder of audio files")
    parser.add_argument("--split", help="one split of the corpus alone")
    parser.add_argument("--output", required=True, help="folder of the parts")
    where = parser.add_mutually_exclusive_group()
    count = number_between(1, 10_000, int)
    where.add_argument("--workers", type=count, help="processes on the CPU (default: 1, or one for each GPU)")
    where.add_argument("--ray", metavar="ADDRESS", help="score on a Ray cluster; auto: the one of this machine")
    count = number_between(1, 10_000_000, int)
    parser.add_argument("--rows-per-part", type=count, default=2_000, help="turns in a file, about (%(default)s)")
    seconds = number_between(1, 100_000)
    parser.add_argument("--seconds-per-batch", type=seconds, default=120.0, help="audio in one pass (%(default)s)")


def run(options: argparse.Namespace) -> int:
    import torch

    from ..inference.loading import check_model_name
    from ..inference.scoring import ScoringOptions, read_corpus, score_corpus

    check_model_name(options.model, options.revision)
    quiet_transformers()
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = ["cpu"] * options.workers if options.workers else gpus or ["cpu"]
    asked = ScoringOptions(
        options.model, options.revision, options.int8, options.rows_per_part, options.seconds_per_batch
    )
    corpus = read_corpus(options.source, options.split)
    turns, failed = score_corpus(corpus, options.output, asked, devices, options.ray)
    print(f"{turns} turns in {options.output}, {failed} of them without values (their reason is in the column error)")
    return 0
