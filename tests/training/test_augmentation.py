"""Training options that are off by default: each does what it says, in training only, and the same after a resume."""

import numpy as np
import pytest
import torch

from modeling_mamba_ema.data.dataset import ConversationDataset
from modeling_mamba_ema.training import RunConfiguration, build_model, build_trainer, load_run_configuration
from modeling_mamba_ema.training.augmentation import AugmentedDataset, add_noise, change_speed, mixed_conversations
from tests.support.models import tiny_model
from tests.support.tiny_corpus import LABELS, make_trainer, write_run

RATE = 16_000


# noise and speed


def tone(seconds=1.0, hertz=440.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_has_the_level_that_was_asked_for(snr_db):
    clean = tone()
    noise = add_noise(clean, snr_db, np.random.default_rng(0)) - clean
    assert 10 * np.log10(np.mean(clean**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.1)
    assert not add_noise(np.zeros(100, dtype=np.float32), snr_db, np.random.default_rng(0)).any()


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1, 2.0])
def test_faster_speech_is_shorter_and_higher_by_the_factor(factor):
    faster = change_speed(tone(), factor)
    assert faster.dtype == np.float32
    assert faster.size == pytest.approx(RATE / factor, abs=1)
    spectrum = np.abs(np.fft.rfft(faster * np.hanning(faster.size)))
    assert spectrum.argmax() * RATE / faster.size == pytest.approx(440 * factor, abs=RATE / faster.size)


def waveforms(dataset):
    return [waveform for index in range(len(dataset)) for waveform in dataset[index]["waveforms"]]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_drawn_depends_on_seed_epoch_and_item_alone(train_split):
    def drawn(seed, epoch):
        dataset = AugmentedDataset(train_split, seed, noise_snr_db=(5, 30), speed_factors=(0.9, 1.0, 1.1))
        dataset.set_epoch(epoch)
        return waveforms(dataset)

    assert same(drawn(0, 1), drawn(0, 1))
    assert not same(drawn(0, 1), drawn(0, 2))
    assert not same(drawn(0, 1), drawn(1, 1))


def test_all_turns_of_a_conversation_get_one_speed_and_labels_stay(train_split):
    dataset = AugmentedDataset(train_split, 0, speed_factors=(0.9, 1.0, 1.1))
    speeds = set()
    for index in range(len(train_split)):
        before, after = train_split[index], dataset[index]
        ratios = [a.size / b.size for a, b in zip(before["waveforms"], after["waveforms"], strict=True)]
        assert max(ratios) - min(ratios) < 1e-3
        assert after["seconds"] == [waveform.size / RATE for waveform in after["waveforms"]]
        assert np.array_equal(before["labels"], after["labels"])
        speeds.add(round(ratios[0], 1))
    assert speeds == {0.9, 1.0, 1.1}


