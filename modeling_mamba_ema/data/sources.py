"""Where a corpus comes from: a table of its own, an audiofolder, a dataset on the Hub or in memory."""

import csv
import difflib
import hashlib
import io
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas as pd
import pyarrow
import pyarrow.json
from datasets import Audio, Dataset, DatasetDict, load_dataset, load_from_disk

from .atomic_write import atomic_write
from .categories import refuse_crema_d
from .text_files import delimiter_of, read_text

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | Dataset | DatasetDict

CORPUS_FILE = "corpus.json"  # beside the metadata: what holds for the whole corpus, such as its label scale
_SPLIT_FOLDERS = ("*/metadata.*", "data/*/metadata.*")


def read_table(source: Source) -> tuple[pd.DataFrame, str, Path]:
    """All rows of a corpus, with the columns it has; audio is not decoded.

    Args:
        source: a folder with `metadata.jsonl`, `.csv`, `.tsv`, `.json` or `.parquet`, or such a file of any name; an
            audiofolder whose splits are sub-folders with their own metadata; a folder written by `save_to_disk`; a name
            on the Hub; a `Dataset` or `DatasetDict`; `-` for CSV or JSON lines from standard input.

    Returns:
        Rows, with `split` where the source has splits; the corpus' name for messages; the folder that the paths of its
        audio start from.

    Raises:
        ValueError: nothing of this kind was found; the message says what was looked for.
    """
    if isinstance(source, Dataset):
        return _joined(DatasetDict({"train": source})), "the dataset", Path()
    if isinstance(source, DatasetDict):
        return _joined(source), "the dataset", Path()
    if not isinstance(source, (str, Path)):
        raise ValueError(f"a corpus is a path, a name on the Hub or a Dataset, not a {type(source).__name__}")
    path = Path(source)
    if str(source) == "-":
        return _read_standard_input(), "standard input", Path()
    if path.is_file():
        return _read_metadata(path), path.name, path.parent
    if not path.is_dir():
        return _joined(_load_from_hub(str(source))), str(source), Path()
    metadata = sorted(file for file in path.glob("metadata.*") if file.suffix in _READERS)
    if len(metadata) > 1:
        names = ", ".join(file.name for file in metadata)
        raise ValueError(f"{path} has {names}; name the one that is meant, such as {metadata[0]}")
    if metadata:
        return _read_metadata(metadata[0]), metadata[0].name, path
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        saved = load_from_disk(str(path))
        return _joined(saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})), path.name, Path()
    parts = sorted(file for depth in _SPLIT_FOLDERS for file in path.glob(depth) if file.suffix in _READERS)
    if parts:
        return pd.concat([_read_split(file, path) for file in parts], ignore_index=True), path.name, path
    refuse_crema_d(path)
    raise ValueError(f"{path} is no corpus: give a folder with metadata{', metadata'.join(_READERS)}, or such a file")


def read_label_ranges(source: Source) -> dict[str, tuple[float, float]]:
    """Each label's scale (low, high), as `corpus.json` beside the metadata records it; empty where there is none.
    Raises `ValueError` where the file is damaged."""
    if not isinstance(source, (str, Path)):
        return {}
    path = Path(source)
    file = (path if path.is_dir() else path.parent) / CORPUS_FILE
    if not path.exists() or not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        misspelt = [] if "label_ranges" in facts else difflib.get_close_matches("label_ranges", facts, n=1)
        ranges = {str(label): (float(low), float(high)) for label, (low, high) in facts.get("label_ranges", {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        example = '{"label_ranges": {"valence": [1, 5]}}'
        raise ValueError(f"{file} must hold label_ranges, such as {example}: {error}") from error
    if misspelt:
        raise ValueError(f"{file} has {misspelt[0]!r}; did you mean 'label_ranges'?")
    for label, (low, high) in ranges.items():
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"{file} has {label} from {low:g} to {high:g}; label_ranges are [lowest, highest]")
    return ranges


def _read_standard_input() -> pd.DataFrame:
    text = sys.stdin.read()
    return _jsonl(text) if text.startswith("{") else _csv(text)


def _jsonl(text: str) -> pd.DataFrame:
    try:
        table = pyarrow.json.read_json(io.BytesIO(text.encode()))
        if not any(pyarrow.types.is_temporal(column.type) for column in table.columns):  # made of texts like a date
            return table.to_pandas()
    except pyarrow.ArrowInvalid:  # values of several types in a column, which each row's own value decides about
        pass
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line, object_pairs_hook=_without_repetition))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(rows[-1], dict):
            raise ValueError(f'line {number} is no object such as {{"file_name": ...}}')
    return pd.DataFrame(rows)


