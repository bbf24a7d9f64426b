"""From MSP-Podcast's folder as delivered to the normal form that training reads.

    python examples/prepare_msp_podcast.py MSP-PODCAST --output data/msp_podcast
    accelerate launch examples/run_finetune.py configuration/finetune.yaml data.source=data/msp_podcast \\
        data.test_split=test1 model.params.context=none

Audio is not copied: the table names the files where they are. Its makers say that the corpus is not meant for
contextual study, so every turn is a conversation of its own.
"""

import argparse
import sys
from pathlib import Path

from modeling_mamba_ema.data.corpora import CorpusError, describe_corpus, read_msp_podcast, write_corpus


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with Labels and Audios")
    parser.add_argument("--output", type=Path, required=True, help="folder for metadata.jsonl and corpus.json")
    arguments = parser.parse_args()
    try:
        corpus = read_msp_podcast(arguments.corpus)
        write_corpus(corpus, arguments.output)
    except CorpusError as error:
        print(f"prepare_msp_podcast: {error}", file=sys.stderr)
        return 1
    print(describe_corpus(corpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
