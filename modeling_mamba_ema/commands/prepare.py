"""Make a corpus ready for training: metadata.jsonl in the normal form, its scale in corpus.json.

Audio of a published corpus is not copied: the table names the files where they are. A corpus with folds gets a column
of splits for each of them; data.columns.split=split_fold3 trains the third without preparing again.
"""

import argparse
from pathlib import Path

from ..data.corpora import RATED_ELSEWHERE, corpus_names
from .model_options import number_between
from .terminal import check_folder

HELP = "make a corpus ready for training"
SYNTHETIC = "synthetic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    corpora = parser.add_subparsers(required=True, dest="corpus", metavar="CORPUS", help="one of:")
    for name in corpus_names():
        published = corpora.add_parser(name, help=f"the folder of {name} as delivered")
        published.add_argument("folder", type=Path, help="as delivered")
        if name in RATED_ELSEWHERE:
            published.add_argument("ratings", type=Path, metavar="RATINGS.csv", help="as the study of it delivers them")
        published.add_argument("--output", type=Path, required=True, help="folder to write")
        published.add_argument("--fold", type=int, default=1, help="to test on, where the corpus has several (1)")
    synthetic = corpora.add_parser(SYNTHETIC, help="spoken conversations from a synthesiser, for demos and tests")
    synthetic.add_argument("--output", type=Path, required=True, help="folder to write")
    count, seed = number_between(3, 1_000_000, int), number_between(0, 2**32 - 1, int)
    synthetic.add_argument("--conversations", type=count, default=220, help="how many (%(default)s)")
    synthetic.add_argument("--seed", type=seed, default=0, help="of everything that is drawn (%(default)s)")
    synthetic.add_argument(
        "--coupling",
        type=number_between(0, 1),
        default=1.0,
        help="0: each speaker drifts alone; 1: both as one (%(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    check_folder(options.output)
    if options.corpus == SYNTHETIC:
        from ..data.synthetic_corpus import write_synthetic_corpus

        made = write_synthetic_corpus(options.output, options.conversations, options.seed, options.coupling)
        print(f"SYNTHETIC corpus in {options.output}\n{made}")
        return 0
    from ..data.corpora import read_corpus
    from ..data.prepared_corpus import describe_corpus, write_corpus

    corpus = read_corpus(options.corpus, options.folder, options.fold, getattr(options, "ratings", None))
    write_corpus(corpus, options.output)
    print(describe_corpus(corpus))
    return 0
