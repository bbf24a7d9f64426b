"""One visitor's conversation, and reading the turns they send, without anything of the page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..audio_files import MAX_CHANNELS, Recording, load_audio
from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError
from ..inference import EmotionTracker, TurnEmotion
from ..inference.segments import channel_speaker

MAX_TURNS = 500  # a visitor's numbers are kept in memory
MAX_NAME = 40  # characters of a speaker's name
SPEAKERS = ("speaker A", "speaker B")
AVERAGE, EACH = "their average", "each is a speaker"  # what may be done with the channels of a file
ONE_OF = {channel_speaker(number): number for number in range(1, MAX_CHANNELS + 1)}
CHANNELS = (AVERAGE, EACH, *ONE_OF)


class TurnError(ValueError):
    """A turn that cannot be scored; the message is a sentence for the person who sent it."""


@dataclass(frozen=True)
class Conversation:
    """What the page remembers of a visitor: a value; `add` gives a new one.

    Attributes:
        tracker: the model's state after the last turn. The model itself is shared by all visitors.
        turns: the results so far, without the attention.
        channels: one of `CHANNELS`.
    """

    tracker: EmotionTracker
    turns: tuple[TurnEmotion, ...] = ()
    channels: str = AVERAGE

    def add(self, waveform: np.ndarray, speaker: str) -> tuple[Conversation, TurnEmotion]:
        """Hear one more turn, (samples,) float32 at 16 kHz.

        Returns:
            The conversation with that turn, and the turn's result with its attention.

        Raises:
            TurnError: a waveform the model cannot answer for, a bad name, or too many turns.
        """
        if not isinstance(speaker, str) or not 1 <= len(speaker.strip()) <= MAX_NAME:
            raise TurnError(f"Name the speaker in 1 to {MAX_NAME} characters.")
        if len(self.turns) >= MAX_TURNS:
            raise TurnError(f"This conversation has {MAX_TURNS} turns, as many as the page keeps. Start a new one.")
        tracker = self.tracker.copy()
        try:
            turn = tracker.update(waveform, SAMPLING_RATE, speaker.strip())
        except InvalidAudioError as error:
            raise TurnError(f"This turn cannot be scored: {error}.") from error
        return replace(self, tracker=tracker, turns=(*self.turns, turn.without_attention())), turn


def read_turn(path: str | None, max_seconds: float, channel: int | None = None) -> np.ndarray:
    """The audio of an uploaded file, (samples,) float32 at 16 kHz; its header is checked before anything is decoded.

    Raises:
        TurnError: no file, or one that cannot be used; the message holds no path.
    """
    with _in_words(path) as file:
        return load_audio(file, channel=channel, max_seconds=max_seconds)


def read_channels(path: str | None, max_seconds: float) -> list[tuple[np.ndarray, str]]:
    """Each channel of an uploaded file, as `read_turn` reads one, with the name of its speaker."""
    with _in_words(path) as file, Recording(file) as recording:
        numbers = recording.several_channels()
        recording.check_length(None, None, max_seconds)
        return [(recording.read(channel=number), channel_speaker(number)) for number in numbers]


@contextlib.contextmanager
def _in_words(path: str | None) -> Iterator[str]:
    if not path:
        raise TurnError("Record or upload a turn first.")
    if not Path(path).is_file():
        raise TurnError("The file is no longer on the server. Upload it again.")
    try:
        yield path
    except ValueError as error:  # AudioFileError is one
        raise TurnError(f"{error}.") from error
