"""Emotion over a long recording, a row a segment: start, end, speaker, values from 0 to 1.

Segments come from a file (CSV or RTTM), from Silero VAD (--vad), or are windows of one length; with --split-channels
they are those of each channel. The state of the conversation is carried over all of them. At the end stands the call in
words. In files and with --json, valence_difference is the value minus the speaker's own slow average of baseline_turns
turns. Near silence is below -70 dBFS, where the values say nothing about a voice.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_options import add_channel_option, add_model_options, load_tracker
from .terminal import Table, check_output, complain

if TYPE_CHECKING:
    from ..inference import Segment, TurnEmotion

HELP = "emotion over a long recording, a row a segment"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recording", type=Path, help="audio file of up to 4 hours")
    add_model_options(parser)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--segments", type=Path, help="CSV with start,end[,speaker,channel] in seconds, or RTTM")
    chosen.add_argument("--vad", action="store_true", help="find speech with Silero VAD")
    chosen.add_argument("--window", type=float, default=10.0, help="else: windows of at most this many seconds (10)")
    add_channel_option(parser)
    parser.add_argument("--output", type=Path, help="write rows to this .csv, .json or .jsonl as they come")
    parser.add_argument("--plot", type=Path, help="draw the timeline to this .png or .svg")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")


def run(options: argparse.Namespace) -> int:
    for path in (options.output, options.plot):
        check_output(path, options.overwrite)
    if options.plot is not None and options.plot.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{options.plot.name} ends in {options.plot.suffix!r}; pictures are written as .png or .svg")
    if options.segments is not None and options.split_channels:
        raise ValueError("--split-channels is for --vad and windows; segments name their channels themselves")

    from contextlib import ExitStack

    from tqdm import tqdm

    from ..audio_files import Recording
    from ..inference import TimelineWriter, emotion_timeline, read_segments, timeline_columns
    from ..inference.reading import clock, summarise
    from ..inference.segments import channel_speaker
    from ..inference.voice_activity import detect_speech
    from ..publishing.model_card import describe_ends

    if options.plot is not None:  # before an hour is scored: matplotlib may not be installed
        from ..plots import plot_timeline

    rows: list[dict[str, Any]] = []
    heard: list[TurnEmotion] = []
    places: list[str] = []
    reached, stopped = 0.0, False
    with ExitStack() as stack:
        recording = stack.enter_context(Recording(options.recording, options.channel))
        segments: Iterator[Segment] | list[Segment] | float = options.window
        if options.segments is not None:
            segments = read_segments(options.segments, options.recording.stem)
        elif options.vad:
            segments = detect_speech(recording, options.split_channels)
        tracker = load_tracker(options)
        timeline = emotion_timeline(tracker, recording, segments, options.split_channels and not options.vad)
        writer = None
        if options.output is not None:
            writer = stack.enter_context(TimelineWriter(options.output, timeline_columns(tracker)))
        speakers = [segment.speaker or "" for segment in segments] if isinstance(segments, list) else []
        speakers += [channel_speaker(recording.channels)] if options.split_channels else []
        table = Table(options.json, {"speaker": max(map(len, speakers), default=0)})
        # The bar is on standard error, and only where that is a terminal.
        bar = stack.enter_context(tqdm(total=round(recording.seconds), unit="s", disable=None))
        try:
            for row in timeline:
                fields, reached = row.to_dict(), row.end
                if writer is not None:
                    writer.write(fields)
                if row.heard is not None:
                    heard.append(row.heard.without_attention())
                    places.append(clock(row.start))
                if options.plot is not None:
                    rows.append(fields)
                if writer is None or options.json:
                    with tqdm.external_write_mode():
                        table.print(fields)
                bar.update(round(reached) - bar.n)
        except KeyboardInterrupt:
            stopped = True
    if rows:
        plot_timeline(rows, tracker.labels, title=recording.name).savefig(options.plot, dpi=120)
    if not tracker.num_turns and not stopped:
        complain(f"no speech was found in {recording.name}")
    if not options.json:
        if heard:
            print(summarise(heard, places))
            print(describe_ends(tracker.labels))
        scored = f"{tracker.num_turns} scored segment{'s' * (tracker.num_turns != 1)}"
        for path in filter(None, (options.output, options.plot if rows else None)):
            print(f"{path}: {scored}, to {reached:.1f} of {recording.seconds:.1f} s")
    if stopped:
        complain(f"stopped at {reached:.1f} of {recording.seconds:.1f} s; what was finished is kept")
        return 130
    return 0
