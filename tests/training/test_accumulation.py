"""Gradient accumulation: loss and gradient are those of one large batch, whatever is random in the model."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import Subset

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.ccc_loss import ccc_loss
from modeling_mamba_ema.data.augmentation import mixed_conversations
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.speech_encoder import SpeechEncoder
from modeling_mamba_ema.training import MambaEMATrainingArguments, cache_frames
from modeling_mamba_ema.training.accumulation import AccumulatedLoss
from modeling_mamba_ema.training.batches import AudioSecondsBatchSampler, seconds_of_turns
from modeling_mamba_ema.training.evaluation import start_from_context
from tests.support.models import NO_DROPOUT, tiny_model
from tests.support.programs import fork_two
from tests.support.tiny_corpus import LABELS, make_trainer


def descend(folder, dataset, model, batch_size, steps, **arguments):
    """Plain gradient descent, over the items in their order where batches have a size; the logged losses."""
    trainer = make_trainer(
        folder,
        dataset,
        model,
        train_sampling_strategy="random" if "max_seconds_per_batch" in arguments else "sequential",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        logging_steps=1,
        **{"max_seconds_per_batch": None, **arguments},
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(model, expected, tolerance):
    for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=tolerance, rtol=0, msg=name)


# Ten items: with batches of two, three to a step, the last step of an epoch has two. With batches of one, six to a
# step, most batches alone have too few turns for a CCC.
every_division = pytest.mark.parametrize(("batch_size", "steps"), [(2, 3), (1, 6)])


@pytest.mark.promise("B-23", "accumulated batches give the loss and weights of one large batch", "1e-6 float32")
@every_division
@pytest.mark.parametrize("predict_spread", [False, True])
def test_accumulated_batches_train_as_one_large_batch(tmp_path, corpus, predict_spread, batch_size, steps):
    models = [tiny_model(speech_encoder_config=NO_DROPOUT, predict_spread=predict_spread) for _ in range(2)]
    for model in models if predict_spread else ():  # from spreads near 0 the first step would go far off
        torch.nn.init.zeros_(model.spread_head.out_proj.weight)
    rows = load_emotion_dataset(corpus, LABELS, with_spread=predict_spread)["train"]
    train_split = ConversationDataset(rows, models[0].config.target_columns)
    before = copy.deepcopy(models[0])
    large = descend(tmp_path, train_split, models[0], batch_size=6, steps=1)
    accumulated = descend(tmp_path, train_split, models[1], batch_size=batch_size, steps=steps)
    assert accumulated == pytest.approx(large, abs=1e-6)
    assert_same_weights(models[1], models[0], 1e-6)
    assert max((a - b).abs().max() for a, b in zip(models[0].parameters(), before.parameters())) > 1e-3


@every_division
def test_in_bf16_the_loss_is_that_of_one_large_batch_and_the_gradient_but_for_rounding(
    tmp_path, train_split, batch_size, steps
):
    models = [tiny_model(speech_encoder_config=NO_DROPOUT) for _ in range(2)]
    before = [p.detach().clone() for p in models[0].parameters()]
    options = {"bf16": True, "max_steps": 1}
    large = descend(tmp_path, train_split, models[0], batch_size=6, steps=1, **options)
    accumulated = descend(tmp_path, train_split, models[1], batch_size=batch_size, steps=steps, **options)
    assert accumulated == pytest.approx(large, abs=1e-6)
    change, other = (torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before)]) for model in models)
    assert (change - other).norm() < 2**-8 * change.norm()  # bf16 has 8 bits


# Against one graph over all batches, with everything that is random


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def share_by_share(trainer, batches):
    """Loss and gradients of a step as Trainer takes it."""
    torch.manual_seed(7)
    np.random.seed(7)
    found, _ = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(found)
    model = trainer.accelerator.prepare(trainer.model)
    loss = sum(trainer.training_step(model, batch) for batch in found)
    return loss, gradients(trainer.model)


def all_at_once(trainer, batches, bf16, mixup_alpha):
    """The same by one graph that holds all batches."""
    model = trainer.model.train()
    model.zero_grad()
    torch.manual_seed(7)
    np.random.seed(7)
    inputs = []
    for batch in batches:
        batch = {name: value for name, value in batch.items() if name != "conversation_ids"}
        context = batch.pop("context_turns", None)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            inputs.append(batch if context is None else start_from_context(model, batch, context, 32))
    predictions, labels = [], []
    for batch in inputs:
        batch = dict(batch)
        given = batch.pop("labels")
        mixing = contextlib.nullcontext(given)
        if mixup_alpha:
            random = np.random.default_rng([trainer.args.seed, 0, 0])
            mixing = mixed_conversations(model.mamba_ema.projection, given, mixup_alpha, random)
        with mixing as mixed, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(**batch)
        present = outputs.turn_mask.bool()
        predictions.append(outputs.logits[present])
        labels.append(mixed[present])
    loss = ccc_loss(torch.cat(predictions), torch.cat(labels))
    loss.backward()
    return loss.detach(), gradients(model)


RANDOM = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "feat_proj_dropout": 0.1}
SPEC_AUGMENT = {"apply_spec_augment": True, "mask_time_prob": 0.5}


def lora(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["q_proj", "output_dense"], init_lora_weights=False, lora_dropout=0.1),
        model.speech_encoder.backbone,
    )


@pytest.mark.parametrize(
    ("encoder", "arguments", "windows", "change"),
    [
        ({}, {}, {}, None),
        (SPEC_AUGMENT, {}, {}, None),
        ({"layerdrop": 0.5}, {}, {}, None),
        ({}, {"mixup_alpha": 0.5}, {}, None),
        ({}, {}, {"turns_per_item": 2, "context_turns": 2}, None),
        ({}, {"gradient_checkpointing": True}, {}, None),
        ({}, {"bf16": True}, {}, None),
        ({}, {}, {}, lora),
        (
            {**SPEC_AUGMENT, "layerdrop": 0.5},
            {"mixup_alpha": 0.5, "gradient_checkpointing": True, "bf16": True},
            {"turns_per_item": 2, "context_turns": 2},
            lora,
        ),
    ],
    ids=["dropout", "SpecAugment", "layer drop", "mixup", "context", "checkpointing", "bf16", "LoRA", "all"],
)
def test_loss_and_gradients_are_those_of_one_graph_over_all_batches(
    tmp_path, splits, encoder, arguments, windows, change, monkeypatch
):
    monkeypatch.setattr("modeling_mamba_ema.fast_speech_encoder.SPEC_AUGMENT_MIN_FRAMES", 20)  # these last 0.3 to 0.7 s
    dataset = ConversationDataset(splits["train"], LABELS, **windows)
    model = tiny_model(dropout=0.1, speech_encoder_config={**RANDOM, **encoder})
    if change is not None:
        change(model)
    trainer = make_trainer(tmp_path, dataset, model, gradient_accumulation_steps=3, **arguments)
    if arguments.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [trainer.data_collator([dataset[i] for i in items]) for items in ([1, 2], [3, 4, 5], [6, 7])]
    expected_loss, expected = all_at_once(
        trainer, batches, arguments.get("bf16", False), arguments.get("mixup_alpha", 0.0)
    )
    model.zero_grad()
    loss, found = share_by_share(trainer, batches)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


# Several processes

ONE_STEP = """
import os
import sys
from pathlib import Path
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from tests.support.models import NO_DROPOUT, tiny_model
from tests.training.test_accumulation import descend
from tests.support.tiny_corpus import LABELS

