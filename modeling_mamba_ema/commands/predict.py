"""Emotion of utterances, values from 0 to 1: of audio files, or of the turns of a corpus beside its labels.

A label whose own scale is another has a second column, such as valence_value, and that of the corpus is on the same
scale: valence_value_label, else valence_label. A model with intervals gives valence_low and valence_high, and with
--json valence_confidence: how surely the value is on its side of 0.5, the middle. One that predicts how far raters
would differ gives valence_spread, a standard deviation. With --json, valence_difference is the value minus the
speaker's own slow average of baseline_turns turns. Near silence is below -70 dBFS, where the values say nothing about
a voice.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_options import add_channel_option, add_model_options, load_tracker, number_between
from .terminal import Table, check_output, complain

if TYPE_CHECKING:
    from ..inference import EmotionTracker, TurnEmotion

HELP = "emotion of audio files, or of the turns of a corpus"
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass
class Turn:
    """An utterance to predict; of a corpus with its place in its conversation, and its labels on the unit scale."""

    file_name: str
    speaker: str | None = None
    start: float | None = None
    end: float | None = None
    conversation: str | None = None
    number: int | None = None
    channel: int | None = None
    labels: dict[str, float | None] = field(default_factory=dict)
    salient: tuple[float, float] | None = None  # the stretch that carries the emotion, of a synthetic corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument(
        "sources",
        nargs="*",
        default=[],
        type=Path,
        metavar="FILE",
        help="audio files of up to 30 s, or one corpus; - reads its table from standard input",
    )
    chosen.add_argument("--sample", action="store_true", help="the conversation that ships with the package")
    add_model_options(parser)
    parser.add_argument("--conversation", action="store_true", help="the files are one conversation's turns, in order")
    add_channel_option(parser)
    parser.add_argument(
        "--min-confidence",
        type=number_between(0, 1),
        metavar="0..1",
        help="leave out values whose side of the middle is less certain",
    )
    parser.add_argument(
        "--max-width", type=number_between(0, 1), metavar="0..1", help="leave out values with a wider interval"
    )
    parser.add_argument("--split", help="of a corpus: only this split")
    parser.add_argument("--conversation-id", metavar="ID", help="of a corpus: only this conversation")
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw the conversation: trajectory.png, attention.png"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")


def run(options: argparse.Namespace) -> int:
    pictures = [] if options.plots is None else [options.plots / "trajectory.png", options.plots / "attention.png"]
    for path in pictures:
        check_output(path, options.overwrite)
    of_corpus = len(options.sources) == 1 and (
        options.sources[0].is_dir() or options.sources[0].suffix in TABLES or str(options.sources[0]) == "-"
    )
    if not of_corpus and (options.split or options.conversation_id):
        raise ValueError("--split and --conversation-id choose from a corpus; give its folder or its table")
    if of_corpus and options.split_channels:
        raise ValueError("--split-channels is for audio files; a corpus names the channel of each turn in a column")

    from ..audio_files import AudioFileError, load_audio
    from ..feature_extraction_mamba_ema import SAMPLING_RATE
    from ..inference.reading import summarise
    from ..publishing.model_card import describe_ends

    tracker = load_tracker(options)
    if (options.min_confidence, options.max_width) != (None, None) and tracker.model.config.interval_radii is None:
        raise ValueError(
            f"{options.model} has no intervals, which --min-confidence and --max-width need; run_finetune.py measures "
            "them where the validation split has enough conversations (see docs/confidence.md)"
        )
    conversations = _of_corpus(options, tracker) if of_corpus else _of_files(options, tracker.labels)
    if pictures and len(conversations) > 1:
        raise ValueError(
            "--plots draws one conversation: give --conversation for files, --conversation-id for a corpus"
        )
    table = Table(options.json, _widths(list(itertools.chain(*conversations))))
    longest, code = tracker.feature_extractor.max_seconds, 0
    drawn: list[tuple[Turn, TurnEmotion]] = []
    said: list[TurnEmotion] = []
    for conversation in conversations:
        tracker.reset()
        for turn in conversation:
            try:
                channel = options.channel if turn.channel is None else turn.channel
                waveform = load_audio(turn.file_name, turn.start, turn.end, channel, longest)
            except AudioFileError as error:  # the others can be answered for all the same
                complain(str(error))
                code = 1
                continue
            heard = tracker.update(waveform, SAMPLING_RATE, turn.speaker)
            shown = heard.only([label for label in tracker.labels if _is_sure(heard, label, options)])
            table.print(_row(turn, heard, tracker.row(shown), tracker, options))
            said.append(shown.without_attention())
            if pictures:
                drawn.append((turn, heard))
    if not options.json:
        if len(conversations) == 1 and len(said) > 1:
            print(summarise(said, [f"turn {heard.turn}" for heard in said]))
        if said:
            print(describe_ends(tracker.labels))
    if drawn:
        _draw(drawn, pictures[0], pictures[1], options.channel)
        if not options.json:
            print(f"pictures: {', '.join(map(str, pictures))}")
    return code


def _of_files(options: argparse.Namespace, labels: list[str]) -> list[list[Turn]]:
    """Audio files, each a conversation of its own unless they are one; or the sample beside its labels."""
    if options.sample:
        from ..sample import load_sample_conversation

        turns = load_sample_conversation()
        return [
            [
                Turn(turn["file_name"], turn["speaker"], labels={name: turn[name] for name in labels if name in turn})
                for turn in turns
            ]
        ]
    files = [_channels(path) if options.split_channels else [Turn(str(path))] for path in options.sources]
    return [list(itertools.chain(*files))] if options.conversation else files


def _channels(path: Path) -> list[Turn]:
    """A turn of each channel; one of all where the file cannot be used, which is said when it is read."""
    from ..audio_files import AudioFileError, Recording
    from ..inference.segments import channel_speaker

    try:
        with Recording(path) as recording:
            channels = recording.several_channels()
    except AudioFileError:
        return [Turn(str(path))]
    return [Turn(str(path), channel_speaker(channel), channel=channel) for channel in channels]


def _of_corpus(options: argparse.Namespace, tracker: EmotionTracker) -> list[list[Turn]]:
    """The conversations of a corpus that were chosen, turns in order."""
    from ..data.dataset import load_emotion_dataset
    from ..data.normal_form import LabelError

    source, config = options.sources[0], tracker.model.config
    scales = {label: config.label_range(label) for label in tracker.labels}
    labels = tracker.labels
    try:
        splits = load_emotion_dataset(source, labels, scales, labels_optional=True)
    except LabelError as error:  # predictions can be made all the same
        complain(f"note: the labels of the corpus are left out: {error}")
        labels, splits = [], load_emotion_dataset(source, ())
    if options.split is not None and options.split not in splits:
        raise ValueError(f"{source} has no split {options.split}; there are {', '.join(splits)}")
    chosen = splits.values() if options.split is None else [splits[options.split]]
    conversations = []
    for split in chosen:
        known = [label for label in labels if any(value >= 0 for value in split[label][:])]
        turns = [_turn(row, known) for row in split.to_list()]
        conversations += [list(group) for _, group in itertools.groupby(turns, key=lambda turn: turn.conversation)]
    if options.conversation_id is None:
        return conversations
    found = [turns for turns in conversations if turns[0].conversation == options.conversation_id]
    if not found:
        names = ", ".join(str(turns[0].conversation) for turns in conversations[:5])
        raise ValueError(f"{source} has no conversation {options.conversation_id}; there are {names} ...")
    return found


def _turn(row: dict[str, Any], labels: list[str]) -> Turn:
    from ..data.text_files import seconds_of

    given = {label: row[label] if row[label] >= 0 else None for label in labels}
    start, end = seconds_of(row.get("salient_start")), seconds_of(row.get("salient_end"))
    return Turn(
        row["file_name"],
        row.get("speaker"),
        row.get("start"),
        row.get("end"),
        str(row["conversation_id"]),
        row["turn"],
        row.get("channel"),
        given,
        None if start is None or end is None else (start, end),
    )


def _widths(turns: list[Turn]) -> dict[str, int]:
    texts: dict[str, list[str | None]] = {
        "conversation": [turn.conversation for turn in turns],
        "file": [Path(turn.file_name).name for turn in turns],
        "speaker": [turn.speaker for turn in turns],
    }
    return {name: max(len(text or "") for text in column) for name, column in texts.items()}


def _row(
    turn: Turn, heard: TurnEmotion, row: dict[str, Any], tracker: EmotionTracker, options: argparse.Namespace
) -> dict[str, Any]:
    """A turn as it is printed; `row` has what is shown of it, and labels of the corpus come on the scale of the values
    beside them."""
    place = {} if turn.conversation is None else {"conversation": turn.conversation, "turn": turn.number}
    labels: dict[str, float | None] = {}
    for label, value in turn.labels.items():
        low, high = tracker.model.config.label_range(label)
        name = f"{label}_value_label" if label in tracker.labels_with_own_scale else f"{label}_label"
        labels[name] = None if value is None else round(low + (high - low) * value, 4)
    if heard.confidence is not None:  # also of what is left out, to say why
        row |= {f"{label}_confidence": value for label, value in heard.confidence.items()}
    return {
        **place,
        "file": turn.file_name if options.json else Path(turn.file_name).name,
        "speaker": turn.speaker,
        "seconds": round(heard.seconds, 3),
        **row,
        **labels,
    }


def _is_sure(heard: TurnEmotion, label: str, options: argparse.Namespace) -> bool:
    """Whether a value is one of those that were asked for."""
    if heard.confidence is None or heard.intervals is None:
        return True
    if options.min_confidence is not None and heard.confidence[label] < options.min_confidence:
        return False
    low, high = heard.intervals[label]
    return options.max_width is None or high - low <= options.max_width


def _draw(drawn: list[tuple[Turn, TurnEmotion]], trajectory: Path, attention: Path, channel: int | None) -> None:
    """The path over the turns, and the attention of one: of a turn whose emotional stretch is known if there is one,
    of those the one farthest from mean pooling, by its largest weight over the mean weight."""
    from ..audio_files import load_audio
    from ..plots import plot_attention, plot_trajectory

    trajectory.parent.mkdir(parents=True, exist_ok=True)
    turns = [turn for turn, _ in drawn]
    known = [heard.intervals for _, heard in drawn if heard.intervals is not None]
    intervals = {label: [ends[label] for ends in known] for label in (known[0] if known else ())}
    plot_trajectory(
        {label: [heard.values[label] for _, heard in drawn] for label in drawn[0][1].values},
        speakers=[turn.speaker or "speaker" for turn in turns],
        references={
            label: [float("nan") if turn.labels[label] is None else turn.labels[label] for turn in turns]
            for label in turns[0].labels
        },
        title="Emotion over the conversation",
        intervals=intervals,
    ).savefig(trajectory, dpi=90)
    sharpness = [(turn.salient is not None, heard.attention.max() * heard.attention.shape[-1]) for turn, heard in drawn]
    turn, heard = drawn[max(range(len(drawn)), key=lambda number: sharpness[number])]
    waveform = load_audio(turn.file_name, turn.start, turn.end, channel if turn.channel is None else turn.channel)
    title = f"Where the model listened: {Path(turn.file_name).name}"
    plot_attention(waveform, heard.attention, salient=turn.salient, title=title).savefig(attention, dpi=90)
