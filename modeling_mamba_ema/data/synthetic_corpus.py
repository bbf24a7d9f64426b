"""SYNTHETIC spoken conversations whose emotion drifts from turn to turn.

Speech is synthesised (eSpeak NG), emotion is rendered by rule, and labels are the rule's own input. The corpus shows
that the package works from end to end; it says nothing about how real people sound.

What the rules make of a turn's latent (valence, arousal), both in [0, 1]:

- arousal: higher pitch, faster speech, more vocal effort (a brighter spectrum), louder;
- valence: a lively melody and lilting loudness (modulated at 6 Hz) when pleasant, a flat and rough voice (modulated at
  70 Hz) when unpleasant.

Two things make pooling and context worth having. In `stretch` turns only one phrase carries the emotion and the rest is
neutral. In `flat` turns nothing does, although the label follows the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from .atomic_write import atomic_write
from .synthetic_speech import SAMPLING_RATE, Synthesizer

TURNS_PER_CONVERSATION = (5, 8)  # lowest and highest
RENDERINGS = {"whole": 0.5, "stretch": 0.35, "flat": 0.15}  # share of turns


@dataclass(frozen=True)
class Speaker:
    """A voice of the synthesiser with its own neutral pitch (0-100) and speed (words a minute)."""

    name: str
    voice: str
    pitch: float
    rate: float


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

OPENERS = ("Well,", "Look,", "So,", "You know,", "Listen,", "Right,", "And then", "I mean,")
CORES = {
    "unpleasant": ("this is awful", "I cannot stand it", "you broke it again", "they lied to me", "it hurts so much"),
    "neutral": ("the train is at nine", "it is on the table", "we talked about it", "he called this morning"),
    "pleasant": ("that is wonderful", "I am so glad", "what a lovely day", "we won the game", "you made it"),
}
CLOSERS = ("I suppose.", "as I said.", "you see.", "this time.", "after all.", "on Monday.", "at home.", "anyway.")


@dataclass
class Turn:
    """One utterance with its labels.

    Attributes:
        waveform: (samples,) float32 at 16 kHz.
        rendering: "whole", "stretch" or "flat".
        salient: start and end in seconds of the phrase that carries the emotion; None where all or nothing does.
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
    waveform: np.ndarray


CARD = """---
pretty_name: Synthetic spoken conversations for Mamba-EMA
license: apache-2.0
tags:
- synthetic
- speech
- emotion
label_scale: [0, 1]
---

# SYNTHETIC spoken conversations

Made by `mamba-ema prepare synthetic --conversations {conversations} --seed {seed}` with eSpeak NG. Valence and
arousal drift from turn to turn and are rendered into the voice by rule. **No human speech and no human judgement is in
here:** results on this corpus show that software works, not how well emotion is recognised.

Labels lie on [0, 1]. Splits share no speaker.
"""


