"""The one loss of all batches that are accumulated for a step of the optimizer.

The CCC of several batches is not the mean of their CCCs, so each batch goes through the model twice, as in Gao et al.
2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup". The first pass keeps the predictions
alone. They give the loss of all turns together, and its gradient with respect to each prediction. The second pass
repeats each batch, with the same dropout, and propagates its share of that gradient to the weights. Loss and gradient
are those of one large batch, with the memory of a small one and the time of one more forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

# Inputs of the model for a batch -> predictions and labels of the turns that are there, (turns, labels) each.
Predict = Callable[[Mapping[str, Any]], tuple[torch.Tensor, torch.Tensor]]


class RandomState:
    """The state of the generators that a forward pass draws from: torch's, on the CPU and on a device, and NumPy's,
    from which transformers' SpecAugment draws."""

    def __init__(self, device: torch.device):
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._device = None if self._module is None else self._module.get_rng_state()

    def restore(self) -> None:
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            self._module.set_rng_state(self._device)


class AccumulatedLoss:
    """The loss of several batches, and each batch's share of its gradient. The first pass runs at once.

    Args:
        predict: runs the model as it is, without what several processes wrap around it.
        loss: of predictions and labels, (turns, labels) each.
        device: where the model draws random numbers.

    Attributes:
        loss: scalar, without a graph.
        shares: of the batches whose second pass is to come: inputs, random state, gradient of the predictions.
    """

    def __init__(
        self,
        predict: Predict,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        batches: Sequence[Mapping[str, Any]],
        device: torch.device,
    ):
        states, predictions, labels = [], [], []
        # With gradients switched off other kernels may run, which round otherwise and draw other random numbers. So
        # they stay on, but nothing is kept for them.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _refuse_backward):
            for batch in batches:
                states.append(RandomState(device))
                predicted, given = predict(batch)
                predictions.append(predicted.detach())
                labels.append(given)
        together = torch.cat(predictions).requires_grad_()
        total = loss(together, torch.cat(labels))
        (gradient,) = torch.autograd.grad(total, together)
        self.loss = total.detach()
        self.shares = list(zip(batches, states, gradient.split([len(part) for part in predictions])))

    def next_share(self, predict: Predict) -> torch.Tensor:
        """The second pass of the next batch: a scalar with the value 0 and the batch's share of the gradient."""
        batch, state, gradient = self.shares.pop(0)
        state.restore()
        predictions, _ = predict(batch)
        share = (predictions * gradient).sum()
        return share - share.detach()


def _refuse_backward(_: None) -> torch.Tensor:
    raise RuntimeError("the first pass over accumulated batches keeps nothing to propagate a gradient through")
