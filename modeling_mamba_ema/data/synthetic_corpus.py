"""SYNTHETIC spoken conversations whose emotion drifts from turn to turn.

Speech is synthesised (eSpeak NG), emotion is rendered by rule, and labels are the rule's own input. The corpus shows
that the package works from end to end; it says nothing about how real people sound.

What the rules make of a turn's (valence, arousal), both in [0, 1]:

- arousal: higher pitch, faster speech, more vocal effort (a brighter spectrum), louder than the turn's neutral phrases;
- valence: a lively melody and lilting loudness (modulated at 6 Hz) when pleasant, a flat and rough voice (modulated at
  70 Hz) when unpleasant.

What does not depend on the labels: the words, the length of a turn (fast speech gets more words), noise, room, band and
level of the recording, the pauses, and the format of the file. A model that measures these learns nothing.

Two things make pooling and context worth having. In `stretch` turns only one phrase carries the emotion and the rest is
neutral. In `flat` turns nothing does, although the label follows the conversation.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import NormalDist

import numpy as np
import soundfile as sf

from .atomic_write import atomic_write
from .categories import CorpusError
from .recording_conditions import RecordingConditions, draw_conditions, record
from .synthetic_speech import SAMPLING_RATE, Synthesizer

TURNS_PER_CONVERSATION = (5, 8)  # lowest and highest
SECONDS_OF_SPEECH = (2.4, 4.8)  # of a turn
PHRASE_SHARES = (30, 40, 30)  # of three phrases in the speech, as a Dirichlet distribution's parameters
SECONDS_OF_PAUSE = (0.06, 0.3)  # before, between and behind the phrases of a turn
RENDERINGS = {"whole": 0.5, "stretch": 0.35, "flat": 0.15}  # share of turns
CHARACTERS_PER_WORD = 6.7  # of English with its spaces, by the rate that eSpeak NG calls words a minute


@dataclass(frozen=True)
class Speaker:
    """A voice of eSpeak NG with its own neutral pitch (0 to 100), rate (words a minute), and factor of all frequencies,
    which is above 1 for a shorter vocal tract."""

    name: str
    voice: str
    pitch: float
    rate: float
    formants: float = 1.0


# Variants whose output eSpeak NG repeats exactly; f2, f3 and f5, for example, differ from run to run.
SPEAKERS: dict[str, tuple[Speaker, ...]] = {
    "train": (
        Speaker("train_f1", "en-us+f1", 48, 165),
        Speaker("train_m1", "en-us+m1", 40, 160),
        Speaker("train_f4", "en+f4", 54, 172),
        Speaker("train_m3", "en+m3", 36, 170),
        Speaker("train_belinda", "en-gb-scotland+belinda", 50, 168),
        Speaker("train_m7", "en-gb-scotland+m7", 44, 164),
        Speaker("train_annie", "en-us+Annie", 46, 158),
        Speaker("train_adam", "en-us+adam", 42, 176),
        Speaker("train_linda", "en+linda", 52, 166),
        Speaker("train_david", "en+david", 38, 162),
        Speaker("train_andrea", "en-gb-scotland+Andrea", 56, 170),
        Speaker("train_john", "en-us+john", 45, 174),
        Speaker("train_shelby", "en-us+shelby", 50, 163),
        Speaker("train_gustave", "en+gustave", 41, 167),
        Speaker("train_zac", "en-gb-scotland+zac", 47, 171),
        Speaker("train_max", "en-us+max", 43, 159),
    ),
    "validation": (
        Speaker("validation_anika", "en-us+anika", 50, 162),
        Speaker("validation_m2", "en+m2", 42, 170),
        Speaker("validation_aunty", "en-us+aunty", 47, 168),
        Speaker("validation_edward", "en-us+edward", 40, 166),
    ),
    "test": (
        Speaker("test_steph", "en-us+steph", 46, 168),
        Speaker("test_m6", "en-us+m6", 44, 166),
        Speaker("test_gene", "en+Gene", 48, 160),
        Speaker("test_benjamin", "en-gb-scotland+benjamin", 40, 174),
    ),
}
SPLIT_SHARES = {"train": 0.65, "validation": 0.15, "test": 0.2}  # of the conversations

# Words say nothing about the labels.
OPENERS = ("Well", "Look", "So", "You know", "Listen", "Right", "Then", "I mean", "Anyway", "Of course")
SUBJECTS = ("I", "you", "we", "they", "Anna", "Robert", "my sister", "the neighbour", "the teacher", "everybody")
PREDICATES = (
    "left",
    "slept",
    "waited",
    "sat down",
    "said so",
    "came back",
    "wrote it down",
    "saw the bus",
    "took the train",
    "put it on the table",
    "called the office again",
    "looked at the papers",
    "left the keys in the drawer",
    "walked along the river",
    "opened the kitchen window",
    "bought two loaves of bread",
)
TIMES = ("this morning", "at nine", "on Monday", "a week ago", "after lunch", "yesterday", "in the evening", "at home")


@dataclass
class Turn:
    """One utterance with its labels.

    Attributes:
        waveform: (samples,) float32 at 16 kHz.
        rendering: "whole", "stretch" or "flat".
        salient: start and end in seconds of the phrase that carries the emotion; None where all or nothing does.
        conditions: of the recording.
        file_format: "wav" or "flac".
    """

    conversation_id: str
    turn: int
    split: str
    speaker: str
    text: str
    valence: float
    arousal: float
    rendering: str
    salient: tuple[float, float] | None
    conditions: RecordingConditions
    file_format: str
    waveform: np.ndarray


TITLE = "SYNTHETIC spoken conversations"
CARD = """---
pretty_name: Synthetic spoken conversations for Mamba-EMA
license: apache-2.0
tags:
- synthetic
- speech
- emotion
label_scale: [0, 1]
---

