"""Corpora in miniature: the folders, file formats and oddities of the real releases, with noise for speech."""

from pathlib import Path

import numpy as np
import soundfile as sf

RATE = 16_000
MACOS_LITTER = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "


def write_wav(path: Path, seconds: float = 0.4, rate: int = RATE, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.stem)).normal(0, 0.1, (round(seconds * rate), channels))
    sf.write(path, noise, rate, subtype="PCM_16")


def litter(folder: Path, name: str) -> None:
    """What macOS leaves beside a file in an archive."""
    (folder / f"._{name}").write_bytes(MACOS_LITTER)


# --- IEMOCAP -----------------------------------------------------------------------------------------------------

# (start, end, letter and number, emotion, (valence, activation, dominance)); the woman wears the markers in Ses01F.
# Turns overlap and are not in the order of their start, as in the release; xxx means that raters did not agree.
IMPROVISED = [
    (6.2901, 8.2357, "F000", "neu", (2.5, 2.0, 3.0)),
    (10.01, 11.3925, "F001", "xxx", (2.0, 3.5, 4.0)),
    (7.0, 7.9, "M000", "fru", (1.5, 4.5, 5.0)),
]
SCRIPTED = [
    (2.0, 3.1, "M000", "ang", (1.0, 4.0, 4.5)),
    (0.5, 1.9, "F000", "oth", (3.0, 2.5, 2.0)),
]


def write_iemocap(folder: Path) -> Path:
    """Two dialogs a session, five labelled turns each session, one turn each session without a label."""
    for session in range(1, 6):
        for dialog, turns in ((f"Ses{session:02d}F_impro01", IMPROVISED), (f"Ses{session:02d}M_script01_1b", SCRIPTED)):
            _write_dialog(folder / f"Session{session}", dialog, turns)
    return folder


def _write_dialog(session: Path, dialog: str, turns: list) -> None:
    blocks = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n"]
    transcript = []
    for start, end, turn, emotion, (valence, activation, dominance) in turns:
        name = f"{dialog}_{turn}"
        blocks.append(
            f"[{start:.4f} - {end:.4f}]\t{name}\t{emotion}\t[{valence:.4f}, {activation:.4f}, {dominance:.4f}]\n"
            "C-E2:\tNeutral;\t()\nC-E4:\tNeutral; Frustration;\t()\n"
            f"C-{turn[0]}1:\tAnger;\t()\n"
            "A-E3:\tval 5; act 1; dom  1;\t()\nA-E4:\tval 1; act 1; dom  1;\t(mixed)\n"
            f"A-{turn[0]}1:\tval 5; act 5; dom  5;\t()\n"
        )
        transcript.append(f"{name} [{start:08.4f}-{end:08.4f}]: Excuse me.")
        write_wav(session / "sentences" / "wav" / dialog / f"{name}.wav", seconds=0.3 + 0.05 * valence)
    transcript += [f"{dialog}_MXX0 [015.0000-015.4000]: [BREATHING]", "M: (a line that is no turn)"]
    write_wav(session / "sentences" / "wav" / dialog / f"{dialog}_FXX0.wav")
    litter(session / "sentences" / "wav" / dialog, f"{dialog}_F000.wav")

    labels = session / "dialog" / "EmoEvaluation"
    for place in (labels, labels / "Categorical", labels / "Attribute", labels / "Self-evaluation"):
        place.mkdir(parents=True, exist_ok=True)
    (labels / f"{dialog}.txt").write_text("\n".join(blocks), encoding="utf-8")
    litter(labels, f"{dialog}.txt")
    # Single raters in sub-folders; one of them holds lines like those above, with other numbers.
    (labels / "Categorical" / f"{dialog}_e1_cat.txt").write_text(f"{dialog}_F000 :Neutral state; ()\n")
    (labels / "Attribute" / f"{dialog}_e1_atr.txt").write_text(
        f"[0.0000 - 1.0000]\t{dialog}_F000\tang\t[5.0000, 5.0000, 5.0000]\n"
    )
    words = session / "dialog" / "transcriptions"
    words.mkdir(parents=True, exist_ok=True)
    (words / f"{dialog}.txt").write_text("\n".join(transcript), encoding="utf-8")
    litter(words, f"{dialog}.txt")


# --- MSP-Podcast -------------------------------------------------------------------------------------------------

# file, emotion, arousal, valence, dominance, speaker, gender
PODCAST = {
    "MSP-PODCAST_0001_0008.wav": ("N", 2.2, 4.0, 2.6, "30", "Male"),
    "MSP-PODCAST_0001_0019.wav": ("A", 5.8, 1.6, 6.0, "30", "Male"),
    "MSP-PODCAST_0002_0033.wav": ("H", 5.0, 6.4, 4.2, "127", "Female"),
    "MSP-PODCAST_0002_0039.wav": ("X", 4.6, 3.8, 4.8, "Unknown", "Unknown"),
    "MSP-PODCAST_0003_0100.wav": ("S", 2.0, 2.4, 2.8, "9", "Female"),
    "MSP-PODCAST_0004_0001.wav": ("N", 3.4, 4.2, 3.8, "12", "Male"),
    "MSP-PODCAST_0005_0002.wav": ("N", 3.6, 4.4, 4.0, "13", "Female"),
}
OLD_SPLITS = ["Train", "Train", "Train", "Validation", "Validation", "Test1", "Test2"]  # up to release 1.8
NEW_SPLITS = ["Train", "Train", "Train", "Development", "Development", "Test1", "Test2"]
STEREO = "MSP-PODCAST_0002_0033.wav"
HIDDEN = "MSP-PODCAST_9001_0001.wav"


