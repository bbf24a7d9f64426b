"""The options by which commands name a model, and loading it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..inference import EmotionTracker


def number_between(low: float, high: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """The type of an option that is a number from `low` to `high`, both allowed; with `kind` int a whole one."""

    allowed = f"whole numbers from {low} to {high}" if kind is int else f"numbers from {low:g} to {high:g}"

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not allowed; {allowed} are")

    return number


def add_model_options(parser: argparse.ArgumentParser, device: bool = True, int8: bool = True) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub name of a Mamba-EMA model; its code is not run")
    parser.add_argument("--revision", default="main", help="commit, tag or branch of a model on the Hub")
    if device:
        parser.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda")
    if int8:
        parser.add_argument("--int8", action="store_true", help="the speech encoder in 8 bits: faster on a CPU")


def add_channel_option(parser: argparse.ArgumentParser, split: bool = True) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--channel",
        type=number_between(1, 256, int),
        metavar="N",
        help="of files with several, counted from 1; default: their average",
    )
    if split:
        chosen.add_argument(
            "--split-channels", action="store_true", help="each channel is a speaker of the conversation, as in calls"
        )


def quiet_transformers() -> None:
    """Let transformers print errors only, and no progress of loading and saving."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_tracker(options: argparse.Namespace) -> EmotionTracker:
    """The model that was named, as `EmotionTracker.from_pretrained` loads it; transformers prints nothing meanwhile."""
    from ..inference import EmotionTracker

    quiet_transformers()
    if "device" not in options:  # a command that runs the model on the CPU as it is
        return EmotionTracker.from_pretrained(options.model, options.revision)
    return EmotionTracker.from_pretrained(options.model, options.revision, options.device, options.int8)
