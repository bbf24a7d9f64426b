"""From MSP-Improv's folder as delivered to the normal form that training reads.

    python examples/prepare_msp_improv.py MSP-IMPROV --output data/msp_improv [--fold 2]
    accelerate launch examples/run_finetune.py configuration/finetune.yaml data.source=data/msp_improv

Audio is not copied: the table names the files where they are. It has a column of splits for each of the six folds;
`data.columns.split=split_fold3` trains the third without preparing anew.
"""

import argparse
import sys
from pathlib import Path

from modeling_mamba_ema.data.corpora import CorpusError, describe_corpus, read_msp_improv, write_corpus
from modeling_mamba_ema.data.corpora.msp_improv import SESSIONS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with Evaluation.txt and session1 to session6")
    parser.add_argument("--output", type=Path, required=True, help="folder for metadata.jsonl and corpus.json")
    parser.add_argument(
        "--fold", type=int, choices=SESSIONS, default=1, help="session to test on (default %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        corpus = read_msp_improv(arguments.corpus, arguments.fold)
        write_corpus(corpus, arguments.output)
    except CorpusError as error:
        print(f"prepare_msp_improv: {error}", file=sys.stderr)
        return 1
    print(describe_corpus(corpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
