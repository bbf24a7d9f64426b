"""Callbacks of training: epochs, progress, signals, complete checkpoints, best weights in memory."""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from .checkpoints import seal_checkpoint

logger = logging.getLogger(__name__)

LOG_FILE_INTERVAL = 60.0  # seconds between updates of the progress bar where standard error is no terminal


class SetEpoch(TrainerCallback):
    """Tells datasets and samplers that draw anew in every epoch which one begins."""

    def __init__(self, targets: Sequence[Any]):
        self.targets = targets

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for target in self.targets:
            target.set_epoch(int(state.epoch or 0))


class Progress(ProgressCallback):
    """Trainer's progress bar, with the last loss beside it instead of a dictionary below it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training", refresh=False)
            self.training_bar.unit = " steps"
            if not sys.stderr.isatty():
                self.training_bar.mininterval = LOG_FILE_INTERVAL

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"epoch {state.epoch:.1f}, loss {logs['loss']:.3f}", refresh=False)


class EvaluationLog(TrainerCallback):
    """One line in the log for each evaluation."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not metrics or "eval_ccc" not in metrics or not state.is_world_process_zero:
            return
        ccc = {name.removeprefix("eval_ccc_"): value for name, value in metrics.items() if name.startswith("eval_ccc_")}
        with tqdm.external_write_mode(file=sys.stderr):  # not into the line of a progress bar
            by_label = ", ".join(f"{label} {value:.3f}" for label, value in ccc.items())
            mean = f"mean {metrics['eval_ccc']:.3f}; RMSE {metrics['eval_rmse']:.3f} on a scale from 0 to 1"
            logger.info("epoch %.3g: CCC %s, %s (%d turns)", state.epoch, by_label, mean, metrics["eval_num_turns"])


class StopOnSignal(TrainerCallback):
    """After SIGTERM or Ctrl-C, which is noted in `received`: finish the step, save a checkpoint, stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._stopping = False
        self._alone = True
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 0 if self.received is None else 128 + self.received

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._alone = args.world_size == 1
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1 and dist.is_initialized():
            # The signal reaches the processes at different steps, but all must save and stop at the same one.
            flag = torch.tensor([float(self.received or 0)], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.received = signal.Signals(int(flag.item())) if flag.item() else None
        if self.received is not None:
            self._stopping = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stopping:
            # The epoch has not ended. An evaluation here would take time, and count for the best checkpoint and for
            # patience, which the uninterrupted run does not do.
            control.should_evaluate = control.should_save = control.should_log = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT and self._alone:
            # Ctrl-C again. Launchers of several processes may pass on one key press twice.
            self._restore_handlers()
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        logger.warning("%s: a checkpoint is saved after this step, then training stops", self.received.name)


class SealCheckpoints(TrainerCallback):
    """Completes every checkpoint that Trainer has written, and only then removes old ones, but for as many as
    `save_total_limit`, the best and the newest."""

    def __init__(self, save_total_limit: int | None):
        self.save_total_limit = save_total_limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every process has written its random state
        if args.should_save:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate_checkpoints(
                output_dir=args.output_dir,
                save_total_limit=self.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
            )
        PartialState().wait_for_everyone()


class KeepBestWeights(TrainerCallback):
    """Copies the trainable parameters whenever an evaluation is the best so far, by mean CCC: for trainings that take
    less time than saving a checkpoint does."""

    def __init__(self) -> None:
        self.best: float | None = None  # mean CCC; None while no evaluation gave a number
        self.weights: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        ccc = (metrics or {}).get("eval_ccc", float("nan"))
        if ccc == ccc and (self.best is None or ccc > self.best):  # NaN is not equal to itself
            self.best = ccc
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the best weights back; `ValueError` where no evaluation gave a CCC that is a number."""
        if self.best is None:
            raise ValueError("no evaluation gave a CCC that is a number, so there are no best weights")
        parameters = dict(model.named_parameters())
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)
