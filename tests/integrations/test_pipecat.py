"""The processor in a real Pipecat pipeline, from the user's audio to the context of the language model."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("pipecat", reason="needs Pipecat: pip install pipecat-ai")

from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    InputAudioRawFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.audio.audio_buffer_processor import AudioBufferProcessor
from pipecat.workers.runner import WorkerRunner

from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.integrations.pipecat import EmotionProcessor, in_words
from tests.support.programs import HANGS

RATE, FRAME = 16_000, 3_200  # samples
LENGTHS = (RATE, RATE // 2, 31 * RATE)  # the last turn is longer than the model takes at once


def spoken(seed, samples):
    return (np.random.default_rng(seed).normal(0, 0.1, samples) * 2**15).clip(-(2**15), 2**15 - 1).astype("<i2")


class NewTurns(EmotionProcessor):
    """Says when a turn has been heard, so that the test waits for nothing else."""

    def __init__(self, *given):
        super().__init__(*given)
        self.number_of_turns = 0
        self.changed = asyncio.Condition()

    async def _on_user_turn_audio(self, *given):
        await super()._on_user_turn_audio(*given)
        async with self.changed:
            self.number_of_turns += 1
            self.changed.notify_all()


async def messages_of_a_call(model, turns):
    buffer = AudioBufferProcessor(enable_turn_audio=True, auto_start_recording=True)
    emotion = NewTurns(EmotionTracker.from_pretrained(model), buffer)
    context = LLMContext([{"role": "system", "content": "You are kind."}])
    pipeline = Pipeline([buffer, emotion, LLMContextAggregatorPair(context).user()])
    parameters = PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE)
    worker = PipelineWorker(pipeline, params=parameters, enable_turn_tracking=True, cancel_on_idle_timeout=False)
    started = asyncio.Event()

    @worker.event_handler("on_pipeline_started")
    async def on_pipeline_started(*_):
        started.set()

    async def call():
        await started.wait()
        for number, turn in enumerate(turns, start=1):
            await worker.queue_frame(UserStartedSpeakingFrame())
            for first in range(0, len(turn), FRAME):
                await worker.queue_frame(InputAudioRawFrame(turn[first : first + FRAME].tobytes(), RATE, 1))
            for frame in (UserStoppedSpeakingFrame, BotStartedSpeakingFrame, BotStoppedSpeakingFrame):
                await worker.queue_frame(frame())
            async with emotion.changed:
                await emotion.changed.wait_for(lambda number=number: emotion.number_of_turns == number)
        await worker.stop_when_done()

    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await asyncio.wait_for(asyncio.gather(runner.run(), call()), HANGS)
    return context.messages


def test_the_context_says_how_each_turn_sounded(saved_model):
    turns = [spoken(seed, samples) for seed, samples in enumerate(LENGTHS)]
    _, *messages = asyncio.run(messages_of_a_call(saved_model, turns))
    tracker = EmotionTracker.from_pretrained(saved_model)
    wanted = []
    for turn in turns:
        for part in np.array_split(turn, 1 + (len(turn) > 30 * RATE)):
            heard = tracker.update(part.astype(np.float32) / 2**15, RATE, "user")
        wanted.append({"role": "developer", "content": in_words(heard)})
    assert messages == wanted
    assert f"valence {heard.values['valence']:.2f}" in wanted[-1]["content"]