def test_speech_that_would_become_too_long_keeps_its_speed(train_split):
    longest = max(waveform.size for waveform in waveforms(train_split)) / RATE
    dataset = AugmentedDataset(train_split, 0, speed_factors=(0.5,), max_seconds=longest)
    assert max(waveform.size for waveform in waveforms(dataset)) <= longest * RATE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_snr_db": [30, 5]}, "data.noise_snr_db is"),
        ({"noise_snr_db": [5]}, "data.noise_snr_db is"),
        ({"speed_factors": []}, "data.speed_factors is"),
        ({"speed_factors": [0.1]}, "data.speed_factors is"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(train_split, options, message):
    with pytest.raises(ValueError, match=message):
        AugmentedDataset(train_split, 0, **options)


# mixup


def test_mixup_mixes_observations_and_labels_alike_and_leaves_turns_without_a_partner():
    projection = torch.nn.Linear(3, 4)
    pooled, labels = torch.randn(3, 5, 3), torch.rand(3, 5, 2)
    labels[0, 3:] = -100  # a shorter conversation
    labels[1, 1, 0] = -100  # a label that the corpus lacks
    plain = projection(pooled)
    random = np.random.default_rng(4)
    again = np.random.default_rng(4)
    order, share = again.permutation(3), again.beta(0.5, 0.5)
    partner = {order[0]: order[2], order[1]: order[0], order[2]: order[1]}
    with mixed_conversations(projection, labels, 0.5, random) as mixed_labels:
        mixed = projection(pooled)
    changed = 0
    for row in range(3):
        for turn in range(5):
            both = [labels[row, turn], labels[partner[row], turn]]
            if min(float(label.min()) for label in both) >= 0:
                expected = share * plain[row, turn] + (1 - share) * plain[partner[row], turn]
                expected_labels = share * both[0] + (1 - share) * both[1]
                changed += 1
            else:
                expected, expected_labels = plain[row, turn], labels[row, turn]
            torch.testing.assert_close(mixed[row, turn], expected)
            torch.testing.assert_close(mixed_labels[row, turn], expected_labels)
    assert changed > 0
    assert torch.equal(projection(pooled), plain)  # over


# through a whole training


def losses(tmp_path, dataset, steps=2, model=None, mixup=0.0, **arguments):
    trainer = make_trainer(
        tmp_path,
        dataset,
        tiny_model() if model is None else model,
        max_steps=steps,
        **{"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "mixup_alpha": mixup, **arguments},
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def test_mixup_changes_training_and_not_evaluation(tmp_path, train_split):
    plain, trainer = losses(tmp_path, train_split)
    mixed, mixed_trainer = losses(tmp_path, train_split, mixup=1.0)
    assert plain != mixed
    mixed_trainer.model.load_state_dict(trainer.model.state_dict())
    assert mixed_trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("fields", [{"loss_label_weights": {"valence": 3.0}}, {"loss_mse_weight": 0.5}])
def test_label_weights_and_the_mse_share_reach_training_from_a_configuration(tmp_path, corpus, splits, fields):
    first = {}
    for name, params in (("plain", {}), ("changed", fields)):
        run = load_run_configuration(write_run(tmp_path / "run.yaml", corpus, tmp_path / name))
        run.model.params.update(params, dropout=0.0)
        torch.manual_seed(0)
        model, extractor = build_model(run)
        assert model.config.loss_mse_weight == params.get("loss_mse_weight", 0.0)
        parts = [ConversationDataset(splits[split], LABELS) for split in ("train", "validation")]
        arguments = run.training_arguments(max_steps=1, logging_steps=1, eval_strategy="no", save_strategy="no",
                                           load_best_model_at_end=False, disable_tqdm=True)  # fmt: skip
        trainer = build_trainer(run, model, extractor, *parts, arguments)
        trainer.train()
        first[name] = trainer.state.log_history[0]["loss"]
    assert first["plain"] != first["changed"]


def test_the_options_of_a_configuration_reach_the_trainer_and_only_the_training_split(tmp_path, corpus, splits):
    overrides = ["data.noise_snr_db=[5, 30]", "data.speed_factors=[0.9, 1.1]", "training.mixup_alpha=0.2"]
    overrides += ["training.gradient_accumulation_steps=3"]
    run = load_run_configuration(write_run(tmp_path / "run.yaml", corpus, tmp_path / "run"), overrides)
    model, extractor = build_model(run)
    parts = [ConversationDataset(splits[split], LABELS) for split in ("train", "validation")]
    trainer = build_trainer(run, model, extractor, *parts, run.training_arguments())
    assert isinstance(trainer.train_dataset, AugmentedDataset)
    assert (trainer.train_dataset.noise_snr_db, trainer.train_dataset.speed_factors) == ([5, 30], [0.9, 1.1])
    assert trainer.eval_dataset is parts[1]
    assert (trainer.args.mixup_alpha, trainer.args.gradient_accumulation_steps) == (0.2, 3)


def test_all_options_are_off_by_default():
    run = RunConfiguration()
    assert (run.data.noise_snr_db, run.data.speed_factors) == (None, None)
    assert run.training_arguments().mixup_alpha == 0.0


@pytest.mark.parametrize(("workers", "accumulated", "seconds"), [(0, 1, 9.0), (2, 1, 9.0), (0, 2, 3.0)])
def test_a_resumed_run_with_all_options_goes_on_to_the_same_weights(
    tmp_path, train_split, workers, accumulated, seconds
):
    def train(folder, resume=None):
        dataset = AugmentedDataset(train_split, 3, noise_snr_db=(5, 30), speed_factors=(0.9, 1.0, 1.1))
        # Five steps are more than an epoch; the resume is in the middle of the second.
        trainer = make_trainer(folder, dataset, tiny_model(dropout=0.1), max_steps=5, save_strategy="steps",
                               save_steps=1, save_total_limit=9, dataloader_num_workers=workers,
                               max_seconds_per_batch=seconds, gradient_accumulation_steps=accumulated,
                               mixup_alpha=0.4)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(resumed, whole)
