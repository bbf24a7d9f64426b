"""What all corpora go through on their way to the normal form: audio checked, labels on their scale, folds, files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..audio_files import AudioFileError, Recording
from ..feature_extraction_mamba_ema import DEFAULT_MAX_SECONDS, SAMPLING_RATE
from .atomic_write import atomic_write
from .categories import CorpusError
from .sources import CORPUS_FILE

LABELS = ("valence", "arousal", "dominance")
SPLITS = ("train", "validation", "test", "test1", "test2", "test3")
METADATA_FILE = "metadata.jsonl"
SKIPPED_FILE = "skipped.jsonl"
# Rounding puts a mean of ratings a little off its scale; a whole point off, the column was misread.
_CLIPPED = 1.0
_ENUMERATED = 20  # names in a message


@dataclass
class Corpus:
    """A corpus on its way to the normal form.

    Attributes:
        name: as people cite it.
        scale: (low, high) of all its labels.
        rows: one an utterance: `file_name` (absolute), `conversation_id`, `turn`, `speaker` (None: unknown), those of
            `LABELS` that the corpus has (NaN: none), `split`, and what else is known.
        skipped: (name, reason) of what is in the corpus but not in `rows`.
        remarks: sentences for whoever uses the corpus.
    """

    name: str
    scale: tuple[float, float]
    rows: pd.DataFrame
    skipped: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return [label for label in LABELS if label in self.rows.columns]


def write_corpus(corpus: Corpus, output: Path) -> None:
    """Check what a reader found, and write it: `metadata.jsonl`, `corpus.json`, `skipped.jsonl`.

    Audio stays where it is; rows get `start`, `end` (seconds in their file: all of it) from its headers. Utterances
    without any label are skipped.

    Raises:
        CorpusError: nothing to write, files that are missing or damaged, labels off their scale, a turn that is there
            twice. Nothing is written then.
    """
    check_holds_no_other(output, corpus.name)
    rows = corpus.rows
    unrated = rows[corpus.labels].isna().all(axis=1)
    corpus.skipped += [(Path(name).name, "it has no label") for name in rows["file_name"][unrated]]
    rows = rows[~unrated].reset_index(drop=True)
    if rows.empty:
        raise CorpusError(f"{corpus.name} has no labelled utterance here")
    doubled = rows.duplicated(["conversation_id", "turn"])
    if doubled.any():
        raise CorpusError(enumerated(f"{corpus.name} has utterances twice", rows["file_name"][doubled]))
    rows = _with_times(corpus, rows)
    for label in corpus.labels:
        rows[label] = _clipped(corpus, rows, label)
    first = ["file_name", "start", "end", "conversation_id", "turn", "speaker", "split", *corpus.labels]
    corpus.rows = rows[[*first, *(column for column in rows.columns if column not in first)]]

    facts = {
        "name": corpus.name,
        "label_ranges": {label: list(corpus.scale) for label in corpus.labels},
        "remarks": corpus.remarks,
    }
    records = corpus.rows.astype(object).where(corpus.rows.notna(), None).to_dict("records")
    files = {
        SKIPPED_FILE: "".join(_line({"name": name, "reason": why}) for name, why in corpus.skipped),
        CORPUS_FILE: json.dumps(facts, indent=2, ensure_ascii=False) + "\n",
        METADATA_FILE: "".join(map(_line, records)),
    }
    for name, text in files.items():
        atomic_write(output / name, text)


def check_holds_no_other(output: Path, name: str) -> None:
    """Refuse a folder that holds another corpus, whose table would be replaced.

    Args:
        output: folder to write.
        name: of the corpus, as its `corpus.json` has it.

    Raises:
        CorpusError: there is a table, and no `corpus.json` of this name beside it.
    """
    facts = output / CORPUS_FILE
    if (output / METADATA_FILE).exists() and not (facts.is_file() and json.dumps(name) in facts.read_text("utf-8")):
        raise CorpusError(f"{output} holds a {METADATA_FILE} of another corpus; name another folder")


def describe_corpus(corpus: Corpus) -> str:
    """A table over the splits (turns, hours, longest turn, speakers, conversations, label means), and the remarks."""
    header = f"{'split':<12}{'turns':>8}{'hours':>8}{'longest':>9}{'speakers':>10}{'conversations':>15}"
    lines = [f"{corpus.name}, labels from {corpus.scale[0]:g} to {corpus.scale[1]:g}"]
    lines.append(header + "".join(f"{f'mean {label}':>16}" for label in corpus.labels))
    groups = {split: corpus.rows[corpus.rows["split"] == split] for split in SPLITS}
    for split, rows in {**groups, "all": corpus.rows}.items():
        if rows.empty:
            continue
        seconds = rows["end"] - rows["start"]
        counts = f"{len(rows):>8}{seconds.sum() / 3600:>8.2f}{seconds.max():>8.1f}s{rows['speaker'].nunique():>10}"
        means = "".join("             n/a" if mean != mean else f"{mean:>16.3f}" for mean in rows[corpus.labels].mean())
        lines.append(f"{split!s:<12}{counts}{rows['conversation_id'].nunique():>15}{means}")
    if corpus.skipped:
        lines.append(f"{len(corpus.skipped)} utterances were skipped; {SKIPPED_FILE} lists them with the reason")
    return "\n".join([*lines, *corpus.remarks])


def with_spread(rows: pd.DataFrame, names: Sequence[str], votes: pd.DataFrame) -> pd.DataFrame:
    """Add how far the raters of an utterance differ: their standard deviation (with n - 1; none for one rater) as
    `valence_sd` and so on, and their number as `raters`.

    Args:
        names: of the utterances in `rows`, as `votes` has them.
        votes: one single rating a row: `name`, and those of `LABELS` that were rated (NaN: none). Empty: not delivered.
    """
    by_name = votes.groupby("name") if len(votes) else None
    if by_name is None:
        return rows
    spreads = {f"{label}_sd": by_name[label].std().reindex(names).to_numpy() for label in LABELS if label in votes}
    return rows.assign(**spreads, raters=by_name.size().reindex(names, fill_value=0).to_numpy())


def leave_one_session_out(rows: pd.DataFrame, fold: int) -> pd.DataFrame:
    """Add a column of splits for each fold: test is the fold's session, validation the next one, train the others.

    Sessions are numbered from 1 in the column `session`. The splits of `fold` go into the column `split`, too; the
    others are chosen by `data.columns.split=split_fold2`.
    """
    count = int(rows["session"].max())
    for number in range(1, count + 1):
        splits = {number: "test", number % count + 1: "validation"}
        rows[f"split_fold{number}"] = [splits.get(session, "train") for session in rows["session"]]
    rows["split"] = rows[f"split_fold{fold}"]
    return rows


def visible(paths: Iterable[Path]) -> list[Path]:
    """Sorted, without the `._*` files that macOS leaves in archives."""
    return sorted(path for path in paths if not path.name.startswith("."))


def enumerated(what: str, names: Sequence[Any] | pd.Series) -> str:
    """A sentence and the names it is about, one a line, not more than a screen takes."""
    more = [f"and {len(names) - _ENUMERATED} more"] if len(names) > _ENUMERATED else []
    return "\n  ".join([f"{what} ({len(names)}):", *(str(name) for name in list(names)[:_ENUMERATED]), *more])


def _with_times(corpus: Corpus, rows: pd.DataFrame) -> pd.DataFrame:
    """Add `start` and `end` from the headers of the files, all of which must exist and be audio."""

    def facts(name: str) -> Any:
        try:
            with Recording(name) as recording:
                return recording.channels, recording.sampling_rate, recording.seconds
        except AudioFileError as error:
            return error

    found = [facts(name) for name in rows["file_name"]]
    faults = [str(error) for error in found if isinstance(error, AudioFileError)]
    if faults:
        raise CorpusError(enumerated(f"{corpus.name} has labels for audio files that are missing or damaged", faults))
    kinds: dict[tuple[int, int], list[str]] = {}
    seconds = []
    for name, (channels, rate, length) in zip(rows["file_name"], found):
        kinds.setdefault((channels, rate), []).append(Path(name).name)
        seconds.append(length)
    kinds.pop((1, SAMPLING_RATE), None)
    corpus.remarks += [
        f"{len(names)} files have {channels} channel(s) at {rate} Hz and are averaged and resampled when they are "
        f"read: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for (channels, rate), names in kinds.items()
    ]
    if max(seconds) > DEFAULT_MAX_SECONDS:
        corpus.remarks.append(
            f"{sum(length > DEFAULT_MAX_SECONDS for length in seconds)} turns are longer than {DEFAULT_MAX_SECONDS:g} "
            f"s, the longest {max(seconds):.1f} s: set data.max_seconds, or data.on_bad_audio=skip to leave them out."
        )
    return rows.assign(start=0.0, end=seconds)


def _clipped(corpus: Corpus, rows: pd.DataFrame, label: str) -> pd.Series:
    low, high = corpus.scale
    values = rows[label].astype(float)
    names = [f"{Path(name).stem}: {value:g}" for name, value in zip(rows["file_name"], values)]
    far = (values < low - _CLIPPED) | (values > high + _CLIPPED)
    if far.any():
        outside = [name for name, is_far in zip(names, far) if is_far]
        raise CorpusError(enumerated(f"{label} lies outside the scale {low:g} to {high:g} of {corpus.name}", outside))
    near = (values < low) | (values > high)
    if near.any():
        outside = [name for name, is_near in zip(names, near) if is_near]
        corpus.remarks.append(enumerated(f"{label} lay slightly outside {low:g} to {high:g} and was clipped", outside))
    return values.clip(low, high)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
