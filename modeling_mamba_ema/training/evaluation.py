"""Evaluation: metrics and tables of predictions, and conversations that are longer than a batch can hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import EvalPrediction, Trainer

from ..ccc_loss import MISSING_LABEL
from ..configuration_mamba_ema import MambaEMAConfig
from ..conversation_encoder import ConversationState
from ..data.dataset import ConversationDataset
from ..metrics.ccc.ccc import CCC
from ..metrics.confidence import add_intervals, coverage, spread_metrics
from ..pooling import length_mask

# Inputs of the model with turns in their second dimension.
_BY_TURN = ("input_values", "attention_mask", "turn_mask", "speaker_ids", "frame_values", "frame_mask")
_NO_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


# metrics and predictions


def ccc_of_predictions(labels: Sequence[str], intervals: bool = False) -> Any:
    """A `compute_metrics` for Trainer: the `ccc` metric over all turns of the evaluation set, on the unit scale.

    A label that the set has for fewer than two turns is left out, and nothing is measured where that holds for all.
    Spreads that stand behind the values are not measured here. With `intervals`, 95 % intervals over conversations are
    added; then every item must be a whole conversation.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions, references = (
            np.asarray(values)[..., : len(labels)] for values in (prediction.predictions, prediction.label_ids)
        )
        # Trainer pads what it gathers with -100; turns that are not there have no prediction (NaN) and no label.
        known = np.isfinite(predictions).all(axis=-1, keepdims=True) & (references != MISSING_LABEL)
        measured = np.flatnonzero(known.sum(axis=(0, 1)) >= 2)
        if not len(measured):
            return {}
        is_measured = known[..., measured].any(axis=-1)
        conversations = np.broadcast_to(np.arange(len(references))[:, None], is_measured.shape)[is_measured]
        return CCC().compute(
            predictions=predictions[is_measured][:, measured],
            references=references[is_measured][:, measured],
            label_names=[labels[int(column)] for column in measured],
            conversation_ids=conversations.tolist() if intervals else None,
        )

    return compute


def measure(
    trainer: Trainer, dataset: ConversationDataset, config: MambaEMAConfig
) -> tuple[dict[str, float], pd.DataFrame]:
    """Predict whole conversations.

    Returns:
        The metrics of [`ccc_of_predictions`] with intervals, of [`coverage`] and of [`spread_metrics`], and the table
        of [`prediction_table`], for a model with intervals with the columns of [`add_intervals`].
    """
    trainer.compute_metrics = ccc_of_predictions(config.labels, intervals=True)
    predicted = trainer.predict(dataset)
    metrics = {name.removeprefix("test_"): value for name, value in (predicted.metrics or {}).items()}
    table = add_intervals(prediction_table(np.asarray(predicted.predictions), dataset, config), config)
    measured = {name: value for name, value in metrics.items() if name not in _NO_METRICS}
    return measured | coverage(table, config) | spread_metrics(table, config), table


def prediction_table(predictions: np.ndarray, dataset: ConversationDataset, config: MambaEMAConfig) -> pd.DataFrame:
    """One row a turn and label.

    Args:
        predictions: (items, turns, labels) on the unit scale, in the dataset's order; padding is ignored. Of a model
            that predicts the spread, (items, turns, 2 labels).
        dataset: of whole conversations or windows.

    Returns:
        Columns `file_name`, `conversation_id`, `turn`, `position` (0 is the conversation's first turn), `label`,
        `reference` (NaN where the corpus has none) and `prediction`, both on the unit scale. Where a label has another
        scale, `reference_value` and `prediction_value` are on it, and `scale` names it, such as "1 to 7". Of a model
        that predicts the spread, `reference_spread` and `spread`, too.
    """
    rows, labels = dataset.rows, config.labels
    indices = np.concatenate(dataset.items)  # (turns,)
    turns = rows.select_columns(["file_name", "conversation_id", "turn"]).to_pandas().iloc[indices]
    turns["position"] = turns.groupby("conversation_id", sort=False).cumcount()
    targets = [np.asarray(rows[name][:], dtype=np.float64)[indices] for name in config.target_columns]
    references = np.stack(targets, axis=1)
    references = np.where(references == MISSING_LABEL, np.nan, references)
    valid = np.concatenate([predictions[item, : len(part)] for item, part in enumerate(dataset.items)])
    table = turns.iloc[np.repeat(np.arange(len(turns)), len(labels))].reset_index(drop=True)
    table["label"] = labels * len(turns)
    names = [("reference", "prediction"), ("reference_spread", "spread")][: 1 + config.predict_spread]
    for number, pair in enumerate(names):
        columns = slice(number * len(labels), (number + 1) * len(labels))
        for name, values in zip(pair, (references, valid)):
            table[name] = values[:, columns].astype(np.float64).ravel()
    ranges = [config.label_range(label) for label in labels]
    if any(scale != (0.0, 1.0) for scale in ranges):
        low, high = np.array(ranges * len(turns)).T
        for number, pair in enumerate(names):
            for name in pair:
                table[f"{name}_value"] = (low if number == 0 else 0) + (high - low) * table[name]
        table["scale"] = [f"{low:g} to {high:g}" for low, high in ranges] * len(turns)
    return table


def save_predictions(table: pd.DataFrame, path: Path) -> None:
    """Write as CSV or Parquet, as the name ends."""
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False, float_format="%.9g")  # as many digits as float32 has
    else:
        raise ValueError(f"{path.name} must end with .csv or .parquet")


