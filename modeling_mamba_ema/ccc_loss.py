"""The CCC loss, and that of the raters' spread, the same on one process and on many.

The concordance correlation coefficient of a batch is no mean over its parts: the CCC of a shard is not a shard of the
CCC. So the predictions of all processes are gathered before the moments are taken.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from .pooling import values_are_known

MISSING_LABEL = -100.0
SCALE_TOLERANCE = 1e-4  # rounding of rescaled labels
MIN_SPREAD = 0.01  # of raters, on the unit scale: less than the step between two neighbours of any scale in use


def ccc_loss(
    predictions: torch.Tensor,
    labels: torch.Tensor,
    *,
    label_weights: Sequence[float] | None = None,
    mse_weight: float = 0.0,
    eps: float = 1e-8,
) -> torch.Tensor:
    r"""`1 - mean over labels of CCC`, over all turns of the global batch.

    .. math:: \rho_c = \frac{2\,\mathrm{cov}(y, t)}{\mathrm{var}(y) + \mathrm{var}(t) + (\bar y - \bar t)^2 + \epsilon}

    with population moments (Lin 1989, "A Concordance Correlation Coefficient to Evaluate Reproducibility"). The
    covariance form has finite gradients where the form over correlations has none: constant predictions or labels.

    While gradients are recorded and several processes train, every process must call this function, with any number
    of turns, zero included. All get the loss of the global batch, and gradients which, averaged over the processes as
    DistributedDataParallel does, are those of one process that holds the whole batch.

    Args:
        predictions: (turns, labels).
        labels: (turns, labels), -100 where a label is missing.
        label_weights: weight of each label in the mean; None: all the same.
        mse_weight: share w of the mean squared error, `(1 - w) (1 - CCC) + w MSE`.
        eps: keeps the quotient finite; far below the variance of labels with a range near 1.

    Returns:
        Scalar in float32 (float64 for float64 predictions). 0 is perfect agreement.

    Raises:
        ValueError: shapes that differ, a prediction or label that is not finite, or fewer than two labelled turns in
            the global batch while training, from which no CCC can be learned.

    Example:

    ```python
    >>> import torch
    >>> truth = torch.tensor([[0.1], [0.5], [0.9]])
    >>> round(float(ccc_loss(truth, truth)), 4)
    0.0
    >>> round(float(ccc_loss(1 - truth, truth)), 4)
    2.0

    ```
    """
    if predictions.shape != labels.shape or predictions.dim() != 2:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} must both be (turns, labels)"
        )
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    with torch.autocast(device_type=predictions.device.type, enabled=False):
        own_predictions = predictions.to(dtype)
        predictions, labels, world_size = _of_all_processes(own_predictions, labels.to(dtype))
        known = values_are_known(predictions)
        if known:
            _require_finite(predictions, labels)
        given = labels != MISSING_LABEL  # (turns, labels)
        enough = given.sum(dim=0) >= 2  # (labels,): a CCC needs two points
        if known and torch.is_grad_enabled() and not bool(enough.any()):
            raise ValueError(
                f"the batch has {predictions.shape[0]} turns and no label with two values; a CCC needs at least two. "
                "Put more turns into a batch, and drop a last batch that is smaller"
            )
        ccc = _concordance(predictions, labels, given, eps)  # (labels,)
        weights = ccc.new_ones(ccc.shape) if label_weights is None else ccc.new_tensor(label_weights)
        weights = weights * enough
        loss = 1.0 - (weights * ccc).sum() / weights.sum().clamp_min(torch.finfo(dtype).tiny)
        if mse_weight:
            squared = (predictions - labels).square().masked_fill(~given, 0.0).sum(dim=0) / given.sum(dim=0).clamp_min(
                1
            )
            mse = (weights * squared).sum() / weights.sum().clamp_min(torch.finfo(dtype).tiny)
            loss = (1.0 - mse_weight) * loss + mse_weight * mse
        return _for_averaged_gradients(loss, own_predictions, world_size)


def spread_loss(spreads: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Divergence of the raters' normal distribution from the predicted one around the same mean.

    .. math:: \mathrm{KL}\big(N(t, s^2 + \epsilon^2) \,\|\, N(t, \sigma^2 + \epsilon^2)\big)
              = \frac{1}{2}\left(q - 1 - \log q\right), \quad q = \frac{s^2 + \epsilon^2}{\sigma^2 + \epsilon^2}

    averaged over labels, and over the turns of the global batch where s is given. The spread as a second task beside
    the value is that of Han et al. 2017, "From Hard to Soft: Towards more Human-like Emotion Recognition by Modelling
    the Perception Uncertainty"; a divergence between the ratings' distribution and the predicted one as its loss that
    of Raj Prabhu et al. 2022, "End-to-End Label Uncertainty Modeling in Speech Emotion Recognition using Bayesian
    Neural Networks and Label Distribution Learning". With two means in it, :math:`\sigma` would grow with the model's
    own error, too. With one, the best prediction is the mean variance of the raters: :math:`\sigma^2 = E[s^2]`.

    Several processes call it as [`ccc_loss`].

    Args:
        spreads: (turns, labels), predicted standard deviations :math:`\sigma` on the unit scale.
        labels: (turns, labels), the raters' s, -100 where missing. :math:`\epsilon`, 0.01, keeps the quotient finite
            where all raters agree.

    Returns:
        Scalar in float32 (float64 for float64 predictions); 0 where every spread is right, and where none is given.
    """
    dtype = torch.promote_types(spreads.dtype, torch.float32)
    with torch.autocast(device_type=spreads.device.type, enabled=False):
        own = spreads.to(dtype)
        spreads, labels, world_size = _of_all_processes(own, labels.to(dtype))
        given = labels != MISSING_LABEL
        quotient = (labels.square() + MIN_SPREAD**2) / (spreads.square() + MIN_SPREAD**2)
        divergence = 0.5 * (quotient - 1.0 - quotient.log())  # (turns, labels)
        count = given.sum(dim=0)  # (labels,)
        by_label = divergence.masked_fill(~given, 0.0).sum(dim=0) / count.clamp_min(1)
        loss = by_label.sum() / (count > 0).sum().clamp_min(1)
        return _for_averaged_gradients(loss, own, world_size)


