"""Serve a page in the browser over a model, on this machine only, until it is stopped by Ctrl-C."""

import argparse

from .model_options import add_model_options, load_tracker, number_between

HELP = "a page in the browser, on this machine only"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--port", type=number_between(0, 65_535, int), help="default: the first free one from 7860")


def run(options: argparse.Namespace) -> int:
    from ..page import launch

    page, url = launch(load_tracker(options), server_port=options.port, quiet=True, prevent_thread_lock=True)
    print(f"on this machine only, until Ctrl-C: {url}", flush=True)
    page.block_thread()
    return 0
