"""The CCC loss: right values, finite gradients, and the same on one process and on two."""

import datetime
import os
from pathlib import Path

import audmetric
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modeling_mamba_ema.ccc_loss import ccc_loss


def turns(count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    predictions = 0.2 + 0.5 * labels + 0.1 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return predictions.to(dtype), labels.to(dtype)


def test_is_one_minus_the_mean_of_audmetrics_ccc_over_labels():
    predictions, labels = turns(40)
    expected = 1 - sum(audmetric.concordance_cc(labels[:, i].numpy(), predictions[:, i].numpy()) for i in (0, 1)) / 2
    assert float(ccc_loss(predictions, labels, eps=0.0)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.promise(
    "B-18",
    "the CCC loss has right gradients, finite ones for degenerate batches, and is right for any set of labels",
    "gradcheck; 1e-12",
)
def test_gradients_are_right():
    predictions, labels = turns(6)
    labels[1, 0] = -100
    assert torch.autograd.gradcheck(
        lambda p: ccc_loss(p, labels, label_weights=[1.0, 2.0], mse_weight=0.3), predictions.requires_grad_(True)
    )


@pytest.mark.promise("B-18")
@pytest.mark.parametrize("case", ["constant predictions", "constant labels", "both, equal", "nearly constant"])
def test_degenerate_batches_have_finite_losses_and_gradients(case):
    predictions, labels = turns(8, dtype=torch.float32)
    if case in ("constant predictions", "both, equal"):
        predictions = torch.full_like(predictions, 0.5)
    if case in ("constant labels", "both, equal"):
        labels = torch.full_like(labels, 0.5)
    if case == "nearly constant":
        predictions = 0.5 + 1e-6 * predictions
    predictions.requires_grad_(True)
    loss = ccc_loss(predictions, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(predictions.grad).all()


@pytest.mark.promise("B-18")
def test_a_perfect_prediction_costs_nothing():
    _, labels = turns(20, dtype=torch.float32)
    assert float(ccc_loss(labels.clone(), labels)) < 1e-4


def test_missing_labels_equal_leaving_them_out():
    predictions, labels = turns(10)
    labels[2:5, 0] = -100
    rows = [0, 1, 5, 6, 7, 8, 9]
    expected = (ccc_loss(predictions[rows, :1], labels[rows, :1]) + ccc_loss(predictions[:, 1:], labels[:, 1:])) / 2
    assert float(ccc_loss(predictions, labels)) == pytest.approx(float(expected), abs=1e-14)


def test_a_label_that_is_missing_throughout_does_not_count():
    predictions, labels = turns(10)
    labels[:, 0] = -100
    assert float(ccc_loss(predictions, labels)) == pytest.approx(
        float(ccc_loss(predictions[:, 1:], labels[:, 1:])), abs=1e-14
    )


def test_weights_and_the_mse_share_mix_as_documented():
    predictions, labels = turns(10)
    valence, arousal = (ccc_loss(predictions[:, i : i + 1], labels[:, i : i + 1]) for i in (0, 1))
    weighted = ccc_loss(predictions, labels, label_weights=[3.0, 1.0])
    assert float(weighted) == pytest.approx(float((3 * valence + arousal) / 4), abs=1e-14)
    mixed = ccc_loss(predictions, labels, mse_weight=0.25)
    mse = (predictions - labels).square().mean()
    assert float(mixed) == pytest.approx(float(0.75 * (valence + arousal) / 2 + 0.25 * mse), abs=1e-14)


def test_half_precision_inputs_are_computed_in_float32_under_autocast_too():
    predictions, labels = turns(30, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ccc_loss(predictions, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(ccc_loss(predictions.float(), labels.float())), abs=1e-7)


def test_one_turn_teaches_nothing_and_is_refused_while_training_but_can_be_evaluated():
    predictions, labels = turns(1)
    with pytest.raises(ValueError, match="at least two"):
        ccc_loss(predictions, labels)
    with torch.no_grad():
        assert torch.isfinite(ccc_loss(predictions, labels))


@pytest.mark.parametrize("what", ["prediction", "label"])
def test_numbers_that_are_not_finite_are_refused(what):
    predictions, labels = turns(5)
    {"prediction": predictions, "label": labels}[what][3, 1] = float("nan")
    with pytest.raises(ValueError, match=f"1 of 10 {what}s are NaN or infinite, the first in turn 3 .* label 1"):
        ccc_loss(predictions, labels)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(3, 2\) and labels \(2, 2\)"):
        ccc_loss(torch.zeros(3, 2), torch.zeros(2, 2))


# --- several processes ------------------------------------------------------------------------------------------------

FEATURES = 5


def whole_batch(count=8):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, FEATURES, generator=generator, dtype=torch.float64),
        torch.rand(count, 2, generator=generator, dtype=torch.float64),
    )


def model():
    torch.manual_seed(2)
    return nn.Linear(FEATURES, 2, dtype=torch.float64)


def train_on_a_shard(rank, world_size, folder, splits, poison):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    features, labels = whole_batch()
    if poison:
        labels[0, 0] = float("nan")  # on rank 0
    start, end = splits[rank]
    wrapped = DistributedDataParallel(model())
    try:
        loss = ccc_loss(wrapped(features[start:end]), labels[start:end])
        loss.backward()
        result = {"loss": loss.detach(), "gradient": wrapped.module.weight.grad}
    except ValueError as error:
        result = {"error": str(error)}
    torch.save(result, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    # A process group whose backward pass never ran can hang while gloo tears it down; the result is on disk.
    os._exit(0)


def run_two_processes(folder, splits, poison=False):
    mp.spawn(train_on_a_shard, args=(2, str(folder), splits, poison), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.promise(
    "B-15", "two processes have the loss and gradient of one, and train its weights", "1e-12 loss, 1e-5 weights"
)
@pytest.mark.timeout(150)  # a deadlock is what these tests would see
@pytest.mark.parametrize("splits", [((0, 4), (4, 8)), ((0, 5), (5, 8)), ((0, 8), (8, 8))], ids=["4+4", "5+3", "8+0"])
def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path, splits):
    features, labels = whole_batch()
    alone = model()
    loss = ccc_loss(alone(features), labels)
    loss.backward()
    for result in run_two_processes(tmp_path, splits):
        torch.testing.assert_close(result["loss"], loss.detach(), atol=1e-12, rtol=0)
        torch.testing.assert_close(result["gradient"], alone.weight.grad, atol=1e-12, rtol=0)


@pytest.mark.timeout(150)
def test_a_bad_label_on_one_process_stops_both(tmp_path):
    for result in run_two_processes(tmp_path, ((0, 4), (4, 8)), poison=True):
        assert "1 of 16 labels are NaN" in result["error"]
