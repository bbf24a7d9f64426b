"""Convert a trained model that others have published into a model of this package, with the same numbers.

  mamba-ema adopt 3loi/SER-Odyssey-Baseline-WavLM-Multi-Attributes models/odyssey

Known are 3loi/SER-Odyssey-Baseline-WavLM-Multi-Attributes, -Arousal, -Dominance and -Valence, and
audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim and its sibling with 24 layers. Every weight of the file must be
used and every weight of the model filled, or nothing is written. A pickle with anything but tensors is not opened.

  mamba-ema adopt WavLM-Large.pt models/wavlm-large

Microsoft's own file of a WavLM becomes a folder to start training from: model.pretrained_speech_encoder.
"""

import argparse
from pathlib import Path

from .model_options import quiet_transformers

HELP = "convert a model that others have published"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="Hub name of the published model, a folder with its files, or Microsoft's .pt of a WavLM"
    )
    parser.add_argument("output", type=Path, help="folder to write; must be empty or not exist")
    parser.add_argument("--revision", default="main", help="commit, tag or branch on the Hub")
    parser.add_argument(
        "--published-as", metavar="NAME", help="Hub name of the model in a folder: its licence goes into the card"
    )
    parser.add_argument(
        "--encoder-config",
        metavar="WHERE",
        help="folder, config.json or Hub name with the speech encoder's configuration; needed for other encoders than "
        "microsoft/wavlm-large where the model's config.json only names the encoder",
    )


def run(options: argparse.Namespace) -> int:
    from ..adoption import adopt, convert_wavlm

    quiet_transformers()
    if options.source.endswith(".pt"):
        convert_wavlm(options.source, options.output)
        print(f"saved in:   {options.output} (training: model.pretrained_speech_encoder={options.output})")
        return 0
    adopted = adopt(
        options.source, options.output, options.revision, options.encoder_config, published_as=options.published_as
    )
    config, publication = adopted.model.config, adopted.publication
    ranges = {label: config.label_range(label) for label in config.labels}
    zeros = f" ({', '.join(adopted.zeros)} with 0, as in the published equations)" if adopted.zeros else ""
    facts = {
        "licence": "not known: ask its publisher" if publication is None else publication.license,
        "trained on": "not known" if publication is None else publication.corpus,
        "cite": "not known" if publication is None else publication.citation,
        "predicts": ", ".join(f"{name} ({low:g} to {high:g})" for name, (low, high) in ranges.items()),
        "weights": f"all {adopted.weights_read} of the file used, all {adopted.weights_filled} filled{zeros}",
        "saved in": options.output,
    }
    for title, fact in facts.items():
        print(f"{title + ':':<12}{fact}")
    return 0
