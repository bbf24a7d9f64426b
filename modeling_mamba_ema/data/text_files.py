"""Text and times in files that people and programs have written."""

import codecs
import json
import math
import numbers
import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# As pandas ("0 days 00:00:00.5"), Python ("1 day, 0:00:01"), players and subtitles ("1:23", "00:00:01,5") write times.
# Minutes and seconds stay below 60, but minutes that begin the clock, as in "75:30".
_CLOCK = re.compile(r"(?:(\d+) days?,? ?)?(?:(?:(\d+):([0-5]?\d)|(\d+)):([0-5]?\d(?:[.,]\d*)?))?")


def read_text(path: Path) -> str:
    """A file of text in UTF-8, or in UTF-16 with the mark that Excel writes, with the line ends of Unix; `ValueError`
    for another encoding, or no text, with the line."""
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path.name} is no text in UTF-8: byte 0x{content[error.start]:02x} in line {line}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path.name} is no text in UTF-8, or holds zeros; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_text(value: Any) -> str:
    """JSON, with null for NaN and infinite numbers, which JSON does not have."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2)


def delimiter_of(text: str) -> str:
    """Of a table of text: what is in its first line most often, a comma, a semicolon or a tab."""
    return max(",;\t", key=text.split("\n", 1)[0].count)


def seconds_of(value: Any) -> float | None:
    """A time in seconds: a number, a text such as "1.5", "1,5", "0 days 00:00:01.5" or "1:01.5", or a timedelta of
    Python, numpy or pandas; None for anything else, and for what is not finite or below 0."""
    if isinstance(value, timedelta):  # pandas' Timedelta is one
        seconds = value.total_seconds()
    elif hasattr(value, "dtype") and value.dtype.kind == "m":
        seconds = float(value / value.dtype.type(1, "s"))
    elif isinstance(value, (numbers.Real, Decimal)) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        seconds = _seconds_of_text(value.strip())
    else:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _seconds_of_text(text: str) -> float:
    """NaN where it is no time."""
    clock = _CLOCK.fullmatch(text)
    if text and clock:
        *whole, seconds = clock.groups(default="0")
        days, hours, minutes, first_minutes = map(int, whole)
        return 86_400 * days + 3_600 * hours + 60 * (minutes + first_minutes) + float(seconds.replace(",", "."))
    try:
        return float(text.replace(",", ".")) if "_" not in text else math.nan
    except ValueError:
        return math.nan
