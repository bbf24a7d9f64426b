"""The normal form of a corpus' table: one row an utterance, columns of known names and types.

Columns: `file_name`, `conversation_id`, `turn`, the label names, and optionally `speaker`, `split`, `start`, `end`
(seconds, where several utterances share a file), `channel` (of the file, from 1). A value of another type becomes what
it stands for, such as the turn "3" the number 3, or is refused with its row and column; none is left out.
"""

import difflib
import logging
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import pyarrow

from ..ccc_loss import MISSING_LABEL
from .categories import refuse_categories
from .text_files import seconds_of

logger = logging.getLogger(__name__)

COLUMNS = ("file_name", "start", "end", "channel", "conversation_id", "turn", "speaker", "split")
NAMING = "data.columns can name it (of mamba-ema evaluate: --columns)"
# Ratings slightly off their scale are clipped; farther off, the scale was named wrongly.
_CLIP_SHARE = 0.02
_NO_TEXT = {"", "nan", "none", "null", "<na>"}
_NO_NUMBER = {*_NO_TEXT, "na", "n/a", "#n/a", "nat", "-"}


class LabelError(ValueError):
    """A label that is no number, or off its scale; the message names it and its row."""


def in_normal_form(
    table: pd.DataFrame,
    name: str,
    labels: Sequence[str],
    columns: Mapping[str, str],
    labels_optional: bool = False,
    spreads: Sequence[str] = (),
) -> pd.DataFrame:
    """Columns under their normal names with values of their types, rows in the order of split, conversation and turn.

    Args:
        name: of the corpus, for messages.
        columns: what the corpus calls a column of the normal form or a label.
        labels_optional: a label that the corpus lacks is missing (NaN) in every row, where it would be an error.
        spreads: names of the columns of the raters' standard deviations, missing likewise where the corpus lacks them.

    Returns:
        The table with all of `COLUMNS` but `start`, `end`, `channel` and `speaker`, which are there where the corpus
        has them; labels as numbers on the corpus' own scale. Other columns are kept.

    Raises:
        LabelError: a label that is no number.
        ValueError: a column that is needed and not there, or a value that is none of its type.
    """
    for label in labels:
        if label in COLUMNS:
            raise ValueError(
                f"{label!r} is a column of every corpus ({', '.join(COLUMNS)}); give the label another name"
            )
    table = _with_normal_names(table, name, labels, columns, labels_optional, spreads)
    read: dict[str, Callable[[pd.Series], list | np.ndarray]] = {
        "file_name": lambda column: _texts(column, name, needed=True, strip=False),
        "conversation_id": lambda column: _names(_texts(column, name, needed=True)),
        "split": lambda column: _texts(column, name, needed=True),
        "speaker": lambda column: _texts(column, name),
        "turn": lambda column: _whole_numbers(column, name, needed=True),
        "channel": lambda column: _whole_numbers(column, name, lowest=1),
        **dict.fromkeys(("start", "end"), lambda column: _times(column, name)),
        **dict.fromkeys([*labels, *spreads], lambda column: _labels(column, name)),
    }
    values = {column: read[column](table[column]) for column in table.columns if column in read}
    others = {column: _storable(table[column]) for column in table.columns if column not in read}
    table = _with_conversations(pd.DataFrame({**values, **others}), name)
    return table.sort_values(["conversation_id", "turn"], kind="stable")


def to_unit_scale(table: pd.DataFrame, label: str, scale: Sequence[float], name: str) -> np.ndarray:
    """Labels from their scale (low, high) to [0, 1], -100 where there is none; `LabelError` for one far off its
    scale."""
    low, high = float(scale[0]), float(scale[1])
    values, given = table[label].to_numpy(float), table[label].notna().to_numpy()
    tolerated = _CLIP_SHARE * (high - low)
    off = given & ~((values >= low - tolerated) & (values <= high + tolerated))
    if off.any():
        row = table[off].iloc[0]
        conversation = table[off]["conversation_id"].tolist()[0]
        raise LabelError(
            f"{label} of turn {row['turn']} of conversation {conversation!r} is {row[label]:g}, outside its "
            f"scale [{low:g}, {high:g}] ({name}); name the corpus' scale in model.params.label_ranges or in its "
            "corpus.json"
        )
    clipped = given & ((values < low) | (values > high))
    if clipped.any():
        logger.warning(
            "%s: clipped to [%g, %g], turns slightly outside: %d, the first with %g; a missing label is an empty cell",
            *(label, low, high, clipped.sum(), values[clipped][0]),
        )
    return np.where(given, np.clip((values - low) / (high - low), 0, 1), MISSING_LABEL)


