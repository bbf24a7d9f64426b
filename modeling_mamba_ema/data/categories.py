"""Corpora of emotion categories: no regression target, told so before anything else goes wrong."""

import itertools
import re
from collections.abc import Collection
from pathlib import Path

# 1001_DFA_ANG_XX.wav: actor, sentence, emotion, intensity
_CREMA_D = re.compile(r"\d{4}_[A-Z]{3}_(ANG|DIS|FEA|HAP|NEU|SAD)_(LO|MD|HI|XX)\.(wav|mp3|flv)")
_CATEGORY_COLUMNS = {"emotion", "emoclass", "category", "emotion_category", "emotion_label", "class", "label", "labels"}
_LOOKED_AT = 200  # files; a corpus names all of them alike
_WAY_OUT = "Values are not made up from categories; take a corpus whose listeners rated these dimensions"


class CorpusError(ValueError):
    """A folder or table that is not the corpus it should be, or not all of it; the message says what is missing."""


def refuse_crema_d(folder: Path) -> None:
    """Raise `CorpusError` where the folder holds CREMA-D."""
    files = (path.name for path in folder.rglob("*") if path.suffix in (".wav", ".mp3", ".flv"))
    if any(_CREMA_D.fullmatch(name) for name in itertools.islice(files, _LOOKED_AT)):
        raise CorpusError(
            f"{folder} holds CREMA-D: emotion categories and their intensity, no valence, arousal or dominance. It is "
            f"no regression target. {_WAY_OUT}"
        )


def refuse_categories(name: str, columns: Collection[str]) -> None:
    """Raise `CorpusError` where the table `name` has a column of categories; for tables without any label column."""
    found = [column for column in columns if column.lower() in _CATEGORY_COLUMNS]
    if found:
        raise CorpusError(
            f"{name} has emotion categories only ({', '.join(found)}), no rated dimensions: it is no regression "
            f"target. {_WAY_OUT}, or name their columns in data.columns"
        )
