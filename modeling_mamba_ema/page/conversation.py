"""One visitor's conversation, and reading the turns they send, without anything of the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..audio_files import AudioFileError, load_audio
from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError
from ..inference import EmotionTracker, TurnEmotion

MAX_TURNS = 500  # a visitor's numbers are kept in memory
MAX_NAME = 40  # characters of a speaker's name
SPEAKERS = ("speaker A", "speaker B")


class TurnError(ValueError):
    """A turn that cannot be scored; the message is a sentence for the person who sent it."""


@dataclass(frozen=True)
class Conversation:
    """What the page remembers of a visitor: a value; `add` gives a new one.

    Attributes:
        tracker: the model's state after the last turn. The model itself is shared by all visitors.
        turns: the results so far, without the attention.
    """

    tracker: EmotionTracker
    turns: tuple[TurnEmotion, ...] = ()

    def add(self, waveform: np.ndarray, speaker: str) -> tuple[Conversation, TurnEmotion]:
        """Hear one more turn.

        Args:
            waveform: (samples,) float32 at 16 kHz.
            speaker: a name.

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
        kept = TurnEmotion(**{**vars(turn), "attention": np.empty((0, 0), dtype=np.float32)})
        return Conversation(tracker, (*self.turns, kept)), turn


def read_turn(path: str | None, max_seconds: float) -> np.ndarray:
    """The audio of an uploaded file, whose header is checked before anything is decoded.

    Args:
        path: of the uploaded file; None where nothing was sent.
        max_seconds: longest turn.

    Returns:
        (samples,) float32 at 16 kHz.

    Raises:
        TurnError: no file, or one that cannot be used; the message holds no path.
    """
    if not path:
        raise TurnError("Record or upload a turn first.")
    if not Path(path).is_file():
        raise TurnError("The file is no longer on the server. Upload it again.")
    try:
        return load_audio(path, max_seconds=max_seconds)
    except AudioFileError as error:
        raise TurnError(f"{error}.") from error
