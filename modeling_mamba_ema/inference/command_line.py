"""The command `mamba-ema`.

Exit codes: 0 done; 1 something could not be used, said on standard error in one line each; 2 wrong usage; 130 stopped
by Ctrl-C, where what was finished is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

DONE, FAILED, STOPPED = 0, 1, 130


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return options.run(options)
    except KeyboardInterrupt:
        _complain("stopped")
        return STOPPED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (ValueError, TypeError, OSError, ImportError) as error:
        _complain(str(error))
        return FAILED


def _parser() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", required=True, help="folder or Hub name of a Mamba-EMA model; its code is not run")
    model.add_argument("--revision", default="main", help="commit, tag or branch of a model on the Hub")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    output.add_argument("--downmix", action="store_true", help="average the channels of stereo files")

    parser = argparse.ArgumentParser(
        prog="mamba-ema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", parents=[model, device, output], help="emotion of audio files")
    predict.add_argument("files", nargs="*", type=Path, help="audio files of up to 30 s")
    predict.add_argument("--conversation", action="store_true", help="the files are one conversation's turns, in order")
    predict.add_argument("--sample", action="store_true", help="the conversation that ships with the package")
    predict.set_defaults(run=_predict)

    timeline = commands.add_parser("timeline", parents=[model, device, output], help="emotion over a long recording")
    timeline.add_argument("recording", type=Path)
    chosen = timeline.add_mutually_exclusive_group()
    chosen.add_argument("--segments", type=Path, help="CSV with start,end[,speaker] in seconds, or RTTM")
    chosen.add_argument("--vad", action="store_true", help="find speech with Silero VAD")
    chosen.add_argument("--window", type=float, default=10.0, help="else: windows of this many seconds (10)")
    timeline.add_argument("--output", type=Path, help="write rows to this .csv, .json or .jsonl as they come")
    timeline.add_argument("--plot", type=Path, help="draw the timeline to this .png or .svg")
    timeline.set_defaults(run=_timeline)

    demo = commands.add_parser("demo", parents=[model], help="a page in the browser, on this machine only")
    demo.add_argument("--port", type=int, help="port of the page")
    demo.set_defaults(run=_demo)

    export = commands.add_parser("export-onnx", parents=[model], help="write the model for onnxruntime")
    export.add_argument("output", type=Path, help="folder to write")
    export.set_defaults(run=_export_onnx)
    return parser


def _predict(options: argparse.Namespace) -> int:
    from ..data.audio import load_audio
    from .tracker import EmotionTracker

    if options.sample == bool(options.files):
        raise ValueError("give either audio files or --sample")
    turns = [(path, None) for path in options.files]
    if options.sample:
        from ..sample import load_sample_conversation

        turns = [(Path(turn["file_name"]), turn["speaker"]) for turn in load_sample_conversation()]
    tracker = EmotionTracker.from_pretrained(options.model, options.revision, options.device)
    code = DONE
    table = _Table(options.json, {"file": 28, "speaker": 10, "seconds": 8}, tracker.labels)
    for path, speaker in turns:
        if not (options.conversation or options.sample):
            tracker.reset()
        try:
            heard = tracker.update(load_audio(path, downmix=options.downmix), speaker=speaker)
        except ValueError as error:  # the others can be answered for all the same
            _complain(str(error) if str(error).startswith(path.name) else f"{path.name}: {error}")
            code = FAILED
            continue
        values = {**heard.values, **{f"{label}_value": value for label, value in heard.label_values.items()}}
        row = {"file": str(path) if options.json else path.name, "speaker": speaker, "seconds": round(heard.seconds, 3)}
        table.print({**row, **values, "low_level": heard.low_level})
    return code


def _timeline(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from tqdm import tqdm

    from .recording import Recording
    from .segments import Segment, read_segments
    from .timeline import TimelineWriter, emotion_timeline
    from .tracker import EmotionTracker
    from .voice_activity import detect_speech

    if options.plot is not None and options.plot.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{options.plot.name} ends in {options.plot.suffix!r}; pictures are written as .png or .svg")
    with ExitStack() as stack:
        recording = stack.enter_context(Recording(options.recording, options.downmix))
        segments: Iterator[Segment] | list[Segment] | float = options.window
        if options.segments is not None:
            segments = read_segments(options.segments, options.recording.stem)
        elif options.vad:
            segments = detect_speech(recording)
        tracker = EmotionTracker.from_pretrained(options.model, options.revision, options.device)
        rows = emotion_timeline(tracker, recording, segments)
        writer = None
        if options.output is not None:
            writer = stack.enter_context(TimelineWriter(options.output, tracker.labels))
        table = _Table(options.json, {"start": 9, "end": 9, "speaker": 10}, tracker.labels)
        drawn: list[dict[str, Any]] = []
        # The bar is on standard error, and only where that is a terminal.
        bar = stack.enter_context(tqdm(total=round(recording.seconds), unit="s", disable=None))
        stopped = False
        try:
            for row in rows:
                fields = row.to_dict()
                if writer is not None:
                    writer.write(row)
                if options.plot is not None:
                    drawn.append(fields)
                if writer is None or options.json:
                    with tqdm.external_write_mode():
                        table.print(fields)
                bar.update(round(row.end) - bar.n)
        except KeyboardInterrupt:
            stopped = True
        if not tracker.num_turns and not stopped:
            _complain(f"no speech was found in {recording.name}")
        if options.plot is not None and drawn:
            from ..plots import plot_timeline

            plot_timeline(drawn, tracker.labels, title=recording.name).savefig(options.plot, dpi=120)
    if stopped:
        _complain(f"stopped at {bar.n} s; what was finished is kept")
        return STOPPED
    return DONE


def _demo(options: argparse.Namespace) -> int:
    from ..demo import launch  # type: ignore[import-not-found, unused-ignore]

    launch(options.model, revision=options.revision, server_port=options.port)
    return DONE


def _export_onnx(options: argparse.Namespace) -> int:
    from .onnx_export import export_onnx
    from .tracker import EmotionTracker

    for path in export_onnx(EmotionTracker.from_pretrained(options.model, options.revision).model, options.output):
        print(path)
    return DONE


class _Table:
    """Prints rows: for people as a table, whose header comes with the first row; for programs as JSON lines."""

    def __init__(self, as_json: bool, widths: dict[str, int], labels: list[str]):
        self._as_json = as_json
        self._widths = {**widths, **{label: max(9, len(label)) for label in labels}, "low_level": 9}
        self._begun = False

    def print(self, row: dict[str, Any]) -> None:
        if self._as_json:
            print(json.dumps(row), flush=True)
            return
        if not self._begun:
            print("  ".join(name.replace("_", " ").rjust(width) for name, width in self._widths.items()))
            self._begun = True
        print("  ".join(_cell(row[name]).rjust(width)[:width] for name, width in self._widths.items()), flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _complain(message: str) -> None:
    print(f"mamba-ema: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
