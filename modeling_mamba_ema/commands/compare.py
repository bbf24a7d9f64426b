"""Which pooling and scope are best on your corpus? Every pooling x context x scope x seed (x fold), trained, measured
and compared.

    mamba-ema compare configuration/finetune.yaml data.source=PATH --seeds 5

Takes a run configuration and overrides as run_finetune.py does; pooling, context, scope and seed are set by the
comparison. Scopes need the column `speaker`: --scopes conversation speaker both.
Where the encoder is frozen, its frames are computed once and every training reads them from the disk. Killed and
started again, the same command goes on with the trainings that are not finished.

Writes comparison.md (tables and the verdict in words), .json, .csv (a row a training), .png and .svg.
"""

import argparse
from pathlib import Path

from .model_options import number_between, quiet_transformers
from .terminal import check_folder

HELP = "which pooling, and whose context, are best on a corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configuration", type=Path, help="YAML file, see configuration/")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.name=value",
        help="directly behind it, e.g. training.num_train_epochs=5",
    )
    parser.add_argument("--output", type=Path, help="folder to write; default: comparison in training.output_dir")
    parser.add_argument("--poolings", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--contexts", nargs="+", metavar="NAME", default=["mamba_ema"], help="default: mamba_ema")
    parser.add_argument("--scopes", nargs="+", metavar="NAME", help="default: the configuration's")
    seeds = number_between(1, 1_000, int)
    parser.add_argument("--seeds", type=seeds, default=5, help="trainings of each kind (default: %(default)s)")
    parser.add_argument("--folds", nargs="+", metavar="COLUMN", help="columns that name each row's split, one a fold")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    import dataclasses
    import logging
    import os
    import shlex
    import sys
    import warnings

    from ..comparison import Cell, check_comparable, train_all, write_comparison
    from ..pooling import POOLINGS
    from ..training import differences, load_run_configuration

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_transformers()
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the comparison trains in one process; start it without accelerate launch")

    # 1. configuration
    base = load_run_configuration(options.configuration, options.overrides)
    arguments = base.training_arguments()
    output = options.output or Path(str(arguments.output_dir)) / "comparison"
    base = dataclasses.replace(base, training={**base.training, "output_dir": str(output), "report_to": "none"})
    poolings = options.poolings or list(POOLINGS)
    scopes = options.scopes or [base.model.params.get("context_scope", "conversation")]
    check_comparable(base, poolings, options.contexts, options.split, scopes)
    check_folder(output)
    changed = "; ".join(differences(output / "run_configuration.yaml", base))
    if changed and (output / "trainings").exists():  # else nothing was finished with them
        raise ValueError(f"{output} holds a comparison with other settings: {changed}; take another --output")
    base.save(output / "run_configuration.yaml")

    # 2. trainings; seeds outermost, so that a comparison that is stopped has all kinds
    cells = [
        Cell(pooling, context, arguments.seed + seed, fold, scope)
        for seed in range(options.seeds)
        for fold in options.folds or [None]
        for context in options.contexts
        for scope in (scopes if context != "none" else ["conversation"])  # without context there is no scope
        for pooling in poolings
    ]
    split = getattr(base.data, f"{options.split}_split")
    trainings = train_all(base, cells, split, output)

    # 3. comparison
    command = shlex.join(["mamba-ema", *sys.argv[1:]])
    page = write_comparison(output, trainings, split, options.split == "validation", command)
    print(f"{page}\nwritten to {output}")
    return 0