def describe_metrics(split: str, metrics: Mapping[str, float], config: MambaEMAConfig) -> str:
    """Some lines for people."""
    labels = config.labels
    if "ccc" not in metrics:
        return f"{split}: no label has two turns to measure on; predictions only"
    lines = [f"{split}: {metrics['num_turns']:.0f} turns of {metrics['num_conversations']:.0f} conversations"]
    for title, name in [*((f"CCC {label}", f"ccc_{label}") for label in labels), ("CCC mean", "ccc")]:
        if name not in metrics:
            lines.append(f"  {title:<16} no labels")
            continue
        lines.append(f"  {title:<16} {metrics[name]:.3f}{_interval(metrics, name)}")
    lines.append(f"  {'RMSE, MAE':<16} {metrics['rmse']:.3f}, {metrics['mae']:.3f}  (on a scale from 0 to 1)")
    covered = [
        f"{label} {100 * metrics[f'coverage_{label}']:.0f} %" for label in labels if f"coverage_{label}" in metrics
    ]
    if covered:
        lines.append(f"  coverage of the {100 * config.interval_level:.0f} % intervals: {', '.join(covered)}")
    for kind, text in (
        ("spread_ccc", "spread of the raters, CCC {}"),
        ("error_with_spread", "error of {} with its spread, rank correlation"),
    ):
        for label in labels:
            if (name := f"{kind}_{label}") in metrics:
                lines.append(f"  {text.format(label)} {metrics[name]:.3f}{_interval(metrics, name)}")
    return "\n".join(lines)


def _interval(metrics: Mapping[str, float], name: str) -> str:
    if f"{name}_low" not in metrics:  # of a single conversation
        return ""
    return f"  (95 % interval {metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})"


# Long conversations. In evaluation, chunk by chunk gives the numbers of the whole conversation. In training, the turns
# before a window only make the state it starts from: no gradient flows into them, and they cost no memory for one.


def predict_in_chunks(model: nn.Module, inputs: Mapping[str, Any], turns_per_chunk: int) -> torch.Tensor:
    """Predictions of whole conversations, with the memory of a few turns.

    Args:
        inputs: a batch of conversations as the collator makes it, whole or `in_chunks` of this size, with `turn_mask`
            (batch, turns); labels are ignored.
        turns_per_chunk: turns of each conversation that go through the model at once.

    Returns:
        (batch, turns, labels) as [`side_by_side`], NaN at turns that are not there.
    """
    predictions, _ = _run(model, inputs, turns_per_chunk)
    return predictions


def side_by_side(outputs: Mapping[str, Any]) -> torch.Tensor:
    """Logits (..., labels) of the model's outputs, or of one that predicts the spread (..., 2 labels): the spread
    behind the logits."""
    return torch.cat([outputs[name] for name in ("logits", "spread") if outputs.get(name) is not None], dim=-1)


def state_after(model: nn.Module, inputs: Mapping[str, Any], turns_per_chunk: int) -> ConversationState | None:
    """The detached state of each conversation after all its turns; None for a model without context. Arguments as for
    [`predict_in_chunks`]; a row of `turn_mask` may be all zeros, and has the state of a conversation that has not
    begun."""
    with torch.no_grad():
        _, states = _run(model, inputs, turns_per_chunk)
    known = next((state for state in states if state is not None), None)
    if known is None:
        return None
    empty = ConversationState.from_state_dict(
        {name: torch.zeros_like(value) for name, value in known.state_dict().items()}
    )
    return ConversationState.stack([empty if state is None else state for state in states]).detach()


def start_from_context(
    model: nn.Module, inputs: Mapping[str, Any], context_turns: torch.Tensor, turns_per_chunk: int
) -> dict[str, Any]:
    """Inputs in which the first turns of each row, `context_turns` (batch,) many, are no longer there, but the state
    they leave behind is; a batch with `turn_mask` and `labels`. The others as for [`predict_in_chunks`]."""
    present = inputs["turn_mask"].bool()
    before = present & length_mask(context_turns, present.shape[1])
    window = {**inputs, "turn_mask": (present & ~before).to(inputs["turn_mask"].dtype)}
    window["labels"] = inputs["labels"].masked_fill(before.unsqueeze(-1), MISSING_LABEL)
    if bool(before.any()):
        window["conversation_state"] = state_after(model, {**inputs, "turn_mask": before}, turns_per_chunk)
    return window


def _run(
    model: nn.Module, inputs: Mapping[str, Any], turns_per_chunk: int
) -> tuple[torch.Tensor, list[ConversationState | None]]:
    present = inputs["turn_mask"].bool()
    predictions: Any = None
    states: list[ConversationState | None] = [None] * len(present)
    for start in range(0, present.shape[1], turns_per_chunk):
        chunk = slice(start, start + turns_per_chunk)
        rows = present[:, chunk].any(dim=1).nonzero().flatten()  # the conversations that go on
        if not len(rows):
            continue
        before = [state for state in (states[row] for row in rows.tolist()) if state is not None]
        of_chunk = {name: inputs[name][rows, chunk] for name in _BY_TURN if name in inputs}
        if "chunks" in inputs:
            of_chunk.update(inputs["chunks"][start // turns_per_chunk])
        outputs = model(
            **of_chunk,
            conversation_state=ConversationState.stack(before) if before else None,
            use_conversation_state=True,
        )
        predicted = side_by_side(outputs)
        if predictions is None:
            predictions = predicted.new_full((*present.shape, predicted.shape[-1]), torch.nan)
        predictions[rows, chunk] = predicted
        for position, row in enumerate(rows.tolist()):
            if outputs.conversation_state is not None:
                states[row] = outputs.conversation_state.select(position)
    return predictions, states