# {title}

Made by `mamba-ema prepare synthetic {options}` with eSpeak NG. Valence and
arousal drift from turn to turn and are rendered into the voice by rule; words, lengths, noise, rooms, levels and file
formats are drawn independently of them. **No human speech and no human judgement is in
here:** results on this corpus show that software works, not how well emotion is recognised.

Labels lie on [0, 1]. Splits share no speaker.
"""


def write_synthetic_corpus(folder: Path, conversations: int, seed: int, coupling: float = 1.0) -> str:
    """Write WAV and FLAC files, `metadata.jsonl` in the normal form, `corpus.json`, and a dataset card; arguments as of
    [`synthesise_corpus`].

    The same arguments give the same bytes. Audio of an earlier synthetic corpus in the folder is removed, nothing else.
    Returns a line a split: its turns and minutes. Raises `CorpusError` where the folder holds another corpus.
    """
    metadata, earlier_card = folder / "metadata.jsonl", folder / "README.md"
    if metadata.exists() and not (earlier_card.is_file() and TITLE in earlier_card.read_text(encoding="utf-8")):
        raise CorpusError(f"{folder} holds a {metadata.name} of another corpus; name another folder")
    for line in metadata.read_text(encoding="utf-8").splitlines() if metadata.exists() else ():
        earlier = (folder / json.loads(line)["file_name"]).resolve()
        if earlier.is_relative_to(folder.resolve()):
            earlier.unlink(missing_ok=True)
    lines: list[str] = []
    seconds: dict[str, list[float]] = {split: [] for split in SPEAKERS}
    for turn in synthesise_corpus(conversations, seed, coupling):
        file = Path(turn.split, turn.conversation_id, f"turn{turn.turn:02d}.{turn.file_format}")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        sf.write(folder / file, turn.waveform, SAMPLING_RATE, subtype="PCM_16")
        start, end = turn.salient or (None, None)
        facts = ("conversation_id", "turn", "speaker", "split", "valence", "arousal", "text", "rendering")
        row = {"file_name": file.as_posix(), **{fact: getattr(turn, fact) for fact in facts}}
        row |= {"salient_start": start, "salient_end": end, **asdict(turn.conditions)}
        lines.append(json.dumps(row) + "\n")
        seconds[turn.split].append(turn.waveform.size / SAMPLING_RATE)
    scale = {"label_ranges": {"valence": [0, 1], "arousal": [0, 1]}}
    options = f"--conversations {conversations} --seed {seed}" + ("" if coupling == 1 else f" --coupling {coupling:g}")
    card = CARD.format(title=TITLE, options=options)
    for name, text in (("README.md", card), ("corpus.json", json.dumps(scale)), (metadata.name, "".join(lines))):
        atomic_write(folder / name, text)
    return "\n".join(f"{split:<10} {len(s):>4} turns  {sum(s) / 60:5.1f} min" for split, s in seconds.items())


def synthesise_corpus(conversations: int, seed: int, coupling: float = 1.0) -> Iterator[Turn]:
    """Conversations turn by turn, the same for the same arguments; no voice is in two splits.

    Args:
        conversations: how many, over all splits; at least 3.
        coupling: from 0, where each speaker's emotion drifts on its own, to 1, where one emotion drifts whoever speaks.
    """
    if conversations < 3:
        raise ValueError(f"conversations is {conversations}, but each of the 3 splits needs one")
    if not 0 <= coupling <= 1:
        raise ValueError(f"coupling is {coupling:g}; allowed are numbers from 0 to 1")
    counts = {split: max(1, round(share * conversations)) for split, share in SPLIT_SHARES.items()}
    counts["train"] = conversations - counts["validation"] - counts["test"]
    synthesizer = Synthesizer()
    for split_index, (split, count) in enumerate(counts.items()):
        for index in range(count):
            generator = np.random.default_rng([seed, split_index, index])
            pair = generator.permutation(len(SPEAKERS[split]))[:2]
            speakers = [vary(SPEAKERS[split][i], f"_{index:03d}", generator) for i in pair]
            yield from _conversation(f"{split}_{index:03d}", split, speakers, coupling, synthesizer, generator)


def vary(speaker: Speaker, suffix: str, generator: np.random.Generator) -> Speaker:
    """Another speaker with the same voice: other pitch, speed and vocal tract."""
    return Speaker(
        name=speaker.name + suffix,
        voice=speaker.voice,
        pitch=speaker.pitch + generator.normal(0, 4),
        rate=speaker.rate * generator.uniform(0.93, 1.07),
        formants=generator.uniform(0.92, 1.1),
    )


def emotional_walk(turns: int, generator: np.random.Generator) -> np.ndarray:
    """(turns, 2) valence and arousal that drift: a random walk with momentum, reflected at the ends of [0, 1]."""
    position, velocity = generator.uniform(0.05, 0.95, 2), generator.normal(0, 0.06, 2)
    walk = np.empty((turns, 2))
    for turn in range(turns):
        walk[turn] = position
        velocity = 0.6 * velocity + generator.normal(0, 0.06, 2)
        position = position + velocity
        outside = (position < 0) | (position > 1)
        velocity[outside] *= -1
        position = np.clip(np.where(position > 1, 2 - position, np.abs(position)), 0, 1)
    return walk


def coupled_walks(turns: int, coupling: float, generator: np.random.Generator) -> np.ndarray:
    """(turns, 2) valence and arousal of two speakers who take turns, at each turn those of its speaker. What the two
    feel correlates by `coupling`, from 0 to 1, and is spread alike whatever the coupling."""
    shared = emotional_walk(turns, generator)
    if coupling == 1:
        return shared
    own = np.stack([emotional_walk(turns, generator) for _ in range(2)])  # (speakers, turns, 2)
    own = own[np.arange(turns) % 2, np.arange(turns)]  # (turns, 2)
    # Sums of uniform values crowd in the middle, sums of normal ones do not.
    normal = NormalDist()
    to_normal = np.vectorize(lambda value: normal.inv_cdf(min(max(value, 1e-3), 1 - 1e-3)))
    return np.vectorize(normal.cdf)(coupling**0.5 * to_normal(shared) + (1 - coupling) ** 0.5 * to_normal(own))


def _conversation(
    conversation_id: str,
    split: str,
    speakers: list[Speaker],
    coupling: float,
    synthesizer: Synthesizer,
    generator: np.random.Generator,
) -> Iterator[Turn]:
    turns = int(generator.integers(TURNS_PER_CONVERSATION[0], TURNS_PER_CONVERSATION[1] + 1))
    for turn, (valence, arousal) in enumerate(coupled_walks(turns, coupling, generator)):
        rendering = str(generator.choice(list(RENDERINGS), p=list(RENDERINGS.values())))
        speaker = speakers[turn % 2]
        emotional = {"whole": (True, True, True), "stretch": (False, True, False), "flat": (False,) * 3}[rendering]
        shares, seconds = generator.dirichlet(PHRASE_SHARES), float(generator.uniform(*SECONDS_OF_SPEECH))
        pauses = [np.zeros(int(s * SAMPLING_RATE)) for s in generator.uniform(*SECONDS_OF_PAUSE, 4)]
        phrases, pieces = [], [pauses[0]]
        for number, feels in enumerate(emotional):
            expression = express(valence, arousal) if feels else NEUTRAL
            share = shares[number] / shares[number:].sum()  # of what is left: one phrase makes up for another's length
            words = draw_words(share * seconds * speaker.rate * expression.rate / 60, number == 0, generator)
            speech = say(synthesizer, words, speaker, expression, generator)
            seconds -= speech.size / SAMPLING_RATE
            phrases.append(words)
            pieces += [speech, pauses[number + 1]]
        starts = np.cumsum([piece.size for piece in pieces]) / SAMPLING_RATE
        conditions = draw_conditions(generator)
        yield Turn(
            conversation_id=conversation_id,
            turn=turn,
            split=split,
            speaker=speaker.name,
            text=" ".join(phrases),
            valence=round(float(valence), 4),
            arousal=round(float(arousal), 4),
            rendering=rendering,
            salient=(round(float(starts[2]), 3), round(float(starts[3]), 3)) if rendering == "stretch" else None,
            conditions=conditions,
            file_format=str(generator.choice(("wav", "flac"))),
            waveform=record(np.concatenate(pieces), SAMPLING_RATE, conditions, generator),
        )


def draw_words(count: float, opening: bool, generator: np.random.Generator) -> str:
    """A sentence of about `count` words of usual length; with `opening` it may begin with a filler."""
    sentence = ""
    if opening and generator.random() < 0.5:
        sentence = OPENERS[generator.integers(len(OPENERS))] + ", "
    while count * CHARACTERS_PER_WORD - len(sentence) > generator.uniform(30, 60):
        sentence += _clause(generator.uniform(10, 30), generator) + " and "
    return sentence + _clause(count * CHARACTERS_PER_WORD - len(sentence) - 1, generator) + "."


def _clause(length: float, generator: np.random.Generator) -> str:
    """One of the clauses whose length in characters is nearest."""
    by_length = _clauses()
    nearest = by_length[min(by_length, key=lambda known: abs(known - length))]
    return nearest[generator.integers(len(nearest))]


@cache
def _clauses() -> dict[int, list[str]]:
    by_length: dict[int, list[str]] = {}
    for subject, predicate, time in product(SUBJECTS, PREDICATES, ("", *TIMES)):
        clause = " ".join((subject, predicate, time)).rstrip()
        by_length.setdefault(len(clause), []).append(clause)
    return by_length


@dataclass(frozen=True)
class Expression:
    """How a phrase is said.

    Attributes:
        pitch: added to the speaker's, in eSpeak's steps; 50 are an octave.
        pitch_range: of the melody, 0 to 100.
        rate: factor of the speaker's rate.
        effort: -0.5 (soft, dull) to 0.5 (strained, bright).
        roughness, lilt: depth of a modulation of loudness at 70 Hz and at 6 Hz, 0 to 1.
        gain_db: loudness beside the neutral one.
    """

    pitch: float = 0.0
    pitch_range: float = 50.0
    rate: float = 1.0
    effort: float = 0.0
    roughness: float = 0.0
    lilt: float = 0.0
    gain_db: float = 0.0


def express(valence: float, arousal: float) -> Expression:
    """The rule that renders an emotion; both in [0, 1], 0.5 is neutral."""
    return Expression(
        pitch=55 * (arousal - 0.5),
        pitch_range=10 + 80 * valence,
        rate=0.7 + 0.6 * arousal,
        effort=arousal - 0.5,
        roughness=1.5 * max(0.0, 0.55 - valence),
        lilt=1.5 * max(0.0, valence - 0.45),
        gain_db=10 * (arousal - 0.5),
    )


NEUTRAL = replace(express(0.5, 0.5), roughness=0.0, lilt=0.0)


def say(
    synthesizer: Synthesizer, text: str, speaker: Speaker, expression: Expression, generator: np.random.Generator
) -> np.ndarray:
    """One phrase; (samples,) float32 at 16 kHz."""
    speech = synthesizer.speak(
        text,
        voice=speaker.voice,
        rate=speaker.rate * expression.rate,
        pitch=float(np.clip(speaker.pitch + expression.pitch + generator.normal(0, 4), 0, 99)),
        pitch_range=float(np.clip(expression.pitch_range, 0, 99)),
        formants=speaker.formants,
    )
    # Vocal effort: the first difference lifts high frequencies.
    effort = expression.effort
    speech = speech + effort * np.diff(speech, prepend=speech[:1]) * (5.0 if effort > 0 else 1.0)
    seconds = np.arange(speech.size) / SAMPLING_RATE
    for hertz, depth in ((70, expression.roughness), (6, expression.lilt)):
        speech = speech * (1 - depth * (0.5 + 0.5 * np.sin(2 * np.pi * hertz * seconds)))
    rms = max(float(np.sqrt(np.mean(speech**2))), 1e-4)
    return (speech * 0.06 * 10 ** (expression.gain_db / 20) / rms).astype(np.float32)