def _csv(text: str) -> pd.DataFrame:
    """Every value as its text, so that a name such as 007 stays what it is; empty ones are missing."""
    header: list[str] = next(csv.reader(io.StringIO(text), delimiter=delimiter_of(text)), [])
    _without_repetition((name, None) for name in header if name)  # pandas would add a number to the second
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more values than there are columns
        return pd.read_csv(
            io.StringIO(text),
            sep=delimiter_of(text),
            dtype=str,
            keep_default_na=False,
            na_values=[""],
            index_col=False,
        )


def _json(text: str) -> pd.DataFrame:
    return pd.DataFrame(json.loads(text, object_pairs_hook=_without_repetition))


def _without_repetition(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of pairs; `ValueError` for two of one name, of which a dictionary would keep the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has the column {name!r} twice")
        found[name] = value
    return found


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".jsonl": lambda path: _jsonl(read_text(path)),
    ".json": lambda path: _json(read_text(path)),
    **dict.fromkeys((".csv", ".tsv"), lambda path: _csv(read_text(path))),
    ".parquet": pd.read_parquet,
}


def _read_metadata(path: Path) -> pd.DataFrame:
    if path.suffix not in _READERS:
        raise ValueError(f"{path.name} is no table that can be read; allowed are {', '.join(_READERS)}")
    try:
        return _READERS[path.suffix](path)
    except (ValueError, TypeError, OSError, csv.Error, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error


def _read_split(metadata: Path, folder: Path) -> pd.DataFrame:
    """The table of an audiofolder's split, with paths that start from the whole folder."""
    table = _read_metadata(metadata)
    if "file_name" not in table.columns:
        raise ValueError(f"{metadata} has no column 'file_name', only {', '.join(table.columns)}")
    inside = metadata.parent.relative_to(folder)
    table["file_name"] = [str(inside / file) if isinstance(file, str) else file for file in table["file_name"]]
    return table if "split" in table.columns else table.assign(split=metadata.parent.name)


def _load_from_hub(name: str) -> DatasetDict:
    logger.info("%s is no file or folder here; asking the Hub for a dataset of this name", name)
    try:
        return load_dataset(name)
    except datasets.exceptions.DatasetGenerationError as error:  # of single audio files: datasets wants torchcodec
        raise ValueError(
            f"the Hub's {name} cannot be read as it is ({error.__cause__ or error}); download it with `hf download "
            f"{name} --repo-type dataset --local-dir FOLDER` and name the folder"
        ) from error
    except (OSError, ValueError) as error:  # not found, gated, or no connection
        raise ValueError(
            f"{name} is neither a file or folder here nor a dataset that the Hub gives: {error}"
        ) from error


def _joined(splits: DatasetDict) -> pd.DataFrame:
    """One table of all splits; an audio column becomes paths."""
    tables = []
    for name, rows in splits.items():
        table = _audio_as_files(rows).to_pandas()
        if "split" not in table.columns:
            table["split"] = str(name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _audio_as_files(rows: Dataset) -> Dataset:
    """Audio that a dataset brings along is written to the datasets cache once, each file under its content's hash."""
    columns = [name for name, feature in rows.features.items() if isinstance(feature, Audio)]
    if not columns:
        return rows
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "mamba_ema_audio"
    rows = rows.remove_columns([*columns[1:], *(["file_name"] if "file_name" in rows.column_names else [])])
    rows = rows.cast_column(columns[0], Audio(decode=False))
    return rows.map(
        _audio_path,
        fn_kwargs={"column": columns[0], "cache": str(cache)},
        remove_columns=columns[0],
        desc="audio files",
    )


def _audio_path(row: dict[str, Any], column: str, cache: str) -> dict[str, str]:
    audio = row[column]
    if audio["bytes"] is None:
        return {"file_name": audio["path"]}
    digest = hashlib.sha256(audio["bytes"]).hexdigest()
    path = Path(cache) / digest[:2] / f"{digest}{Path(audio['path'] or '').suffix}"
    if not path.exists():
        atomic_write(path, audio["bytes"])
    return {"file_name": str(path)}
