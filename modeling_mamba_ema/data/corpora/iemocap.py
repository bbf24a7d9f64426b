"""IEMOCAP (Busso et al. 2008): dyads, 5 sessions, 10 speakers, valence, activation and dominance in 1 to 5."""

import re
from pathlib import Path

import pandas as pd

from ..categories import CorpusError, refuse_crema_d
from ..prepared_corpus import Corpus, enumerated, leave_one_session_out, visible, with_spread

SESSIONS = (1, 2, 3, 4, 5)
FOLDS = len(SESSIONS)
# [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]: mean ratings in the order V, A, D. The lines
# that follow in a block are single raters (A-E3:	val 3; act 2; dom  2;) and self reports (A-F1, A-M1).
_NUMBER = r"-?\d+(?:\.\d+)?"
_TURN = re.compile(
    rf"\[(?P<start>{_NUMBER}) - (?P<end>{_NUMBER})\]\s+(?P<name>\S+)\s+(?P<emotion>\w+)\s+"
    rf"\[(?P<valence>{_NUMBER}), *(?P<arousal>{_NUMBER}), *(?P<dominance>{_NUMBER})\]"
)
_VOTE = re.compile(
    r"^A-E\d+:\s*val\s*(?P<valence>[\d.]*)\s*;\s*act\s*(?P<arousal>[\d.]*)\s*;\s*dom\s*(?P<dominance>[\d.]*)\s*;",
    flags=re.MULTILINE,
)
_TURN_NUMBER = 5  # characters at the end of a turn's name, "_F000"; before them is its dialog


def read(folder: Path, fold: int = 1) -> Corpus:
    """Read the release's folder, which holds Session1 to Session5.

    The speaker is the session with the letter before the turn's number (`Ses01F_impro01_M003` is the man): the letter
    in `Ses01F` only says who wore the markers. `valence_sd` and so on are of the two or three evaluators of a turn. The
    fold, 1 to 5, is the session to test on; the next one is for validation.

    Raises:
        CorpusError: something else, or not all five sessions.
    """
    missing = [f"Session{number}/dialog/EmoEvaluation" for number in SESSIONS if not _labels(folder, number).is_dir()]
    if missing:
        if len(missing) == len(SESSIONS):
            refuse_crema_d(folder)
        raise CorpusError(enumerated(f"{folder} is not all of IEMOCAP; missing", missing))
    rows: list[dict] = []
    skipped: list[tuple[str, str]] = []
    votes: list[dict] = []
    for session in SESSIONS:
        wavs = folder.absolute() / f"Session{session}" / "sentences" / "wav"
        found = []
        for file in visible(_labels(folder, session).glob("*.txt")):
            text = file.read_text("utf-8", errors="replace")
            matches = list(_TURN.finditer(text))
            for match, end in zip(matches, [*(following.start() for following in matches[1:]), len(text)]):
                found.append(_turn(match, session, wavs))
                block = text[match.end() : end]
                votes += [{"name": match["name"], **vote.groupdict()} for vote in _VOTE.finditer(block)]
        if not found:
            raise CorpusError(f"{_labels(folder, session)} has no labelled turn; its *.txt are not those of IEMOCAP")
        rows += found
        labelled = {row["name"] for row in found}
        skipped += [(name, "it has no label") for name in sorted(_spoken(folder, session) - labelled)]
    table = pd.DataFrame(rows).sort_values(["conversation_id", "conversation_start", "name"], kind="stable")
    table["turn"] = table.groupby("conversation_id").cumcount()
    table = with_spread(table, table["name"].tolist(), _numbers(votes))
    table = leave_one_session_out(table.drop(columns="name"), fold)
    remarks = [
        f"Fold {fold} of {len(SESSIONS)}: tested on session {fold}, validated on session {fold % len(SESSIONS) + 1}. "
        "Report all five: data.columns.split=split_fold1 to split_fold5."
    ]
    return Corpus("IEMOCAP", (1, 5), table.reset_index(drop=True), skipped, remarks)


def _numbers(votes: list[dict]) -> pd.DataFrame:
    """Single ratings; a dimension that somebody left empty is missing."""
    table = pd.DataFrame(votes)
    return table.apply(lambda column: column if column.name == "name" else pd.to_numeric(column, errors="coerce"))


def _labels(folder: Path, session: int) -> Path:
    return folder / f"Session{session}" / "dialog" / "EmoEvaluation"


def _turn(match: re.Match[str], session: int, wavs: Path) -> dict:
    name = match["name"]
    dialog = name[:-_TURN_NUMBER]
    return {
        "name": name,
        "file_name": str(wavs / dialog / f"{name}.wav"),
        "conversation_id": dialog,
        "conversation_start": float(match["start"]),
        "conversation_end": float(match["end"]),
        "speaker": f"Ses{session:02d}_{name[-_TURN_NUMBER + 1]}",
        "session": session,
        "emotion": match["emotion"],
        **{label: float(match[label]) for label in ("valence", "arousal", "dominance")},
    }


def _spoken(folder: Path, session: int) -> set[str]:
    """Names of all turns that were cut out or transcribed; some have no label, such as `..._MXX0`."""
    names = {path.stem for path in visible((folder / f"Session{session}" / "sentences" / "wav").glob("*/*.wav"))}
    for file in visible((folder / f"Session{session}" / "dialog" / "transcriptions").glob("*.txt")):
        text = file.read_text("utf-8", errors="replace")
        names.update(re.findall(r"^(Ses\d\d[FM]_\S+) \[", text, flags=re.MULTILINE))
    return names
