"""The trainer: batches, optimizer groups, faults that stop it, and the same result on one process and two."""

import json
import os
import re
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback, TrainingArguments

from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.metrics.tables import metrics_of_table
from modeling_mamba_ema.training import MambaEMATrainer, StopOnSignal, why_incomplete
from modeling_mamba_ema.training.batch_sampler import AudioSecondsBatchSampler, seconds_of_turns
from modeling_mamba_ema.training.optimizer import check_parameter_groups, parameter_groups, require_finite_gradient
from tests.support.models import tiny_model
from tests.support.tiny_corpus import LABELS, launch, make_trainer, write_run


@pytest.fixture(scope="module")
def train_split(corpus):
    return ConversationDataset(load_emotion_dataset(corpus, LABELS)["train"], LABELS)


# batches


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


# optimizer


@pytest.mark.parametrize("pooling", ["mean", "attention", "multihead_attention", "attentive_statistics"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_parameter_is_in_one_group_and_gets_a_gradient(tmp_path, train_split, pooling, frozen):
    model = tiny_model(
        speech_encoder_pooling=pooling,
        speech_encoder_layers=[1, 2],
        freeze_speech_encoder=frozen,
        ema_decay_learnable=True,
    )
    trainer = make_trainer(tmp_path, train_split, model)
    optimizer = trainer.create_optimizer()
    check_parameter_groups(model, optimizer.param_groups)
    batch = trainer.data_collator([train_split[i] for i in range(6)])
    trainer.compute_loss(model.train(), batch).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # The last addend of a softmax over time is the same for all frames and cancels: its gradient is 0 but for rounding.
    assert [name for name in without if not name.endswith("attention.bias")] == []


def test_a_parameter_left_out_or_put_in_twice_is_named():
    model = tiny_model()
    groups = parameter_groups(model, 0.1, 1e-3, 1e-5)
    check_parameter_groups(model, groups)
    with pytest.raises(ValueError, match="not in exactly one optimizer group"):
        check_parameter_groups(model, groups[1:])
    with pytest.raises(ValueError, match="not in exactly one optimizer group"):
        check_parameter_groups(model, [*groups, groups[0]])


# faults


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


def test_a_nan_label_stops_training_and_names_the_conversations(tmp_path, train_split):
    trainer = make_trainer(tmp_path, WithBadLabel(train_split))
    with pytest.raises(ValueError, match=r"NaN.*conversations of the batch: .*train_\d"):
        trainer.train()


def test_nan_weights_stop_training(tmp_path, train_split):
    model = tiny_model()
    with torch.no_grad():
        model.speech_encoder.attention.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"conversations of the batch: .*train_\d"):
        make_trainer(tmp_path, train_split, model).train()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipping", "no clipping"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, train_split, max_grad_norm):
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.speech_encoder.attention.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(ValueError, match="the gradient's norm is nan"):
        make_trainer(tmp_path, train_split, model, max_grad_norm=max_grad_norm).train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_in_half_precision_the_scaler_skips_a_gradient_that_is_not_finite(fused):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    optimizer.register_step_pre_hook(lambda optimizer, *_: require_finite_gradient(optimizer, 1))
    scaler = torch.amp.GradScaler("cpu")
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((factor * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, torch.ones(3)) == (factor == torch.inf)


def test_a_corpus_smaller_than_a_batch_is_one_batch(tmp_path, train_split):
    options = {"max_seconds_per_batch": None, "dataloader_drop_last": True, "per_device_train_batch_size": 64}
    assert len(make_trainer(tmp_path, train_split, **options).get_train_dataloader()) == 1
    options["per_device_train_batch_size"] = 4
    assert len(make_trainer(tmp_path, train_split, **options).get_train_dataloader()) == 2  # of 10 conversations


class SendSignal(TrainerCallback):
    def __init__(self, number):
        self.number = number
        self.evaluations = 0

    def on_step_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), self.number)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1


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


# whole runs, as a user starts them


@pytest.fixture(scope="module")
def one_and_two_processes(tmp_path_factory, corpus):
    runs = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        configuration = write_run(folder / "run.yaml", corpus, folder / "run")
        # Dropout draws its own numbers in each process; everything else is to be the same.
        encoder = "model.params.speech_encoder_config"
        dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
        overrides = ["model.params.dropout=0.0", "training.num_train_epochs=2"]
        overrides += ["model.params.label_ranges={valence: [0, 1]}"]
        overrides += [f"{encoder}.{name}=0.0" for name in dropouts]
        log = launch(processes, "examples/run_finetune.py", str(configuration), *overrides)
        (folder / "run" / "log").write_text(log)
        runs[processes] = folder / "run"
    return runs


