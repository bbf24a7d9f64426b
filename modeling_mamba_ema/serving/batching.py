"""Turns of different sessions, heard in one pass of the model."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from ..feature_extraction_mamba_ema import SAMPLING_RATE
from ..inference import EmotionTracker, TurnEmotion
from .errors import Refusal


class _Turn(NamedTuple):
    tracker: EmotionTracker
    waveform: np.ndarray
    speaker: str | None
    result: Future[TurnEmotion]


class Batcher:
    """A thread that runs the model; each pass takes the turns that wait.

    Args:
        max_turns: of a pass. With 1, a turn's numbers do not depend on what others say, to the bit; with more, they
            agree within 2e-5.
        max_wait: seconds that a turn waits for others to join its pass.
        max_waiting: turns that may wait; the next one is refused.
        observe: called with the number of turns of each pass.
    """

    def __init__(self, max_turns: int, max_wait: float, max_waiting: int, observe: Callable[[int], None]):
        self._max_turns, self._max_wait, self._observe = max_turns, max_wait, observe
        self._turns: queue.Queue[_Turn | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    async def hear(self, tracker: EmotionTracker, waveform: np.ndarray, speaker: str | None) -> TurnEmotion:
        """`EmotionTracker.update` of a waveform (samples,) at 16 kHz, in one of the next passes.

        Args:
            tracker: of the session, in no other call meanwhile.

        Raises:
            Refusal: too many turns wait.
            InvalidAudioError: as `EmotionTracker.update`; the other turns of the pass are not touched by it.
        """
        result: Future[TurnEmotion] = Future()
        try:
            self._turns.put_nowait(_Turn(tracker, waveform, speaker, result))
        except queue.Full:
            raise Refusal(503, "too many turns wait for the model; send the turn again later") from None
        return await asyncio.wrap_future(result)

    def close(self) -> None:
        """Finish the turns that wait, then stop."""
        self._turns.put(None)
        self._thread.join()

    def _run(self) -> None:
        stopped = False
        while not stopped:
            turns, stopped = self._next_pass()
            turns = [turn for turn in turns if turn.result.set_running_or_notify_cancel()]
            if turns:
                self._observe(len(turns))
                _hear(turns)

    def _next_pass(self) -> tuple[list[_Turn], bool]:
        """The turns of a pass, and whether it is the last."""
        turns: list[_Turn] = []
        latest = 0.0
        while len(turns) < self._max_turns:
            try:
                turn = self._turns.get(timeout=max(latest - time.monotonic(), 0) if turns else None)
            except queue.Empty:
                break
            if turn is None:
                return turns, True
            if not turns:
                latest = time.monotonic() + self._max_wait
            turns.append(turn)
        return turns, False


def _hear(turns: list[_Turn]) -> None:
    try:
        heard = EmotionTracker.update_batch([turn[:3] for turn in turns], SAMPLING_RATE)
    except Exception as error:
        if len(turns) == 1:
            turns[0].result.set_exception(error)
        else:  # no session has advanced: find out whose turn it was
            for turn in turns:
                _hear([turn])
        return
    for turn, emotion in zip(turns, heard):
        turn.result.set_result(emotion)
