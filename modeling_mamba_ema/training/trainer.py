"""A Trainer that knows the encoder from the rest, and measures CCC over the whole evaluation set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..metrics import ccc_metric_path
from ..model_inputs import MISSING_LABEL

logger = logging.getLogger(__name__)


class MambaEMATrainer(Trainer):
    """transformers' Trainer with a learning rate of its own for WavLM.

    Args:
        encoder_learning_rate: for WavLM's parameters; None: the same as everywhere.
        args, kwargs: as for `Trainer`.
    """

    def __init__(self, *args: Any, encoder_learning_rate: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.encoder_learning_rate = encoder_learning_rate

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            encoder_rate = self.encoder_learning_rate
            groups = parameter_groups(
                model,
                weight_decay=self.args.weight_decay,
                learning_rate=self.args.learning_rate,
                encoder_learning_rate=self.args.learning_rate if encoder_rate is None else encoder_rate,
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Evaluation sees every turn: Trainer would leave out the last batch there too."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last


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
