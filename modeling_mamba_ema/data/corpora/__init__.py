"""Published corpora, from their folders as delivered to the normal form."""

from ..categories import CorpusError
from .iemocap import read_iemocap
from .msp_improv import read_msp_improv
from .msp_podcast import read_msp_podcast
from .prepared import Corpus, describe_corpus, write_corpus

__all__ = [
    "Corpus",
    "CorpusError",
    "describe_corpus",
    "read_iemocap",
    "read_msp_improv",
    "read_msp_podcast",
    "write_corpus",
]