def _of_all_processes(predictions: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The turns of the global batch while gradients are recorded, else of this process, and how many processes."""
    if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return predictions, labels, 1
    return *_gather_turns(predictions, labels, dist.get_world_size()), dist.get_world_size()


def _for_averaged_gradients(loss: torch.Tensor, own_predictions: torch.Tensor, world_size: int) -> torch.Tensor:
    """DistributedDataParallel averages gradients over processes, while each process holds only its own turns' share of
    the gradient of the global loss. The value that is logged stays the loss itself. The last term, always 0, gives a
    process without turns a gradient of zeros, for which the others wait."""
    if world_size == 1:
        return loss
    return loss.detach() + world_size * (loss - loss.detach()) + 0.0 * own_predictions.sum()


def check_labels(labels: torch.Tensor, expected_shape: tuple[int, ...], names: list[str]) -> None:
    """Labels must have the logits' shape and lie on the unit scale; -100 marks a missing one.

    Where values cannot be looked at (see `values_are_known`), only the shape is checked.

    Raises:
        ValueError: wrong shape, NaN or infinite, or outside [0, 1].
    """
    if tuple(labels.shape) != expected_shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, but must be {expected_shape}: one value for each of {names}"
        )
    within = (labels >= -SCALE_TOLERANCE) & (labels <= 1 + SCALE_TOLERANCE)
    wrong = ~(within | (labels == MISSING_LABEL))  # True for NaN
    if values_are_known(labels) and bool(wrong.any()):
        position = wrong.nonzero()[0].tolist()
        value = float(labels[tuple(position)])
        if not math.isfinite(value):
            raise ValueError(f"the label at {position} is NaN or infinite; mark a missing label by {MISSING_LABEL:g}")
        raise ValueError(
            f"the label at {position} is {value:g}, but labels are on the unit scale [0, 1]; "
            f"rescale them as (label - low) / (high - low); {MISSING_LABEL:g} marks a missing one"
        )


def _concordance(predictions: torch.Tensor, labels: torch.Tensor, given: torch.Tensor, eps: float) -> torch.Tensor:
    """CCC of each label over the turns where it is given: (turns, labels) -> (labels,)"""
    count = given.sum(dim=0).clamp_min(1)
    mean_y = predictions.masked_fill(~given, 0.0).sum(dim=0) / count
    mean_t = labels.masked_fill(~given, 0.0).sum(dim=0) / count
    # Two passes: the mean of squares minus the square of the mean cancels in float32.
    dev_y = (predictions - mean_y).masked_fill(~given, 0.0)
    dev_t = (labels - mean_t).masked_fill(~given, 0.0)
    covariance = (dev_y * dev_t).sum(dim=0) / count
    variances = (dev_y.square() + dev_t.square()).sum(dim=0) / count
    return 2.0 * covariance / (variances + (mean_y - mean_t).square() + eps)


def _gather_turns(
    predictions: torch.Tensor, labels: torch.Tensor, world_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All processes' turns in the order of their ranks; only this process' own predictions carry a gradient."""
    own = torch.stack([predictions.detach(), labels], dim=-1)  # (turns, labels, 2)
    counts = [torch.zeros(1, dtype=torch.long, device=own.device) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([own.shape[0]], device=own.device))
    sizes = [int(count) for count in counts]
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: own.shape[0]] = own
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded)
    parts = [part[:size].unbind(dim=-1) for part, size in zip(gathered, sizes)]
    rank = dist.get_rank()
    everyone = [predictions if index == rank else part[0] for index, part in enumerate(parts)]
    return torch.cat(everyone), torch.cat([part[1] for part in parts])


def _require_finite(predictions: torch.Tensor, labels: torch.Tensor) -> None:
    if bool((torch.isfinite(predictions) & torch.isfinite(labels)).all()):  # one look, for which a GPU is waited for
        return
    for name, values in (("prediction", predictions), ("label", labels)):
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            row, column = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"{int((~finite).sum())} of {finite.numel()} {name}s are NaN or infinite, the first in turn {row} of "
                f"the batch, label {column}; nothing can be learned from them"
            )
