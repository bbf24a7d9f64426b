"""The Berlin Database of Emotional Speech (Burkhardt et al. 2005) with ratings of valence and arousal from 0 to 100.

The corpus has categories only. Ratings of all its utterances are study 5 of Sievers, Lee, Haslett & Wheatley 2019, "A
multi-sensory code for emotional arousal", Proceedings of the Royal Society B 286, 20190513.
"""

from pathlib import Path

import pandas as pd

from ..categories import CorpusError
from ..prepared_corpus import Corpus, enumerated, leave_one_session_out, read_csv, visible, with_spread

FOLDS = 5
_COLUMNS = ("subID", "stimFile", "stimType", "valenceRating", "arousalRating")
# The sixth character of a file's name.
_EMOTIONS = {
    "W": "anger",
    "L": "boredom",
    "E": "disgust",
    "A": "fear",
    "F": "happiness",
    "T": "sadness",
    "N": "neutral",
}
_MEN = {"03", "10", "11", "12", "15"}
_REMARKS = [
    "Ten actors say ten German sentences in a studio: acted, not spontaneous, speech.",
    "Audio: Burkhardt, Paeschke, Rolfes, Sendlmeier & Weiss 2005, 'A Database of German Emotional Speech', "
    "Interspeech; CC0-1.0 as audEERING's data card states it.",
    "Ratings: Sievers, Lee, Haslett & Wheatley 2019, 'A multi-sensory code for emotional arousal', Proceedings of the "
    "Royal Society B 286, 20190513, study 5; their BSD licence is beside their data. Keep both with what you pass on.",
    "Folds leave two speakers out in turn: state the mean over all five, for two test speakers are few.",
]


def read(folder: Path, fold: int = 1, ratings: Path | None = None) -> Corpus:
    """Read the audio, and `sievers2019_study_5_data.csv` with the ratings.

    A listener who rated an utterance several times counts once, with the mean. Rows have the mean over listeners as
    `valence` and `arousal`, their deviation as `valence_sd` and `arousal_sd`, their number as `raters`, and `emotion`
    and `sex`. Of the sorted speakers, fold i (1 to 5) tests those at i and i + 5, and validates on those of the next
    fold.

    Args:
        folder: with WAV or FLAC files, in folders of any kind.

    Raises:
        CorpusError: no ratings, columns that are missing, or utterances that are rated and not there.
    """
    if ratings is None:
        raise CorpusError("emodb needs its audio and the ratings: mamba-ema prepare emodb AUDIO_FOLDER RATINGS.csv")
    votes = read_csv(ratings)
    absent = [name for name in _COLUMNS if name not in votes.columns]
    if absent:
        raise CorpusError(
            f"{ratings} has no column {', '.join(absent)}; there are {', '.join(map(str, votes.columns))}"
        )
    votes = votes[votes["stimType"] == "sounds"]
    votes = votes.assign(name=[Path(file).stem for file in votes["stimFile"]])
    votes = votes.rename(columns={"valenceRating": "valence", "arousalRating": "arousal"})
    each = votes.groupby(["name", "subID"])[["valence", "arousal"]].mean().reset_index()  # a row a listener
    by_name = each.groupby("name")[["valence", "arousal"]].mean()

    files = {path.stem: path for path in visible(folder.absolute().rglob("*")) if path.suffix in (".wav", ".flac")}
    missing = sorted(set(by_name.index) - set(files))
    if missing or by_name.empty:
        raise CorpusError(
            enumerated(f"{folder} has no WAV or FLAC file of utterances that {ratings.name} rates", missing)
        )
    names = list(by_name.index)
    odd = [name for name in names if len(name) != 7 or name[5] not in _EMOTIONS]
    if odd:
        raise CorpusError(enumerated("names that are not of EmoDB, such as 03a01Fa", odd))
    speakers = sorted({name[:2] for name in names})
    rows = pd.DataFrame(
        {
            "file_name": [str(files[name]) for name in names],
            "conversation_id": names,
            "turn": 0,
            "speaker": [name[:2] for name in names],
            "session": [speakers.index(name[:2]) % FOLDS + 1 for name in names],
            "emotion": [_EMOTIONS[name[5]] for name in names],
            "sex": ["male" if name[:2] in _MEN else "female" for name in names],
            **{label: by_name[label].to_numpy() for label in by_name},
        }
    )
    rows = leave_one_session_out(with_spread(rows, names, each), fold).drop(columns="session")
    skipped = [(path.name, "it has no rating") for name, path in files.items() if name not in by_name.index]
    return Corpus("EmoDB", (0, 100), rows, skipped, list(_REMARKS))