def test_two_processes_train_the_weights_of_one(one_and_two_processes):
    one, two = (load_file(run / "model" / "model.safetensors") for run in one_and_two_processes.values())
    for name, weights in one.items():
        # Softmax does not see the bias of the scores: its gradient is rounding noise, which Adam scales up.
        if not name.endswith("speech_encoder.attention.bias"):
            torch.testing.assert_close(two[name], weights, atol=1e-5, rtol=0, msg=name)
    one, two = (json.loads((run / "results.json").read_text())["test"] for run in one_and_two_processes.values())
    # Rounding in training counts here too; one model measured by one and by two processes agrees to 1e-6, see below.
    names = [name for name in one if not name.startswith("pearson")]
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-4)


def test_a_run_leaves_what_is_promised(one_and_two_processes, corpus):
    splits = load_emotion_dataset(corpus, LABELS)
    for processes, run in one_and_two_processes.items():
        results = json.loads((run / "results.json").read_text())
        assert {name: results[name]["num_turns"] for name in results} == {
            name: len(splits[name]) for name in ("validation", "test")
        }
        model = AutoModel.from_pretrained(run / "model")
        assert torch.isfinite(model(torch.randn(1, 4_000)).logits).all()
        card = (run / "model" / "README.md").read_text()
        low, high = results["test"]["ccc_arousal_low"], results["test"]["ccc_arousal_high"]
        assert f"{results['test']['ccc_arousal']:.3f} ({low:.3f} to {high:.3f})" in card
        launcher = {1: "python", 2: "accelerate launch --num_processes 2"}[processes]
        assert f"{launcher} examples/run_finetune.py" in card
        assert "'model.params.label_ranges={valence: [0, 1]}'" in card  # what was given beside the file
        log = (run / "log").read_text()
        line = r"epoch \S+: CCC valence \S+, arousal \S+, mean \S+; RMSE \S+ on a scale from 0 to 1 \(11 turns\)"
        assert len(re.findall(line, log)) == 3
        assert "eval_" not in log  # no dictionaries of metrics
        assert "epoch 2.0, loss" in log  # beside the progress bar
        names = {path.name for path in run.iterdir()}
        assert {"run_configuration.yaml", "results.json", "learning_curve.png", "model"} <= names
        assert not list((run / "model").glob("*.bin"))
        table = pd.read_csv(run / "predictions_test.csv")
        columns = ["file_name", "conversation_id", "turn", "position", "label", "reference", "prediction"]
        assert list(table.columns) == columns
        assert all(os.path.isfile(name) for name in table["file_name"])
        assert len(table) == 10 * len(LABELS)
        assert table["prediction"].between(0, 1).all()


# The command, with the items that each process reads written down.
WATCHED_EVALUATION = """
import os, sys
from modeling_mamba_ema.__main__ import main
from modeling_mamba_ema.data.dataset import ConversationDataset
read = ConversationDataset.__getitem__
def watched(self, index):
    open(os.environ["READ"], "a").write(f"{os.environ['RANK']} {index}\\n")
    return read(self, index)
ConversationDataset.__getitem__ = watched
sys.exit(main(sys.argv[1:]))
"""


def test_a_saved_model_is_measured_by_two_processes_each_its_share_as_in_its_run_by_one(
    one_and_two_processes, corpus, tmp_path, monkeypatch
):
    run = one_and_two_processes[1]
    monkeypatch.setenv("READ", str(tmp_path / "read"))
    (tmp_path / "watched.py").write_text(WATCHED_EVALUATION)
    launch(2, str(tmp_path / "watched.py"), "evaluate", "--model", str(run / "model"), str(corpus), "--output",
           str(tmp_path), "--format", "parquet", "--batch-size", "1")  # fmt: skip
    assert sorted((tmp_path / "read").read_text().splitlines()) == ["0 0", "0 2", "1 1", "1 3"]
    table, before = pd.read_parquet(tmp_path / "predictions.parquet"), pd.read_csv(run / "predictions_test.csv")
    pd.testing.assert_frame_equal(table, before, atol=1e-6, rtol=0)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    # A correlation divides the predictions' rounding by their spread, which is small here: it is held to be that of
    # these predictions, which are the same as before; everything else is directly the same.
    expected = json.loads((run / "results.json").read_text())["test"]
    expected |= {name: value for name, value in metrics_of_table(table).items() if name.startswith("pearson")}
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / "predicted_against_true.png").stat().st_size > 1000
    assert (tmp_path / "error_by_position.png").stat().st_size > 1000


def weights_after(tmp_path, dataset, seed, workers=0):
    model = tiny_model(dropout=0.2)
    trainer = make_trainer(tmp_path, dataset, model, seed=seed, dataloader_num_workers=workers)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(tmp_path, train_split):
    first = weights_after(tmp_path, train_split, seed=1)
    assert torch.equal(first, weights_after(tmp_path, train_split, seed=1))
    assert torch.equal(first, weights_after(tmp_path, train_split, seed=1, workers=2))
    assert not torch.equal(first, weights_after(tmp_path, train_split, seed=2))
