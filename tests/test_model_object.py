"""A model as an object: copies, plain tuples, threads, and gradient accumulation in Trainer."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAModel
from tests.support.audio_cases import RATE, noise
from tests.support.models import tiny_config, tiny_model


def features(speech):
    return MambaEMAFeatureExtractor()(speech, sampling_rate=RATE, return_tensors="pt")


SPEECH = [[noise(1_000), noise(2_000, 1)], [noise(700, 2)]]


@pytest.mark.parametrize("labels", [False, True])
def test_return_dict_false_gives_the_same_values_as_a_plain_tuple(labels):
    model, inputs = tiny_model(), features(SPEECH)
    if labels:
        inputs["labels"] = torch.rand(2, 2, 2)
    with torch.no_grad():
        named = model(**inputs, use_conversation_state=True)
        plain = model(**inputs, use_conversation_state=True, return_dict=False)
    assert type(plain) is tuple
    assert len(plain) == len(named.to_tuple())
    for value, expected in zip(plain, named.to_tuple()):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(value.nan_to_num(-1), expected.nan_to_num(-1))
    states = [next(value for value in values if hasattr(value, "num_turns")) for values in (plain, named.to_tuple())]
    assert all(torch.equal(states[0].state_dict()[name], tensor) for name, tensor in states[1].state_dict().items())


def test_the_bare_model_gives_a_plain_tuple_too():
    model = MambaEMAModel(tiny_config()).eval()
    with torch.no_grad():
        named, plain = model(**features(SPEECH)), model(**features(SPEECH), return_dict=False)
    assert all(torch.equal(value, expected) for value, expected in zip(plain, named.to_tuple()))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_deep_copy_answers_the_same_and_shares_no_weight(norm):
    model = tiny_model(norm)
    inputs = features(noise(2_000))
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**inputs).logits
        assert torch.equal(duplicate(**inputs).logits, before)
        for parameter in duplicate.parameters():
            parameter.add_(1.0)
        assert torch.equal(model(**inputs).logits, before)
        assert not torch.equal(duplicate(**inputs).logits, before)


def test_eight_threads_on_one_model_get_the_answers_of_one():
    model = tiny_model()
    batches = [features([noise(1_000 + 100 * index, index)]) for index in range(20)]

    def answer(inputs):
        with torch.no_grad():
            return model(**inputs).logits

    expected = [answer(inputs) for inputs in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            found = list(pool.map(answer, batches))
            assert all(torch.equal(one, other) for one, other in zip(found, expected))


class OneConversation(Dataset):
    """The same conversation again and again, so that every share of a batch has the CCC of the whole."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        inputs = features([[noise(900 + 200 * turn, turn) for turn in range(5)]])
        labels = torch.rand(5, 2, generator=torch.Generator().manual_seed(3))
        return {**{name: tensor[0] for name, tensor in inputs.items()}, "labels": labels}


def one_step(folder, accumulation):
    """Logged loss and weight change of one step of plain gradient descent."""
    model = tiny_model().train()
    before = model.head.out_proj.weight.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    trainer = Trainer(model=model, args=arguments, train_dataset=OneConversation())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], (model.head.out_proj.weight - before).detach()


def test_accumulation_scales_neither_the_logged_loss_nor_the_gradient(tmp_path, record_property):
    loss, change = one_step(tmp_path / "1", 1)
    accumulated_loss, accumulated_change = one_step(tmp_path / "4", 4)
    ratio = float(accumulated_change.norm() / change.norm())
    record_property("figure", f"loss {accumulated_loss / loss:.4f}, gradient {ratio:.4f} of one step's")
    assert change.abs().max() > 1e-4
    assert accumulated_loss == pytest.approx(loss, rel=0.05)
    assert 0.9 < ratio < 1.1
