"""Valence, arousal and dominance from speech: use a model, prepare data, share what was trained."""

import argparse
import importlib
import io
import os
import sys
import warnings

from ._version import __version__
from .commands.terminal import complain

# Each name is a module of `commands` with HELP, add_arguments(parser) and run(options) -> exit code.
COMMANDS = {
    "use a model": ("adopt", "predict", "timeline", "score", "listen", "page", "serve"),
    "train and measure": ("prepare", "evaluate", "report", "compare", "metrics"),
    "share a model": ("merge", "export", "publish"),
}
DONE, FAILED, STOPPED = 0, 1, 130
EXIT_CODES = """exit codes:
  0 done; 1 something could not be used, named on standard error; 2 wrong usage;
  130 stopped by Ctrl-C: what was finished is kept"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command, see `mamba-ema --help`; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks a character is no reason to lose a row
            stream.reconfigure(errors="backslashreplace")
    # Before torch is loaded, whose OpenMP (GNU's, on Linux) would let threads that wait for one another spin for
    # milliseconds, in which on a busy machine the one they wait for does not get a core.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    options = command_parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about their own insides
        warnings.filterwarnings("default", module=r"modeling_mamba_ema\.(audio_files|inference)")
        warnings.showwarning = lambda message, *_, **__: complain(f"note: {message}")
        try:
            return options.run(options)
        except KeyboardInterrupt:
            complain("stopped")
            return STOPPED
        except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        except ModuleNotFoundError as error:
            complain(
                f"{error}; pip install 'modeling-mamba-ema[tools]' is for audio files and pictures, [train] for corpora"
            )
            return FAILED
        except (ValueError, TypeError, OSError, ImportError) as error:
            complain(str(error))
            return FAILED


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands; nothing but the standard library is imported for it."""
    shown = []
    parser = argparse.ArgumentParser(
        prog="mamba-ema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mamba-ema {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", help="one of these; each has a --help of its own"
    )
    for group, names in COMMANDS.items():
        shown.append(f"{group}:")
        for name in names:
            module = importlib.import_module(f".commands.{name}", __package__)
            command = commands.add_parser(
                name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
            )
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            shown.append(f"  {name:<10} {module.HELP}")
        shown.append("")
    parser.epilog = "\n".join([*shown, EXIT_CODES])
    return parser


if __name__ == "__main__":
    sys.exit(main())
