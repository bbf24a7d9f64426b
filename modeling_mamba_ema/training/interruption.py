"""Pre-emption: SIGTERM ends training with a complete checkpoint."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_CODE = 128 + signal.SIGTERM


class StopOnSigterm(TrainerCallback):
    """After SIGTERM: finish the step, save a checkpoint, stop. `interrupted` tells afterwards."""

    def __init__(self) -> None:
        self.interrupted = False
        self._stopping = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._previous = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1 and dist.is_initialized():
            # The signal reaches the processes at different steps, but all must save and stop at the same one.
            flag = torch.tensor([float(self.interrupted)], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.interrupted = bool(flag.item())
        if self.interrupted:
            self._stopping = control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stopping:
            # The epoch has not ended. An evaluation here would take time, and count for the best checkpoint and for
            # patience, which the uninterrupted run does not do.
            control.should_evaluate = control.should_save = control.should_log = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_: Any) -> None:
        self.interrupted = True