def spread_to_unit_scale(table: pd.DataFrame, column: str, scale: Sequence[float], name: str) -> np.ndarray:
    """Standard deviations of ratings on a scale (low, high) to those on [0, 1], -100 where there is none; `LabelError`
    for one below 0, or longer than the scale."""
    values, length = table[column].to_numpy(float), float(scale[1]) - float(scale[0])
    given = ~np.isnan(values)
    wrong = given & ~((values >= 0) & (values <= length))
    if wrong.any():
        raise LabelError(
            f"{column} is {values[wrong][0]:g} ({name}); allowed are standard deviations on the label's scale "
            f"[{scale[0]:g}, {scale[1]:g}], from 0 to {length:g}"
        )
    return np.where(given, values / length, MISSING_LABEL)


# which columns there are


def _with_normal_names(
    table: pd.DataFrame,
    name: str,
    labels: Sequence[str],
    columns: Mapping[str, str],
    labels_optional: bool,
    spreads: Sequence[str],
) -> pd.DataFrame:
    table = table.rename(columns=str).reset_index(drop=True)
    if not len(table):
        raise ValueError(f"{name} has no rows")
    if table.columns.duplicated().any():
        raise ValueError(f"{name} has the column {table.columns[table.columns.duplicated()][0]!r} twice")
    known = (*COLUMNS, *labels, *spreads)
    for normal, own in columns.items():
        if normal not in known:
            close = difflib.get_close_matches(normal, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"data.columns names {normal!r}; allowed are {', '.join(known)}{hint}")
        if own not in table.columns:
            raise ValueError(f"{name} has no column {own!r} for {normal}{_nearest(own, table.columns)}")
    if labels and not any(label in columns or label in table.columns for label in labels):
        refuse_categories(name, table.columns)
    table = table.assign(**{normal: table[own] for normal, own in columns.items()})
    for column in ("file_name", *labels):
        if column not in table.columns:
            close = difflib.get_close_matches(column, list(table.columns), n=1)
            if column == "file_name" or not labels_optional or close:
                nearest = _nearest(column, table.columns)
                raise ValueError(f"{name} has no column {column!r}{nearest}; {NAMING}")
            table[column] = np.nan
    table = table.assign(**{column: np.nan for column in spreads if column not in table.columns})
    if "split" not in table.columns:
        table["split"] = "train"
    if "conversation_id" not in table.columns:
        close = difflib.get_close_matches("conversation_id", list(table.columns), n=1)
        if close or table["file_name"].astype(str).duplicated().any():
            hint = f"; did you mean {close[0]!r}?" if close else ", although several utterances share a file;"
            raise ValueError(f"{name} has no column 'conversation_id'{hint} {NAMING}")
        logger.info("%s has no conversations: each of its %d utterances stands alone", name, len(table))
        table = table.assign(conversation_id=table["file_name"], turn=0)
    if "turn" not in table.columns and "start" not in table.columns:
        raise ValueError(
            f"{name} has no column 'turn', and no 'start' to order turns by{_nearest('turn', table.columns)}"
        )
    return table


