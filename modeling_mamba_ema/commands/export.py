"""Write a model for onnxruntime: an encoder, one step of a conversation, and a file that runs both without torch; or,
with --audonnx, one graph from an utterance's waveform to its values, and the YAML that audonnx loads it by.
"""

import argparse
from pathlib import Path

from .model_options import add_model_options, load_tracker
from .terminal import check_folder

HELP = "write a model for onnxruntime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, device=False, int8=False)
    parser.add_argument("output", type=Path, help="folder to write; files of an earlier export are replaced")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--audonnx", action="store_true", help="a folder for audonnx.load: utterances by themselves")
    form.add_argument("--int8", action="store_true", help="the speech encoder's products in 8 bits")


def run(options: argparse.Namespace) -> int:
    check_folder(options.output)
    import logging

    from ..inference.onnx_export import export_onnx
    from ..integrations.audonnx import export_audonnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # which warns of torchvision, that nothing here uses
    model = load_tracker(options).model
    if options.audonnx:
        paths = export_audonnx(model, options.output)
    else:
        paths = export_onnx(model, options.output, options.int8)
    for path in paths:
        print(path)
    return 0
