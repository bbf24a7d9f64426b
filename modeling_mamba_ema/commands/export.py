"""Write a model for onnxruntime: an encoder, one step of a conversation, and a file that runs both without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from .model_options import add_model_options, load_tracker

HELP = "write a model for onnxruntime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, device=False)
    parser.add_argument("output", type=Path, help="folder to write; files of an earlier export are replaced")


def run(options: argparse.Namespace) -> int:
    from ..inference.onnx_export import export_onnx

    for path in export_onnx(load_tracker(options).model, options.output):
        print(path)
    return 0