def _with_conversations(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Turns in the order of their start where they have no number; each conversation of a split has each turn once."""
    if "turn" not in table.columns:
        _check_there(table["start"].isna().to_numpy(), table["start"], name)
        starts = table.groupby(["split", "conversation_id"])["start"]
        table["turn"] = starts.rank(method="first").astype(int) - 1
    doubled = table.duplicated(["split", "conversation_id", "turn"])
    if doubled.any():
        place = int(doubled.to_numpy().argmax())
        conversation, turn = table["conversation_id"].tolist()[place], table["turn"].iloc[place]
        raise ValueError(
            f"{name} has turn {turn} of conversation {conversation!r} twice, the second time in row {place + 1}"
        )
    return table


def _nearest(name: str, known: Sequence[str] | pd.Index) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", only {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else "")


# values of a column


def _wrong(column: pd.Series, place: int, allowed: str, name: str) -> ValueError:
    value = reprlib.repr(column.tolist()[place])  # as Python's own types, whose text is what people write
    return ValueError(f"{name} has {value} as {column.name} in row {place + 1}; allowed are {allowed}")


def _check_there(missing: np.ndarray, column: pd.Series, name: str) -> None:
    if missing.any():
        raise ValueError(f"{name} has no {column.name} in row {int(missing.argmax()) + 1}")


def _is_missing(value: Any, texts: set[str]) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in texts
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _texts(column: pd.Series, name: str, needed: bool = False, strip: bool = True) -> list[str | None]:
    """Names: texts without the spaces around them, or numbers as texts; None where there is none."""
    found: list[str | None] = []
    for place, value in enumerate(column):
        text = None
        if not _is_missing(value, _NO_TEXT) and (text := _text(value)) is None:
            raise _wrong(column, place, "texts and numbers", name)
        found.append(text.strip() if text and strip else text)
    if needed:
        _check_there(np.array([text is None for text in found], dtype=bool), column, name)
    return found


def _text(value: Any) -> str | None:
    """A text, number or path as text, without the .0 that missing values in a column give to its numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (numbers.Real, Decimal)):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else str(value)
    return str(value) if isinstance(value, (PathLike, pd.Timestamp)) else None


def _names(texts: list[Any]) -> list[Any]:
    """Names that are all whole numbers as ints, so that 2 comes before 10."""
    plain = all(text.isdecimal() and text.isascii() and (text == "0" or text[0] != "0") for text in texts)
    return [int(text) for text in texts] if plain and max(map(len, texts)) < 18 else texts


def _numbers(column: pd.Series, name: str, allowed: str, convert: Callable[[Any], float | None]) -> np.ndarray:
    """(rows,) float64, NaN where there is none; `convert` makes a number, or None, of a value that is none of
    Python's."""
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind in ("integer", "floating", "mixed-integer-float") and column.dtype.kind in "iuf":
        return column.to_numpy(float, na_value=np.nan)
    found = np.full(len(column), np.nan)
    if kind == "string":
        found = pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan, copy=True)
    for place in np.flatnonzero(np.isnan(found)).tolist():
        value = column.iloc[place]
        if not _is_missing(value, _NO_NUMBER):
            number = convert(value)
            if number is None:
                raise _wrong(column, place, allowed, name)
            found[place] = number
    return found


def _whole_numbers(column: pd.Series, name: str, needed: bool = False, lowest: int | None = None) -> Any:
    found = _numbers(column, name, _WHOLE, _number)
    missing = np.isnan(found)
    if needed:
        _check_there(missing, column, name)
    wrong = ~missing & ~((np.abs(found) < 2**53) & (found == np.round(found)))
    if lowest is not None:
        wrong |= found < lowest
    if wrong.any():
        raise _wrong(column, int(wrong.argmax()), _WHOLE if lowest is None else f"{_WHOLE} from {lowest}", name)
    whole = np.where(missing, 0, found).astype(np.int64)
    return pd.arrays.IntegerArray(whole, missing) if missing.any() else whole


def _times(column: pd.Series, name: str) -> np.ndarray:
    found = _numbers(column, name, _SECONDS, seconds_of)
    wrong = ~np.isnan(found) & ~((found >= 0) & (found < np.inf))
    if wrong.any():
        raise _wrong(column, int(wrong.argmax()), _SECONDS, name)
    return found


def _labels(column: pd.Series, name: str) -> np.ndarray:
    try:
        return _numbers(column, name, "numbers, with a decimal point", _number)
    except ValueError as error:
        raise LabelError(str(error)) from error


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, Decimal, str)):
        return None
    try:
        return None if isinstance(value, str) and "_" in value else float(value)
    except (ValueError, OverflowError):
        return None


def _storable(column: pd.Series) -> pd.Series:
    """A column that nothing is asked of; one of values that do not go together becomes texts."""
    try:
        pyarrow.array(column, from_pandas=True)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):
        return column.map(lambda value: None if _is_missing(value, _NO_TEXT) else str(value))
    return column


_WHOLE = "whole numbers"
_SECONDS = "seconds from 0, or times such as 0 days 00:00:01.5"