def write_msp_podcast(folder: Path, old: bool = False) -> Path:
    """Seven rated turns, one of them stereo at 44.1 kHz; a turn of Test3 whose labels are hidden where not `old`."""
    audio = folder / ("Audio" if old else "Audios")
    splits = dict(zip(PODCAST, OLD_SPLITS if old else NEW_SPLITS))
    lines = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    for name, (emotion, arousal, valence, dominance, speaker, gender) in PODCAST.items():
        lines.append(f"{name},{emotion},{arousal},{valence},{dominance},{speaker},{gender},{splits[name]}")
        write_wav(audio / name, **({"rate": 44_100, "channels": 2} if name == STEREO else {}))
        litter(audio, name)
    if not old:
        lines.append(f"{HIDDEN},,,,,Unknown,Unknown,Test3")
        write_wav(audio / HIDDEN)
        write_wav(audio / "MSP-PODCAST_9001_0002.wav")  # of Test3, too, and not even in the table
    (folder / "Labels").mkdir()
    spelling = "labels_concensus.csv" if old else "labels_consensus.csv"
    (folder / "Labels" / spelling).write_text("\n".join(lines) + "\n", encoding="utf-8")
    litter(folder / "Labels", spelling)
    (folder / "Labels" / "labels_detailed.csv").write_text(_podcast_votes(old), encoding="utf-8")
    (folder / "Speaker_ids.txt").write_text("MSP-PODCAST_0001_0008.wav; 30\n", encoding="utf-8")
    return folder


def _podcast_votes(old: bool) -> str:
    """Three ratings of the first turn, one of the second; releases have them in one column or in several."""
    names = list(PODCAST)
    votes = [(names[0], 1, 2, 3), (names[0], 2, 6, 3), (names[0], 3, 4, 3), (names[1], 6, 1, 6)]
    if old:
        lines = [f'{name},"WORKER{a}; Neutral; Neutral,Sad; A:{a}.0; V:{v}.0; D:{d}.0;"' for name, a, v, d in votes]
        return "\n".join(["FileName,Annotation", *lines]) + "\n"
    lines = [f"{name},WORKER{a},Neutral,{a},{v},{d}" for name, a, v, d in votes]
    return "\n".join(["FileName,Worker,EmoClass_Major,EmoAct,EmoVal,EmoDom", *lines]) + "\n"


# --- MSP-Improv --------------------------------------------------------------------------------------------------

# name, emotion, A, V, D; the same in every session, whose number stands for KK
IMPROV = [
    ("S01A-FKK-P-FM02", "A", 1.8, 1.6, 4.2),
    ("S01A-FKK-P-FM10", "N", 3.1, 3.0, 2.8),
    ("S01A-MKK-S-MF01", "A", 2.0, 1.4, 4.4),
    ("S04S-MKK-S-FM01", "S", 4.2, 2.0, 2.0),
    ("S20H-FKK-R-FF01", "X", 2.6, 4.4, None),
]


def write_msp_improv(folder: Path, excited_is_low: bool = True, spelling: str = "Evaluation.txt") -> Path:
    """Five rated turns a session, one without dominance; a wav without ratings in the first session."""
    lines = []
    for session in range(1, 7):
        for name, emotion, arousal, valence, dominance in IMPROV:
            stem = name.replace("KK", f"{session:02d}")
            activation = arousal if excited_is_low else 6 - arousal
            power = "NaN" if dominance is None else f"{dominance:.6f}"
            lines += [
                f"UTD-IMPROV-{stem}.avi; {emotion}; A:{activation:.6f}; V:{valence:.6f}; D:{power} ; N:4.000000;",
                "Rater_A1-x; Neutral; Neutral; A:5.000000; V:5.000000; D:5.000000; N:5.000000;",
                "Rater_B2; Sad; Sad,Frustrated; A:1.000000; V:1.000000; D:NaN; N:1.000000;",
                "",
            ]
            scenario, _, kind, _ = stem.split("-")
            write_wav(folder / f"session{session}" / scenario / kind / f"MSP-IMPROV-{stem}.wav", rate=44_100)
    write_wav(folder / "session1" / "S01A" / "P" / "MSP-IMPROV-S01A-F01-P-FM77.wav")
    litter(folder / "session1" / "S01A" / "P", "MSP-IMPROV-S01A-F01-P-FM02.wav")
    (folder / spelling).write_text("\n".join(lines), encoding="utf-8")
    return folder


# --- CREMA-D -----------------------------------------------------------------------------------------------------


def write_crema_d(folder: Path) -> Path:
    for name in ("1001_DFA_ANG_XX", "1001_IEO_HAP_HI", "1002_TSI_SAD_LO"):
        write_wav(folder / "AudioWAV" / f"{name}.wav")
    (folder / "SentenceFilenames.csv").write_text('"Stimulus_Number","Filename"\n1,"1001_DFA_ANG_XX"\n')
    return folder
