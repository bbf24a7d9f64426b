"""MSP-Improv (Busso et al. 2017): two actors improvise, 6 sessions, 12 speakers, ratings in 1 to 5."""

import re
from pathlib import Path

import pandas as pd

from ..categories import CorpusError, refuse_crema_d
from ..prepared_corpus import Corpus, enumerated, leave_one_session_out, visible, with_spread

SESSIONS = (1, 2, 3, 4, 5, 6)
FOLDS = len(SESSIONS)
_LABEL_FILES = ("Evaluation.txt", "Evalution.txt")
# S01A-F01-P-FM01: sentence and intended emotion, speaker (with the number of the session), kind of recording, who is
# with whom and number.
_NAME = re.compile(r"(?:UTD|MSP)-IMPROV-(S\d+[A-Z]-(?P<speaker>[FM](?P<session>\d\d))-[A-Z]-[A-Z]+)(?P<number>\d+)")
_FIELD = re.compile(r"(?P<label>[AVD])\s*:\s*(?P<value>\S+)")
_LABELS = {"A": "arousal", "V": "valence", "D": "dominance"}
_LOW, _HIGH = 1, 5


def read(folder: Path, fold: int = 1) -> Corpus:
    """Read the release's folder, which holds Evaluation.txt and session1 to session6 (or Audio/session1 ...).

    A line of ratings is `UTD-IMPROV-S01A-F01-P-FM01.avi; N; A:2.6; V:3.0; D:2.8; N:4.0;`: the consensus emotion, then
    means; the last `N` is naturalness. Dominance may be NaN. Of the lines of single raters that follow come
    `valence_sd` and so on.

    The ratings carry no times, so how the turns of two actors alternate is not known. A conversation here is what one
    actor says in one recording, in the order of the numbers.

    Whether a low `A` means calm or excited is read from the data: angry speech is more aroused than sad speech. The
    fold, 1 to 6, is the session to test on; the next one is for validation.

    Raises:
        CorpusError: something else, or not all six sessions.
    """
    labels = next((folder / name for name in _LABEL_FILES if (folder / name).is_file()), None)
    if labels is None:
        refuse_crema_d(folder)
        raise CorpusError(f"{folder} is not MSP-Improv: it has no {' or '.join(_LABEL_FILES)}")
    wavs = {path.stem: path for path in visible(folder.absolute().rglob("MSP-IMPROV-*.wav"))}
    rows: list[dict] = []
    votes: list[dict] = []
    for line in labels.read_text("utf-8", errors="replace").splitlines():
        name, *fields = (part.strip() for part in line.split(";"))
        if (match := _NAME.match(name)) and len(fields) >= 2:
            rows.append(_turn(match, fields, wavs, folder))
        elif rows and (ratings := _ratings(fields)):
            votes.append({"name": rows[-1]["file_name"], **ratings})
    sessions = {row["session"] for row in rows}
    if sessions != set(SESSIONS):
        missing = [f"session {number}" for number in SESSIONS if number not in sessions]
        raise CorpusError(enumerated(f"{labels} is not all of MSP-Improv's; it has no ratings of", missing))
    rated = {Path(row["file_name"]).stem for row in rows}
    skipped = [(name, "it has no label") for name in wavs if name not in rated]
    table = pd.DataFrame(rows)
    remarks = [
        f"Fold {fold} of {len(SESSIONS)}: tested on session {fold}, validated on session {fold % len(SESSIONS) + 1}. "
        "Report all six: data.columns.split=split_fold1 to split_fold6.",
        _orient_arousal(table),
    ]
    table = with_spread(table, table["file_name"].tolist(), pd.DataFrame(votes))
    table = table.sort_values(["conversation_id", "number"], kind="stable")
    table["turn"] = table.groupby("conversation_id").cumcount()
    table = leave_one_session_out(table.drop(columns="number"), fold)
    return Corpus("MSP-Improv", (_LOW, _HIGH), table.reset_index(drop=True), skipped, remarks)


def _turn(match: re.Match[str], fields: list[str], wavs: dict[str, Path], folder: Path) -> dict:
    stem = f"MSP-IMPROV-{match[1]}{match['number']}"
    return {
        "file_name": str(wavs.get(stem, folder / f"{stem}.wav")),
        "conversation_id": match[1],
        "number": int(match["number"]),
        "speaker": match["speaker"],
        "session": int(match["session"]),
        "emotion": fields[0],
        **dict.fromkeys(_LABELS.values()),
        **_ratings(fields),
    }


def _ratings(fields: list[str]) -> dict[str, float]:
    found = [field for text in fields if (field := _FIELD.fullmatch(text))]
    return {_LABELS[field["label"]]: pd.to_numeric(field["value"], errors="coerce") for field in found}


def _orient_arousal(table: pd.DataFrame) -> str:
    """Turn arousal round where a low rating means excited; returns what was done."""
    means = table.groupby("emotion")["arousal"].mean()
    if "A" not in means or "S" not in means:
        return "No angry or no sad turn is here, so it is not known whether a low A means calm; A was taken as it is."
    found = f"angry turns have a mean A of {means['A']:.2f}, sad ones of {means['S']:.2f}"
    if means["A"] >= means["S"]:
        return f"Arousal is A as it is: {found}."
    table["arousal"] = _LOW + _HIGH - table["arousal"]
    return f"Arousal is {_LOW + _HIGH} - A, because a low A means excited here: {found}."
