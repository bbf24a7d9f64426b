"""How a model behaves on a corpus: for groups of turns, in worse recordings, and on what is no speech.

    mamba-ema report --model outputs/demo/model data/demo --by speaker --output outputs/demo/report

Writes report.html, report.md and report.json: CCC, bias and spread of each group of a column, the gap between groups
with a permutation test; what noise, telephone, MP3, rooms, clipping, speed and silence change; what silence, noise,
tones and music get; and whether labels and errors go with noise, level, length or speaker of a recording. Predictions
of each condition are kept: started again, the command goes on with those that are missing. With --card the tables of
groups and worse recordings also stand in the model's card, in the place of those of an earlier report.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_options import add_model_options, load_tracker
from .terminal import check_folder

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ..behaviour.conditions import Change
    from ..inference import EmotionTracker

HELP = "how a model behaves: by group, on worse recordings, on what is no speech"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("source", help="a corpus: folder with metadata.jsonl/.csv/.parquet, or such a file")
    parser.add_argument("--by", nargs="+", default=[], metavar="COLUMN", help="columns of the corpus that make groups")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--card", action="store_true", help="put groups and worse recordings into the model's README.md"
    )


def run(options: argparse.Namespace) -> int:
    check_folder(options.output)
    import shlex
    import sys

    import numpy as np

    from .. import behaviour
    from ..audio_files import load_audio
    from ..data.utterances import utterances_of
    from ..feature_extraction_mamba_ema import SAMPLING_RATE
    from ..training import DataSection, check_labels_vary, load_splits

    if options.card and not Path(options.model, "README.md").is_file():
        raise ValueError(
            f"--card: {options.model} is no folder with a README.md; `mamba-ema publish --dry-run` makes one"
        )

    # 1. corpus and model
    tracker = load_tracker(options)
    labels = tracker.labels
    data = DataSection(source=options.source, max_seconds=tracker.feature_extractor.max_seconds)
    rows = load_splits(data, tracker.model.config, options.output, wanted=[options.split])[options.split]
    check_labels_vary(options.split, rows, labels)
    turns = rows.to_pandas()
    known = list(dict.fromkeys([*turns.columns, *behaviour.RECORDING]))
    unknown = [column for column in options.by if column not in known]
    if unknown:
        raise ValueError(f"--by names {', '.join(unknown)}, which {options.source} lacks; there are {', '.join(known)}")
    waveforms = [load_audio(u.file_name, u.start, u.end, u.channel) for u in utterances_of(rows)]
    turns = turns.assign(
        **{name: [behaviour.recording_facts(waveform)[name] for waveform in waveforms] for name in behaviour.RECORDING}
    )
    references = turns[labels].to_numpy(np.float64)

    # 2. predictions, clean and under every condition
    digest, clean, changes = _digest(tracker, waveforms), np.empty(0), {}
    for number, (name, change) in enumerate({"clean": None, **behaviour.CONDITIONS}.items()):
        stem = "".join(letter if letter.isalnum() else "_" for letter in name)
        path = options.output / "predictions" / f"{stem}-{digest}.npy"
        predicted = np.load(path) if path.exists() else _predict(path, tracker, waveforms, turns, change)
        if change is None:
            clean = predicted
        else:
            changes[name] = behaviour.measure_changes(predicted, clean, references, turns, labels)
        print(f"{number} of {len(behaviour.CONDITIONS)}: {name}", file=sys.stderr, flush=True)
    no_speech = {}
    for name, sound in behaviour.NO_SPEECH.items():
        tracker.reset()
        no_speech[name] = tracker.update(sound.astype(np.float32), SAMPLING_RATE).values

    # 3. figures, and the page
    content: dict[str, Any] = {
        "title": f"Behaviour of {Path(options.model).name} on {Path(options.source).name}, {options.split}",
        "command": shlex.join(["mamba-ema", *sys.argv[1:]]),
        "labels": labels,
        "overall": behaviour.measure(clean, references, turns, labels),
        "groups": {column: behaviour.measure_groups(clean, references, column, turns, labels) for column in options.by},
        "changes": changes,
        "no_speech": no_speech,
        "correlations": behaviour.correlations(clean, references, turns, labels),
    }
    print(behaviour.write_report(options.output, content))
    if options.card:
        behaviour.add_to_card(Path(options.model), content)
    return 0


def _digest(tracker: EmotionTracker, waveforms: list[np.ndarray]) -> str:
    """Of the model's weights and the audio: predictions of others are not taken up."""
    import hashlib

    from ..publishing.checksums import weights_sha256

    digest = hashlib.sha256(weights_sha256(tracker.model.state_dict().items()).encode())
    for waveform in waveforms:
        digest.update(waveform.tobytes())
    return digest.hexdigest()[:16]


def _predict(
    path: Path, tracker: EmotionTracker, waveforms: list[np.ndarray], turns: pd.DataFrame, change: Change | None
) -> np.ndarray:
    """(turns, labels), kept in the file."""
    import io

    import numpy as np

    from ..data.atomic_write import atomic_write
    from ..feature_extraction_mamba_ema import SAMPLING_RATE

    predicted, previous = [], None
    speakers = turns["speaker"] if "speaker" in turns else [None] * len(turns)
    for number, (conversation, speaker) in enumerate(zip(turns["conversation_id"], speakers)):
        if conversation != previous:
            tracker.reset()
        previous, waveform = conversation, waveforms[number]
        if change is not None:
            changed = change(waveform.astype(np.float64), np.random.default_rng(number))
            waveform = np.clip(changed, -1, 1).astype(np.float32)
        predicted.append(list(tracker.update(waveform, SAMPLING_RATE, speaker).values.values()))
    content = io.BytesIO()
    np.save(content, np.array(predicted))
    atomic_write(path, content.getvalue())
    return np.array(predicted)
