"""A Trainer that knows the encoder from the rest, and measures CCC over the whole evaluation set."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import evaluate
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints, seed_worker

from ..ccc_loss import MISSING_LABEL
from ..data.dataset import ConversationDataset
from ..metrics import ccc_metric_path
from .batch_sampler import AudioSecondsBatchSampler, seconds_of_turns
from .checkpoints import STAGING, seal_checkpoint
from .degenerate_batches import DegenerateBatches
from .long_conversations import predict_in_chunks, start_from_context
from .mixup import mixed_conversations
from .preflight import checkpoint_bytes, require_free_space

logger = logging.getLogger(__name__)


class MambaEMATrainer(Trainer):
    """Trainer with a learning rate of its own for WavLM, batches by seconds, and checkpoints that survive.

    Args:
        encoder_learning_rate: for WavLM's parameters; None: the same as everywhere.
        max_seconds_per_batch: fill training batches by seconds of audio, all processes together; None: by number of
            items.
        mixup_alpha: mix conversations of a training batch, see `mixed_conversations`; 0: do not.
        turns_per_chunk: turns of a conversation that are evaluated at once, with the state handed on; bounds memory,
            changes nothing.
        worker_timeout: seconds after which a worker process that has delivered no batch ends the run.
        args, kwargs: as for `Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        encoder_learning_rate: float | None = None,
        max_seconds_per_batch: float | None = None,
        mixup_alpha: float = 0.0,
        turns_per_chunk: int = 32,
        worker_timeout: float = 300.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.mixup_alpha = mixup_alpha
        self.turns_per_chunk = turns_per_chunk
        self.worker_timeout = worker_timeout
        self.degenerate_batches = DegenerateBatches()
        self.encoder_learning_rate = encoder_learning_rate
        self.max_seconds_per_batch = max_seconds_per_batch
        self._staging: Path | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after a look at the disk; a worker process that dies is told with the file it was reading."""
        if self.args.should_save and self.args.save_strategy != "no":
            folder = Path(str(self.args.output_dir))
            # While one is written, those that stay are still there: the best and the newest.
            count = max(1, (self.args.save_total_limit or 1) + 1 - len(list(folder.glob("checkpoint-*"))))
            require_free_space(folder, count * checkpoint_bytes(cast(nn.Module, self.model)), f"{count} checkpoints")
        with self._naming_files(self.train_dataset, self.eval_dataset):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        with self._naming_files(test_dataset):
            return super().predict(test_dataset, *args, **kwargs)

    @contextlib.contextmanager
    def _naming_files(self, *datasets: Any) -> Iterator[None]:
        """Where a worker process died or froze, say which file it was reading."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            readers = {pid: name for d in datasets if hasattr(d, "being_read") for pid, name in d.being_read().items()}
            frozen = str(error).startswith("DataLoader timed out")
            alive = {child.pid for child in multiprocessing.active_children()} | {os.getpid()}
            lost = [pid for pid in readers if frozen or pid not in alive]
            if not lost:
                raise
            if frozen:
                for pid in lost:  # a stopped process would not end with this one
                    os.kill(pid, signal.SIGCONT)
            files = ", ".join(Path(readers[pid]).name for pid in lost if readers[pid]) or "no file"
            # What still refers to the loader keeps its workers registered, and torch would raise anew at any moment.
            traceback.clear_frames(error.__traceback__)
            raise RuntimeError(
                f"step {self.state.global_step}: a process that reads audio {'froze' if frozen else 'died'} while it "
                f"was reading {files} ({type(error).__name__}: {error}). If it was killed, memory ran out most often"
            ) from error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, where the checkpoint that is resumed had already used up its patience.

        A run that is killed between its early stop and its results would else train on until the next evaluation.
        """
        for callback in self.callback_handler.callbacks:
            if (
                isinstance(callback, EarlyStoppingCallback)
                and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            ):
                self.control.should_training_stop = True
                return
        super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            encoder_rate = self.encoder_learning_rate
            groups = parameter_groups(
                model,
                weight_decay=self.args.weight_decay,
                learning_rate=self.args.learning_rate,
                encoder_learning_rate=self.args.learning_rate if encoder_rate is None else encoder_rate,
            )
            check_parameter_groups(model, groups)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Batches by seconds of audio where asked for."""
        if not isinstance(dataset := self.train_dataset, torch.utils.data.Dataset):
            raise ValueError("training needs a train_dataset")
        by_epoch: list[Any] = [dataset] if hasattr(dataset, "set_epoch") else []
        # After a resume in the middle of an epoch, accelerate's wrappers hide these from Trainer's set_epoch.
        self.pop_callback(SetEpoch)
        self.add_callback(SetEpoch(by_epoch))
        if self.max_seconds_per_batch is None:
            return self._with_timeout(super().get_train_dataloader())
        sampler = AudioSecondsBatchSampler(
            seconds_of_turns(cast(ConversationDataset, dataset)),
            self.max_seconds_per_batch,
            num_processes=self.args.world_size,
            seed=self.args.seed,
        )
        by_epoch.append(sampler)
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self.args.process_index),
        )
        return self._with_timeout(self.accelerator.prepare(loader))

    def _with_timeout(self, loader: DataLoader) -> DataLoader:
        if loader.num_workers > 0:  # Trainer has no argument for it, and a frozen worker would be waited for for ever
            getattr(loader, "base_dataloader", loader).timeout = self.worker_timeout  # within accelerate's wrapper
        return loader

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's loss; what is wrong with it is told with the conversations it came from."""
        inputs = dict(inputs)
        names = ", ".join(inputs.pop("conversation_ids", []))
        context_turns = inputs.pop("context_turns", None)
        if context_turns is not None:
            plain = self.accelerator.unwrap_model(model)
            inputs = start_from_context(plain, inputs, context_turns, self.turns_per_chunk)
        if model.training and "labels" in inputs:
            self.degenerate_batches.count(inputs["labels"])
        try:
            with self._mixed(model, inputs):
                result = super().compute_loss(model, inputs, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"step {self.state.global_step}: {error} (conversations of the batch: {names})") from error
        loss = result[0] if isinstance(result, tuple) else result
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"step {self.state.global_step}: the loss is {float(loss)}, nothing can be learned from it "
                f"(conversations of the batch: {names})"
            )
        return result

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Trainer's; a conversation of many turns goes through the model in chunks."""
        if inputs["turn_mask"].shape[1] <= self.turns_per_chunk:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        plain = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            logits = predict_in_chunks(plain, inputs, self.turns_per_chunk)
            labels, present = inputs["labels"], inputs["turn_mask"].bool()
            loss = plain.loss(logits[present], labels[present].to(logits.dtype))
        return loss, None if prediction_loss_only else logits, None if prediction_loss_only else labels

    @contextlib.contextmanager
    def _mixed(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
        """Mixup in training, drawn from seed, step and process, so that a resumed run draws the same."""
        if not self.mixup_alpha or not model.training:
            yield
            return
        random = np.random.default_rng([self.args.seed, self.state.global_step, self.args.process_index])
        projection = self.accelerator.unwrap_model(model).mamba_ema.projection
        with mixed_conversations(projection, inputs["labels"], self.mixup_alpha, random) as labels:
            inputs["labels"] = labels
            yield

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the share of batches from which some label learned nothing."""
        if "loss" in logs:
            logs["degenerate_batches"] = self.degenerate_batches.take_share()
        super().log(logs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise ValueError(
                f"step {self.state.global_step}: the gradient's norm is {float(norm)}; the weights are still as before "
                "this step. A smaller learning rate, or training without bf16, helps most often"
            )
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer writes the checkpoint into a folder of another name, which gets its own when all of it is there."""
        self._require_finite_weights()
        output = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        staging = output / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # what a run that was killed while saving left behind
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(output / f"checkpoint-{self.state.best_global_step}")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
                seal_checkpoint(staging / name, output / name)
        except Exception as error:  # torch, safetensors and Python have an exception each for a full disk
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            free = shutil.disk_usage(output).free / 1e9
            raise OSError(
                f"{name} could not be saved in {output} ({free:.3f} GB free): {error}. The checkpoints before it are "
                "as they were; with space on the disk, the same command goes on from the newest"
            ) from error
        finally:
            self._staging = None
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(output),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
            staging.rmdir()
        self.accelerator.wait_for_everyone()

    def _require_finite_weights(self) -> None:
        """A checkpoint with NaN could only be resumed to more of it."""
        for name, parameter in cast(nn.Module, self.model).named_parameters():
            if not hasattr(parameter, "full_tensor") and not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"step {self.state.global_step}: {name} holds NaN or infinity; no checkpoint is saved")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._every_batch():
            return self._with_timeout(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._every_batch():
            return self._with_timeout(super().get_test_dataloader(test_dataset))

    @contextlib.contextmanager
    def _every_batch(self) -> Iterator[None]:
        """Evaluation sees every turn: Trainer would leave out the last batch there too."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last


class SetEpoch(TrainerCallback):
    """Tells what draws anew in every epoch which one it is, before it is asked for batches."""

    def __init__(self, targets: Sequence[Any]):
        self.targets = targets

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for target in self.targets:
            target.set_epoch(int(state.epoch or 0))


class EvaluationLog(TrainerCallback):
    """One readable line for each evaluation."""

    def __init__(self, labels: Sequence[str]):
        self.labels = list(labels)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics is None or "eval_ccc" not in metrics or not state.is_world_process_zero:
            return
        by_label = "  ".join(f"{label} {metrics[f'eval_ccc_{label}']:.3f}" for label in self.labels)
        logger.info(
            "epoch %.1f: CCC %s  mean %.3f  RMSE %.3f (%d turns)",
            state.epoch,
            by_label,
            metrics["eval_ccc"],
            metrics["eval_rmse"],
            metrics["eval_num_turns"],
        )


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rate: float, encoder_learning_rate: float
) -> list[dict[str, Any]]:
    """Optimizer groups that hold every trainable parameter exactly once.

    WavLM's parameters get their own learning rate. Vectors (biases, norms) and what is marked `_no_weight_decay` (the
    decay rates and step sizes of Mamba-2) are not decayed.

    Raises:
        ValueError: nothing to train.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_encoder = ".wavlm." in f".{name}"
            decayed = parameter.dim() > 1 and not getattr(parameter, "_no_weight_decay", False)
            groups.setdefault((in_encoder, decayed), []).append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter; is everything frozen?")
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "lr": encoder_learning_rate if in_encoder else learning_rate,
        }
        for (in_encoder, decayed), parameters in groups.items()
    ]


def check_parameter_groups(model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    """Every trainable parameter must be in exactly one group; a layer left out would stay at its random start.

    Raises:
        ValueError: parameters that are in no group, or in several; the message names the first.
    """
    counts: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    wrong = [name for name, p in model.named_parameters() if counts.get(id(p), 0) != int(p.requires_grad)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} parameters are not in exactly one optimizer group (or are frozen and in one), the first is "
            f"{wrong[0]}"
        )


def flatten_turns(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turns that are there: predictions (turns, labels), references (turns, labels), index of their conversation."""
    predictions, references = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    # Trainer pads what it gathers with -100; turns that are not there have no prediction (NaN) and no label.
    there = np.isfinite(predictions).all(axis=-1) & (references != MISSING_LABEL).any(axis=-1)
    conversation = np.broadcast_to(np.arange(len(references))[:, None], there.shape)
    return predictions[there], references[there], conversation[there]


def ccc_of_predictions(labels: Sequence[str], intervals: bool = False) -> Any:
    """A `compute_metrics` for Trainer: the `ccc` metric over all turns of the evaluation set.

    Args:
        labels: names of the labels, in the model's order.
        intervals: add 95 % intervals over conversations; then every item must be a whole conversation.
    """
    # A training run reports to nobody: evaluate would tell a server about every load, of local metrics too.
    evaluate.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    metric = evaluate.load(ccc_metric_path())

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions, references, conversation = flatten_turns(prediction)
        return metric.compute(
            predictions=predictions,
            references=references,
            label_names=list(labels),
            conversation_ids=conversation.tolist() if intervals else None,
        )

    return compute
