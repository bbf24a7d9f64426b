"""Published corpora, from their folders as delivered to the normal form: one module each, found by its name.

A module `my_corpus` is prepared by `mamba-ema prepare my-corpus`. It has

    FOLDS = 5                                        # ways to split the corpus; 1: its own splits
    def read(folder: Path, fold: int) -> Corpus      # see `prepared_corpus`

One whose ratings are published elsewhere, see `RATED_ELSEWHERE`, is read with a third argument, `ratings`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..categories import CorpusError

if TYPE_CHECKING:
    from ..prepared_corpus import Corpus


RATED_ELSEWHERE = ("emodb",)


def corpus_names() -> list[str]:
    """Names of all corpora that can be prepared; none of their modules is imported."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def read_corpus(name: str, folder: Path, fold: int = 1, ratings: Path | None = None) -> Corpus:
    """Read a corpus, by one of [`corpus_names`], from its folder as delivered.

    Args:
        fold: from 1, where the corpus has several.
        ratings: the file of ratings, of a corpus of `RATED_ELSEWHERE`.

    Raises:
        CorpusError: an unknown name, no such fold, or a folder that does not hold all of the corpus.
    """
    if name not in corpus_names():
        raise CorpusError(f"there is no corpus {name!r}; there are {', '.join(corpus_names())}")
    module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    if fold not in range(1, module.FOLDS + 1):
        raise CorpusError(f"{name} has {module.FOLDS} fold{'s' * (module.FOLDS > 1)}; there is no fold {fold}")
    return module.read(folder, fold, ratings) if name in RATED_ELSEWHERE else module.read(folder, fold)