corpus, folder, bf16 = sys.argv[1:]
dataset = ConversationDataset(load_emotion_dataset(corpus, LABELS)["train"], LABELS)
model = tiny_model(speech_encoder_config=NO_DROPOUT)
losses = descend(folder, dataset, model, 1, 3, max_steps=1, bf16=bf16 == "True", max_seconds_per_batch=SECONDS)
if os.environ["RANK"] == "0":
    model.save_pretrained(folder)
    (Path(folder) / "loss").write_text(str(losses[0]))
"""
SECONDS = 1.6  # a batch of all processes: 2 to 4 of the conversations


@pytest.mark.promise("B-23")
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bf16"])
def test_two_processes_train_as_one_does_on_one_large_batch(tmp_path, corpus, train_split, bf16):
    (tmp_path / "one_step.py").write_text(ONE_STEP.replace("SECONDS", str(SECONDS)))
    for process in fork_two(tmp_path / "one_step.py", corpus, tmp_path, bf16):
        assert process.wait() == 0, process.printed
    sampler = AudioSecondsBatchSampler(seconds_of_turns(train_split), SECONDS, num_processes=2)
    items = [item for batch in sampler.batches(0)[:3] for item in batch]
    model = tiny_model(speech_encoder_config=NO_DROPOUT)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    large = descend(tmp_path / "large", Subset(train_split, items), model, len(items), 1, max_steps=1, bf16=bf16)
    saved = MambaEMAForRegression.from_pretrained(tmp_path)
    assert float((tmp_path / "loss").read_text()) == pytest.approx(large[0], abs=1e-6)
    if not bf16:
        assert_same_weights(saved, model, 1e-6)
    change, other = (torch.cat([p.detach().flatten() for p in m.parameters()]) - before for m in (model, saved))
    assert (change - other).norm() < 2**-8 * change.norm()


# Cost


def test_the_encoder_runs_twice_for_each_batch_and_never_for_cached_frames(tmp_path, splits, monkeypatch):
    model = tiny_model(freeze_speech_encoder=True)
    frames = splits["train"]
    calls = []
    original = SpeechEncoder.hidden_states
    monkeypatch.setattr(SpeechEncoder, "hidden_states", lambda *a, **k: calls.append(1) or original(*a, **k))
    descend(tmp_path, ConversationDataset(frames, LABELS), model, batch_size=2, steps=5)
    assert len(calls) == 2 * 2 * 5  # two epochs
    arguments = MambaEMATrainingArguments(output_dir=str(tmp_path))
    cache = cache_frames(model, MambaEMAFeatureExtractor(), [frames], tmp_path / "cache", arguments)
    calls.clear()
    descend(tmp_path, ConversationDataset(frames, LABELS, frame_cache=cache), model, batch_size=2, steps=5)
    assert calls == []


def test_the_first_pass_keeps_no_activation():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Tanh(), torch.nn.Linear(50, 2))
    activations = []

    def predict(batch):
        hidden = layers[:2](batch)
        activations.append(StorageWeakRef(hidden.untyped_storage()))
        return layers[2](hidden), torch.zeros(4, 2)

    batches = [torch.randn(4, 3) for _ in range(3)]
    loss = AccumulatedLoss(predict, torch.nn.functional.mse_loss, batches, torch.device("cpu"))
    assert len(activations) == 3
    assert all(activation.expired() for activation in activations)
    share = loss.next_share(predict)
    assert not activations[-1].expired()
    share.backward()
    assert layers[0].weight.grad.any()
