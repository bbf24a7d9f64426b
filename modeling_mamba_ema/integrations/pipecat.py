"""Pipecat: a voice agent's language model reads how the user sounded."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np

from ..feature_extraction_mamba_ema import MIN_SAMPLES, SAMPLING_RATE
from ..inference import EmotionTracker, TurnEmotion

try:
    from pipecat.frames.frames import Frame, LLMMessagesAppendFrame
    from pipecat.processors.audio.audio_buffer_processor import AudioBufferProcessor, TurnAudioData
    from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
except ImportError as error:
    raise ImportError("this module needs Pipecat 1.8 or newer: pip install pipecat-ai") from error


class EmotionProcessor(FrameProcessor):
    """Adds the emotion of each of the user's turns to the context, as a message that starts no answer by itself.

    It stands between the audio buffer and the user's context aggregator:

        buffer = AudioBufferProcessor(enable_turn_audio=True, auto_start_recording=True)
        emotion = EmotionProcessor(EmotionTracker.from_pretrained(model), buffer)
        Pipeline([transport.input(), buffer, stt, emotion, context.user(), llm, tts, transport.output()])

    Args:
        tracker: of this call; one that has heard nothing.
        buffer: whose event `on_user_turn_audio` brings the turns.
        speaker: the user's name in the tracker.
    """

    def __init__(self, tracker: EmotionTracker, buffer: AudioBufferProcessor, speaker: str = "user", **options: Any):
        super().__init__(**options)
        self._tracker, self._speaker = tracker, speaker
        self._hearing = asyncio.Lock()  # turns in the order in which they ended
        buffer.add_event_handler("on_user_turn_audio", self._on_user_turn_audio)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Let every frame pass."""
        await super().process_frame(frame, direction)
        await self.push_frame(frame, direction)

    async def _on_user_turn_audio(self, _: AudioBufferProcessor, turn: TurnAudioData) -> None:
        async with self._hearing:
            heard = await asyncio.to_thread(self._hear, turn)
        if heard is not None:
            message = {"role": "developer", "content": in_words(heard)}
            await self.push_frame(LLMMessagesAppendFrame([message], run_llm=False))

    def _hear(self, turn: TurnAudioData) -> TurnEmotion | None:
        """A turn that is longer than the model takes is heard in parts of one length, of which the last one counts."""
        samples = np.frombuffer(turn.audio, dtype="<i2").reshape(-1, turn.num_channels).mean(axis=1) / 2**15
        longest = turn.sample_rate * self._tracker.feature_extractor.max_seconds - 1
        heard = None
        for part in np.array_split(samples, max(1, math.ceil(len(samples) / longest))):
            if len(part) / turn.sample_rate > MIN_SAMPLES / SAMPLING_RATE:
                heard = self._tracker.update(part.astype(np.float32), turn.sample_rate, self._speaker)
        return heard


def in_words(heard: TurnEmotion) -> str:
    """What the language model reads of a turn."""
    values = ", ".join(f"{label} {value:.2f}" for label, value in heard.values.items())
    if heard.low_level:
        return "The user's last turn was too quiet to say how it sounded."
    return f"How the user's last turn sounded, estimated from 0 to 1: {values}. {heard.reading}".strip()
