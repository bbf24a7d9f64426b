"""The CCC loss: right values, finite gradients, and the same on one process and on two."""

import datetime
import os
from pathlib import Path

import audmetric
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modeling_mamba_ema.ccc_loss import MIN_SPREAD, MISSING_LABEL, ccc_loss, spread_loss


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


# --- any set of labels ------------------------------------------------------------------------------------------------


@st.composite
def labelled_turns(draw):
    """Predictions and labels (turns, labels) with some labels missing, and a weight for each label."""
    turns, labels = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    truth = random.random((turns, labels))
    missing = np.array(
        draw(st.lists(st.lists(st.booleans(), min_size=labels, max_size=labels), min_size=turns, max_size=turns))
    )
    weights = draw(st.lists(st.floats(0.1, 10), min_size=labels, max_size=labels))
    return random.random((turns, labels)), np.where(missing, MISSING_LABEL, truth), weights


@pytest.mark.promise("B-18")
@settings(max_examples=100, deadline=None)
@given(turns=labelled_turns(), shift=st.floats(-1, 1), scale=st.floats(0.1, 10))
def test_the_loss_of_any_set_of_labels_is_one_minus_the_weighted_mean_of_their_cccs(turns, shift, scale):
    predictions, labels, weights = turns
    predictions = shift + scale * predictions
    given_labels = [column for column in range(labels.shape[1]) if (labels[:, column] != MISSING_LABEL).sum() >= 2]
    with torch.no_grad():
        loss = ccc_loss(torch.tensor(predictions), torch.tensor(labels), label_weights=weights, eps=1e-300)
    if not given_labels:
        assert float(loss) == 1.0
        return
    cccs = []
    for column in given_labels:
        there = labels[:, column] != MISSING_LABEL
        cccs.append(audmetric.concordance_cc(labels[there, column], predictions[there, column]))
    expected = 1 - np.average(cccs, weights=[weights[column] for column in given_labels])
    torch.testing.assert_close(float(loss), float(expected), atol=1e-12, rtol=0)


@pytest.mark.promise("B-18")
@settings(max_examples=50, deadline=None)
@given(turns=labelled_turns(), order=st.randoms(use_true_random=False))
def test_neither_the_order_of_turns_nor_of_labels_changes_the_loss(turns, order):
    predictions, labels, weights = (torch.tensor(part) for part in turns)
    rows, columns = list(range(len(labels))), list(range(labels.shape[1]))
    order.shuffle(rows)
    order.shuffle(columns)
    with torch.no_grad():
        loss = ccc_loss(predictions, labels, label_weights=weights.tolist())
        shuffled = ccc_loss(
            predictions[rows][:, columns], labels[rows][:, columns], label_weights=weights[columns].tolist()
        )
    torch.testing.assert_close(shuffled, loss, atol=1e-12, rtol=0)


def test_the_loss_of_the_spread_is_the_divergence_of_two_normal_distributions_around_one_mean():
    spreads, labels = (values.abs().clamp(0.02, 0.7) for values in turns(40))
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(
        normal(0.3, (labels**2 + MIN_SPREAD**2).sqrt()), normal(0.3, (spreads**2 + MIN_SPREAD**2).sqrt())
    )
    assert float(spread_loss(spreads, labels)) == pytest.approx(float(divergence.mean()), abs=1e-12)
    labels[3:, 0] = MISSING_LABEL
    expected = (divergence[:3, 0].mean() + divergence[:, 1].mean()) / 2
    assert float(spread_loss(spreads, labels)) == pytest.approx(float(expected), abs=1e-12)
    labels[:, 0] = MISSING_LABEL
    assert float(spread_loss(spreads, labels)) == pytest.approx(float(divergence[:, 1].mean()), abs=1e-12)
    assert torch.autograd.gradcheck(lambda s: spread_loss(s, labels), spreads.requires_grad_(True))


def test_the_best_spread_is_the_mean_variance_and_none_given_costs_nothing():
    labels = torch.tensor([[0.1], [0.3], [0.0]], dtype=torch.float64)
    best = float((labels**2).mean().sqrt())
    losses = {s: float(spread_loss(torch.full_like(labels, s), labels)) for s in (best - 0.01, best, best + 0.01)}
    assert min(losses, key=losses.get) == best
    assert float(spread_loss(labels, labels)) == pytest.approx(0.0, abs=1e-15)
    spreads = torch.full((2, 1), 0.2, requires_grad=True)
    for missing in (torch.full((2, 1), MISSING_LABEL), torch.zeros(0, 1)):
        loss = spread_loss(spreads[: len(missing)], missing)
        loss.backward()
        assert float(loss.detach()) == 0
        assert not spreads.grad.any()


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


SPLITS = {"4+4": ((0, 4), (4, 8)), "5+3": ((0, 5), (5, 8)), "8+0": ((0, 8), (8, 8))}


def loss_of_a_shard(shard, poison=False, loss_of=ccc_loss):
    features, labels = whole_batch()
    if poison:
        labels[0, 0] = float("nan")  # on rank 0
    wrapped = DistributedDataParallel(model())
    try:
        loss = loss_of(wrapped(features[slice(*shard)]), labels[slice(*shard)])
        loss.backward()
    except ValueError as error:
        return {"error": str(error)}
    return {"loss": loss.detach(), "gradient": wrapped.module.weight.grad}


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    results = {name: loss_of_a_shard(shards[rank]) for name, shards in SPLITS.items()}
    results |= {f"spread {name}": loss_of_a_shard(s[rank], loss_of=spread_loss) for name, s in SPLITS.items()}
    results["poison"] = loss_of_a_shard(SPLITS["4+4"][rank], poison=True)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    # A process group whose backward pass never ran can hang while gloo tears it down; the results are on disk.
    os._exit(0)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes computed; starting them takes longer than all they do."""
    folder = tmp_path_factory.mktemp("two_processes")
    mp.start_processes(one_of_two_processes, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.promise(
    "B-15", "two processes have the loss and gradient of one, and train its weights", "1e-12 loss, 1e-5 weights"
)
@pytest.mark.parametrize(("prefix", "loss_of"), [("", ccc_loss), ("spread ", spread_loss)])
@pytest.mark.parametrize("splits", SPLITS)
def test_two_processes_have_the_loss_and_gradient_of_one(two_processes, splits, prefix, loss_of):
    features, labels = whole_batch()
    alone = model()
    loss = loss_of(alone(features), labels)
    loss.backward()
    for results in two_processes:
        found = results[prefix + splits]
        torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found["gradient"], alone.weight.grad, atol=1e-12, rtol=1e-12)


def test_a_bad_label_on_one_process_stops_both(two_processes):
    for results in two_processes:
        assert "1 of 16 labels are NaN" in results["poison"]["error"]
