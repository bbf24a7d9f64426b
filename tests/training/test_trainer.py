"""The trainer: batches, optimizer groups, faults that stop it, and the same result on one process and two."""

import os
import signal

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from modeling_mamba_ema.training import MambaEMATrainer, StopOnSignal
from modeling_mamba_ema.training.checkpoints import why_incomplete
from tests.support.models import tiny_model
from tests.support.programs import fork_two
from tests.support.tiny_corpus import make_trainer


class WithBadLabel(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset, self.rows, self.items = dataset, dataset.rows, dataset.items

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        item = self.dataset[index]
        if index == 0:
            item["labels"] = np.full_like(item["labels"], np.nan)
        return item


@pytest.mark.promise("C-07")
def test_a_nan_label_stops_training_and_names_the_conversations(tmp_path, train_split):
    trainer = make_trainer(tmp_path, WithBadLabel(train_split))
    with pytest.raises(ValueError, match=r"NaN.*conversations of the batch: .*train_\d"):
        trainer.train()


@pytest.mark.promise("C-07")
def test_nan_weights_stop_training(tmp_path, train_split):
    model = tiny_model()
    with torch.no_grad():
        model.speech_encoder.attention.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"conversations of the batch: .*train_\d"):
        make_trainer(tmp_path, train_split, model).train()


class SendSignal(TrainerCallback):
    def __init__(self, number):
        self.number = number
        self.evaluations = 0

    def on_step_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), self.number)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1


@pytest.mark.promise(
    "C-08",
    "SIGTERM or Ctrl-C leaves one complete checkpoint and 143 or 130, and the run goes on to the same weights",
    "bitwise",
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_within_an_epoch_saves_one_complete_checkpoint_and_evaluates_nothing(
    tmp_path, train_split, number, code
):
    trainer = make_trainer(tmp_path, train_split, save_strategy="epoch", eval_strategy="epoch", max_steps=10)
    stop, sender = StopOnSignal(), SendSignal(number)
    trainer.add_callback(stop)
    trainer.add_callback(sender)
    before = signal.getsignal(number)
    trainer.train()
    assert (stop.received, stop.exit_code) == (number, code)
    assert trainer.state.global_step == 1
    assert sender.evaluations == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-1"]
    assert why_incomplete(tmp_path / "checkpoint-1") is None
    assert signal.getsignal(number) == before


def test_ctrl_c_a_second_time_ends_at_once(tmp_path, train_split):
    trainer = make_trainer(tmp_path, train_split, max_steps=10)
    before = signal.getsignal(signal.SIGINT)
    for callback in (StopOnSignal(), SendSignal(signal.SIGINT), SendSignal(signal.SIGINT)):
        trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) == before


def test_other_arguments_than_those_of_this_package_are_refused(tmp_path):
    with pytest.raises(TypeError, match="TrainingArguments, but must be MambaEMATrainingArguments"):
        MambaEMATrainer(tiny_model(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_a_model_that_is_made_by_a_function_is_trained_and_measured(tmp_path, train_split):
    trainer = make_trainer(tmp_path, train_split)
    made = MambaEMATrainer(
        None,
        trainer.args,
        model_init=lambda: tiny_model(seed=3),
        train_dataset=train_split,
        eval_dataset=train_split,
        data_collator=trainer.data_collator,
    )
    made.train()
    assert made.state.global_step == 2
    assert -1 <= made.evaluate()["eval_ccc"] <= 1


def weights_after(tmp_path, dataset, seed, workers=0):
    model = tiny_model(dropout=0.2)
    trainer = make_trainer(tmp_path, dataset, model, seed=seed, dataloader_num_workers=workers)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.promise(
    "C-13",
    "the same seed trains the same weights, in one process or with two that read; another seed others",
    "bitwise",
)
def test_the_same_seed_trains_the_same_weights_and_another_seed_others(tmp_path, train_split):
    first = weights_after(tmp_path, train_split, seed=1)
    assert torch.equal(first, weights_after(tmp_path, train_split, seed=1))
    assert torch.equal(first, weights_after(tmp_path, train_split, seed=1, workers=2))
    assert not torch.equal(first, weights_after(tmp_path, train_split, seed=2))


# Trains a model some of whose parts no output depends on: layers behind the one that is read, the mask of SpecAugment,
# and, where every conversation is a single turn without a speaker, whatever would carry one turn to the next.
UNREAD_PARTS = """
import sys, torch
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from tests.support.models import tiny_model
from tests.support.tiny_corpus import LABELS, make_trainer

corpus, folder = sys.argv[1:]
dataset = ConversationDataset(load_emotion_dataset(corpus, LABELS)["train"], LABELS, turns_per_item=1)
model = tiny_model(speech_encoder_layers=[0], context_scope="both", ema_decay_learnable=True).train()
trainer = make_trainer(folder, dataset, model, max_steps=3, learning_rate=1e-3)
trainer.train()
assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
assert not trainer.model_wrapped.find_unused_parameters
torch.save(model.state_dict(), f"{folder}/{trainer.args.process_index}.pt")
"""


def test_two_processes_train_a_model_with_parts_that_no_output_depends_on(tmp_path, corpus):
    for process in fork_two("-c", UNREAD_PARTS, corpus, tmp_path):
        assert process.wait() == 0, process.printed
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in "01")
    before = tiny_model(speech_encoder_layers=[0], context_scope="both", ema_decay_learnable=True).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in before)
    changed = {name for name in before if not torch.equal(first[name], before[name])}
    assert not any("wavlm.encoder.layers" in name for name in changed)
    assert any("wavlm.feature_extractor" in name for name in changed)
