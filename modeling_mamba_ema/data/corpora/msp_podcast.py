"""MSP-Podcast (Lotfian & Busso 2019): turns of podcasts, rated one by one, arousal, valence, dominance in 1 to 7."""

from pathlib import Path

import pandas as pd

from ..categories import CorpusError, refuse_categories, refuse_crema_d
from ..prepared_corpus import Corpus, enumerated, read_csv, visible, with_spread

FOLDS = 1
# Releases differ in how they spell both.
_LABEL_FILES = ("labels_consensus.csv", "labels_concensus.csv")
_AUDIO_FOLDERS = ("Audios", "Audio")
_SPLITS = {name: name for name in ("train", "validation", "test1", "test2", "test3")} | {"development": "validation"}
_COLUMNS = {"EmoVal": "valence", "EmoAct": "arousal", "EmoDom": "dominance"}
_VOTES = "labels_detailed.csv"
_HIDDEN = "it has no label (those of Test3 are hidden)"


def read(folder: Path, fold: int = 1) -> Corpus:
    """Read the release's folder, which holds Labels/ and Audios/ (or Audio/), and has splits of its own.

    Every turn is a conversation of its own: they were rated without their context. Where the release has the single
    ratings beside the labels, `valence_sd` and so on are their standard deviations.

    Raises:
        CorpusError: something else, or labels whose columns or splits are not known.
    """
    labels = next((path for place in (folder / "Labels", folder) for path in _existing(place, _LABEL_FILES)), None)
    audio = next(iter(_existing(folder.absolute(), _AUDIO_FOLDERS)), None)
    if labels is None or audio is None:
        refuse_crema_d(folder)
        looked_for = {f"Labels/{' or '.join(_LABEL_FILES)}": labels, " or ".join(_AUDIO_FOLDERS): audio}
        missing = [name for name, path in looked_for.items() if path is None]
        raise CorpusError(enumerated(f"{folder} is not all of MSP-Podcast; missing", missing))
    table = read_csv(labels, dtype=str, keep_default_na=False, skipinitialspace=True)
    absent = [name for name in ("FileName", "Split_Set", *_COLUMNS) if name not in table.columns]
    if absent:
        if set(_COLUMNS) <= set(absent):
            refuse_categories(labels.name, table.columns)
        raise CorpusError(f"{labels} has no column {', '.join(absent)}; there are {', '.join(table.columns)}")
    unknown = sorted(set(table["Split_Set"].str.lower()) - set(_SPLITS))
    if unknown:
        raise CorpusError(f"{labels} names splits that are not known: {', '.join(map(repr, unknown))}")

    rows = pd.DataFrame(
        {
            "file_name": [str(audio / name) for name in table["FileName"]],
            "conversation_id": [Path(name).stem for name in table["FileName"]],
            "turn": 0,
            "speaker": _speakers(table),
            "split": [_SPLITS[split.lower()] for split in table["Split_Set"]],
        }
    )
    for column, label in _COLUMNS.items():
        rows[label] = pd.to_numeric(table[column], errors="coerce")
    rows = with_spread(rows, list(table["FileName"]), _votes(labels.with_name(_VOTES)))
    rated = rows[list(_COLUMNS.values())].notna().any(axis=1)
    skipped = [(name, _HIDDEN) for name in table["FileName"][~rated]]
    unnamed_files = set(audio.glob("*.wav")) - {audio / name for name in table["FileName"]}
    skipped += [(path.name, _HIDDEN) for path in visible(unnamed_files)]
    unnamed = int(rows["speaker"][rated].isna().sum())
    remarks = [
        "Test1 and Test2 are the splits test1 and test2: data.test_split=test1. State the release with every figure.",
        *([f"{unnamed} turns have an unknown speaker."] if unnamed else []),
    ]
    return Corpus("MSP-Podcast", (1, 7), rows[rated].reset_index(drop=True), skipped, remarks)


def _votes(path: Path) -> pd.DataFrame:
    """Single ratings, a row each. Releases differ: the values have columns of their own, or stand in the second one, as
    `WORKER1; Neutral; Neutral,Concerned; A:2; V:3; D:4;`."""
    if not path.exists():
        return pd.DataFrame()
    table = read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    if "FileName" not in table.columns or table.shape[1] < 2:
        return pd.DataFrame()
    votes = {"name": table["FileName"]}
    for column, label in _COLUMNS.items():  # the letter of EmoVal is V
        text = table.iloc[:, 1].str.extract(rf"\b{column[3]}\s*:\s*([\d.]+)")[0]
        votes[label] = pd.to_numeric(table.get(column, text), errors="coerce")
    return pd.DataFrame(votes).dropna(subset=list(_COLUMNS.values()), how="all")


def _existing(place: Path, names: tuple[str, ...]) -> list[Path]:
    return [place / name for name in names if (place / name).exists()]


def _speakers(table: pd.DataFrame) -> list[str | None]:
    if "SpkrID" not in table.columns:
        return [None] * len(table)
    return [None if speaker.lower() in ("", "unknown") else speaker for speaker in table["SpkrID"]]