def write_synthetic_corpus(folder: Path, conversations: int, seed: int) -> str:
    """Write WAV and FLAC files, `metadata.jsonl` in the normal form, `corpus.json`, and a dataset card.

    The same arguments give the same bytes. Audio that an earlier `metadata.jsonl` lists is removed, nothing else is.

    Args:
        folder: created if need be.
        conversations, seed: see [`synthesise_corpus`].

    Returns:
        A line a split: its turns and minutes.
    """
    metadata = folder / "metadata.jsonl"
    for line in metadata.read_text(encoding="utf-8").splitlines() if metadata.exists() else ():
        earlier = (folder / json.loads(line)["file_name"]).resolve()
        if earlier.is_relative_to(folder.resolve()):
            earlier.unlink(missing_ok=True)
    lines: list[str] = []
    seconds: dict[str, list[float]] = {split: [] for split in SPEAKERS}
    for turn in synthesise_corpus(conversations, seed):
        file = Path(turn.split, turn.conversation_id, f"turn{turn.turn:02d}.{'flac' if turn.turn % 2 else 'wav'}")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        sf.write(folder / file, turn.waveform, SAMPLING_RATE, subtype="PCM_16")
        start, end = turn.salient or (None, None)
        facts = ("conversation_id", "turn", "speaker", "split", "valence", "arousal", "text", "rendering")
        row = {"file_name": file.as_posix(), **{fact: getattr(turn, fact) for fact in facts}}
        lines.append(json.dumps({**row, "salient_start": start, "salient_end": end}) + "\n")
        seconds[turn.split].append(turn.waveform.size / SAMPLING_RATE)
    scale = {"label_ranges": {"valence": [0, 1], "arousal": [0, 1]}}
    card = CARD.format(conversations=conversations, seed=seed)
    for name, text in (("README.md", card), ("corpus.json", json.dumps(scale)), (metadata.name, "".join(lines))):
        with atomic_write(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return "\n".join(f"{split:<10} {len(s):>4} turns  {sum(s) / 60:5.1f} min" for split, s in seconds.items())


def synthesise_corpus(conversations: int, seed: int) -> Iterator[Turn]:
    """Conversations turn by turn, the same for the same arguments; no speaker is in two splits.

    Args:
        conversations: how many, over all splits; at least 3.
        seed: of everything that is drawn.
    """
    if conversations < 3:
        raise ValueError(f"conversations is {conversations}, but each of the 3 splits needs one")
    counts = {split: max(1, round(share * conversations)) for split, share in SPLIT_SHARES.items()}
    counts["train"] = conversations - counts["validation"] - counts["test"]
    synthesizer = Synthesizer()
    for split_index, (split, count) in enumerate(counts.items()):
        for index in range(count):
            generator = np.random.default_rng([seed, split_index, index])
            pair = generator.permutation(len(SPEAKERS[split]))[:2]
            speakers = [SPEAKERS[split][i] for i in pair]
            yield from _conversation(f"{split}_{index:03d}", split, speakers, synthesizer, generator)


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


def _conversation(
    conversation_id: str,
    split: str,
    speakers: list[Speaker],
    synthesizer: Synthesizer,
    generator: np.random.Generator,
) -> Iterator[Turn]:
    turns = int(generator.integers(TURNS_PER_CONVERSATION[0], TURNS_PER_CONVERSATION[1] + 1))
    for turn, (valence, arousal) in enumerate(emotional_walk(turns, generator)):
        rendering = str(generator.choice(list(RENDERINGS), p=list(RENDERINGS.values())))
        speaker = speakers[turn % 2]
        mood = "unpleasant" if valence < 1 / 3 else "neutral" if valence < 2 / 3 else "pleasant"
        phrases = [
            str(generator.choice(OPENERS)),
            str(generator.choice(CORES["neutral" if rendering == "flat" else mood])),
            str(generator.choice(CLOSERS)),
        ]
        emotional = {"whole": (True, True, True), "stretch": (False, True, False), "flat": (False,) * 3}[rendering]
        pieces = [
            say(synthesizer, phrase, speaker, valence if feels else 0.5, arousal if feels else 0.5, generator)
            for phrase, feels in zip(phrases, emotional)
        ]
        starts = np.cumsum([0, *(piece.size for piece in pieces)]) / SAMPLING_RATE
        waveform = np.concatenate(pieces)
        level = 10 ** (generator.uniform(-6, 0) / 20)  # distance to the microphone
        noise = generator.normal(0, 0.002, waveform.size)
        yield Turn(
            conversation_id=conversation_id,
            turn=turn,
            split=split,
            speaker=speaker.name,
            text=" ".join(phrases),
            valence=round(float(valence), 4),
            arousal=round(float(arousal), 4),
            rendering=rendering,
            salient=(round(float(starts[1]), 3), round(float(starts[2]), 3)) if rendering == "stretch" else None,
            waveform=np.clip(level * waveform + noise, -1, 1).astype(np.float32),
        )


def say(
    synthesizer: Synthesizer,
    text: str,
    speaker: Speaker,
    valence: float,
    arousal: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """One phrase with its emotion rendered; (samples,) float32 at 16 kHz, with a short pause behind it."""
    speech = synthesizer.speak(
        text,
        voice=speaker.voice,
        rate=speaker.rate * (0.7 + 0.6 * arousal),
        pitch=np.clip(speaker.pitch - 25 + 55 * arousal + generator.normal(0, 4), 0, 99),
        pitch_range=np.clip(10 + 80 * valence, 0, 99),
    )
    # Vocal effort: the first difference lifts high frequencies.
    effort = arousal - 0.5
    speech = speech + effort * np.diff(speech, prepend=speech[:1]) * (5.0 if effort > 0 else 1.0)
    # An unpleasant voice is rough, a pleasant one lilts: loudness modulated fast or slowly.
    seconds = np.arange(speech.size) / SAMPLING_RATE
    for hertz, depth in ((70, max(0.0, 0.55 - valence)), (6, max(0.0, valence - 0.45))):
        speech = speech * (1 - 1.5 * depth * (0.5 + 0.5 * np.sin(2 * np.pi * hertz * seconds)))
    speech = speech / max(float(np.sqrt(np.mean(speech**2))), 1e-4) * 0.06 * 10 ** (10 * (arousal - 0.5) / 20)
    pause = np.zeros(int(SAMPLING_RATE * 0.06))
    return np.concatenate([speech, pause]).astype(np.float32)
