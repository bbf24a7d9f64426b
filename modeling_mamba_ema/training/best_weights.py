"""The best evaluation's weights in memory, for trainings that take less time than saving a checkpoint does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class KeepBestWeights(TrainerCallback):
    """Copies the trainable parameters whenever an evaluation is the best so far, by mean CCC.

    Attributes:
        best: the best mean CCC; None while no evaluation gave a number.
        weights: the trainable parameters of that evaluation, by name.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self.weights: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        ccc = (metrics or {}).get("eval_ccc", float("nan"))
        if ccc == ccc and (self.best is None or ccc > self.best):  # NaN is not equal to itself
            self.best = ccc
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the best weights back.

        Raises:
            ValueError: no evaluation gave a CCC that is a number.
        """
        if self.best is None:
            raise ValueError("no evaluation gave a CCC that is a number, so there are no best weights")
        parameters = dict(model.named_parameters())
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)
