"""Batches of about as many seconds each: whole, seeded, shared evenly by processes."""

import numpy as np
import pytest

from modeling_mamba_ema.training.batches import AudioSecondsBatchSampler, seconds_of_turns
from tests.support.tiny_corpus import make_trainer


def turn_seconds(count=200):
    random = np.random.default_rng(1)
    return [random.uniform(0.5, 8.0, size=random.integers(1, 12)).tolist() for _ in range(count)]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_item_is_in_one_batch_and_batches_are_full_of_seconds(epoch):
    seconds = turn_seconds()
    sampler = AudioSecondsBatchSampler(seconds, max_seconds=200.0, seed=3)
    batches = sampler.batches(epoch)
    assert sorted(item for batch in batches for item in batch) == list(range(200))
    totals = [sum(sum(seconds[item]) for item in batch) for batch in batches]
    assert max(totals) <= 200 + max(map(sum, seconds))
    assert np.mean(totals) > 0.8 * 200
    assert min(map(len, batches)) >= 2
    assert len(batches) == len(sampler)  # Trainer counts steps from it, so it may not change from epoch to epoch


def test_a_limit_below_two_conversations_still_mixes_two():
    batches = AudioSecondsBatchSampler(turn_seconds(21), max_seconds=0.1).batches(0)
    assert sorted(map(len, batches)) == [2] * 9 + [3]


def test_batches_hold_turns_of_similar_length():
    seconds = turn_seconds()
    longest = np.array([max(turns) for turns in seconds])
    batches = AudioSecondsBatchSampler(seconds, max_seconds=200.0).batches(0)
    assert np.mean([longest[batch].std() for batch in batches]) < 0.5 * longest.std()


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return AudioSecondsBatchSampler(turn_seconds(), 200.0, seed=seed).batches(epoch)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_the_batches_of_one_process_evenly(num_processes):
    seconds = turn_seconds()
    alone = AudioSecondsBatchSampler(seconds, 200.0, min_items=3)
    several = AudioSecondsBatchSampler(seconds, 200.0, num_processes=num_processes, min_items=3)
    shares = list(several)
    assert len(shares) == len(several) == num_processes * len(alone)
    for index, batch in enumerate(alone):
        own = shares[index * num_processes : (index + 1) * num_processes]
        assert sorted(item for share in own for item in share) == sorted(batch)
        totals = [sum(sum(seconds[item]) for item in share) for share in own]
        assert min(totals) > 0
        assert max(totals) - min(totals) <= max(sum(seconds[item]) for item in batch)


def test_too_few_conversations_are_refused():
    with pytest.raises(ValueError, match="a batch needs 3"):
        AudioSecondsBatchSampler([[1.0], [1.0]], 10.0, num_processes=3)


def test_seconds_come_from_the_headers(train_split):
    seconds = seconds_of_turns(train_split)
    expected = [[len(waveform) / 16_000 for waveform in train_split[i]["waveforms"]] for i in range(len(train_split))]
    assert seconds == expected


def test_a_corpus_smaller_than_a_batch_is_one_batch(tmp_path, train_split):
    options = {"max_seconds_per_batch": None, "dataloader_drop_last": True, "per_device_train_batch_size": 64}
    assert len(make_trainer(tmp_path, train_split, **options).get_train_dataloader()) == 1
    options["per_device_train_batch_size"] = 4
    assert len(make_trainer(tmp_path, train_split, **options).get_train_dataloader()) == 2  # of 10 conversations
