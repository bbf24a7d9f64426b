"""Long conversations: chunk by chunk is as whole, and a window starts from the state of the turns before it."""

import pytest
import torch

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.data.dataset import ConversationDataset
from modeling_mamba_ema.training import ConversationCollator, load_run_configuration
from modeling_mamba_ema.training.evaluation import predict_in_chunks, start_from_context
from tests.support.models import tiny_model
from tests.support.tiny_corpus import LABELS, make_trainer, write_run

INPUTS = ("input_values", "attention_mask", "turn_mask", "speaker_ids")


@pytest.fixture
def rows(splits):
    """With the speakers of the turns of a conversation; None is nobody known."""
    rows = splits["train"]
    return rows.add_column("speaker", [("ben", None, "anna", "ben")[turn] for turn in rows["turn"]])


def batch_of(dataset, indices):
    return ConversationCollator(MambaEMAFeatureExtractor())([dataset[index] for index in indices])


@pytest.mark.parametrize(
    ("context", "scope"),
    [
        *(("none", "speaker"), ("ema", "conversation"), ("mamba", "conversation"), ("mamba_ema", "conversation")),
        *(("mamba_ema", "speaker"), ("mamba_ema", "both")),
    ],
)
@pytest.mark.parametrize("turns_per_chunk", [1, 2, 3])
def test_chunk_by_chunk_predicts_as_whole(rows, context, scope, turns_per_chunk):
    model = tiny_model(context=context, context_scope=scope, dtype=torch.float64)
    batch = batch_of(ConversationDataset(rows, LABELS), [3, 0, 2])  # of 4, 1 and 3 turns
    batch["input_values"] = batch["input_values"].double()
    with torch.no_grad():
        whole = model(**{name: batch[name] for name in INPUTS}).logits
        chunked = predict_in_chunks(model, batch, turns_per_chunk)
    assert torch.isnan(whole).sum() == 8
    torch.testing.assert_close(chunked, whole, atol=1e-12, rtol=0, equal_nan=True)


def test_a_batch_in_chunks_is_not_padded_to_its_longest_conversation(rows):
    dataset = ConversationDataset(rows, LABELS)
    items = [dataset[index] for index in (3, 0, 2)]  # of 4, 1 and 3 turns
    collator = ConversationCollator(MambaEMAFeatureExtractor())
    whole, batch = collator(items), collator.in_chunks(items, turns_per_chunk=2)
    assert [chunk["input_values"].shape[:2] for chunk in batch["chunks"]] == [(3, 2), (2, 2)]
    longest = [max(len(wave) for item in items for wave in item["waveforms"][first : first + 2]) for first in (0, 2)]
    assert [chunk["input_values"].shape[2] for chunk in batch["chunks"]] == longest
    assert "input_values" not in batch
    for name in ("labels", "turn_mask", "speaker_ids"):
        assert torch.equal(batch[name].long(), whole[name].long())
    model = tiny_model(context_scope="both")
    with torch.no_grad():
        wanted = predict_in_chunks(model, whole, turns_per_chunk=2)
        torch.testing.assert_close(predict_in_chunks(model, batch, 2), wanted, atol=1e-5, rtol=0, equal_nan=True)


def test_an_evaluation_in_chunks_measures_as_one_of_whole_conversations(tmp_path, rows):
    results = []
    for turns_per_chunk in (32, 2):
        trainer = make_trainer(tmp_path, ConversationDataset(rows, LABELS), turns_per_chunk=turns_per_chunk)
        results.append(trainer.predict(ConversationDataset(rows, LABELS)))
    whole, chunked = results
    assert chunked.predictions == pytest.approx(whole.predictions, abs=1e-6, nan_ok=True)
    assert chunked.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], abs=1e-6)


@pytest.mark.parametrize("scope", ["conversation", "both"])
def test_a_window_with_all_turns_before_it_predicts_as_the_conversation_does(rows, scope):
    model = tiny_model(context_scope=scope)
    whole = batch_of(ConversationDataset(rows, LABELS), [3])
    windows = ConversationDataset(rows, LABELS, turns_per_item=2, context_turns=9)
    second = next(i for i, item in enumerate(windows.items) if rows[item[0]]["conversation_id"] == "train_3") + 1
    batch = batch_of(windows, [second, 0])  # the other one has nothing before it
    assert batch["context_turns"].tolist() == [2, 0]
    inputs = start_from_context(model, batch, batch.pop("context_turns"), turns_per_chunk=1)
    with torch.no_grad():
        logits = model(**{name: inputs[name] for name in (*INPUTS, "conversation_state")}).logits
        expected = model(**{name: whole[name] for name in INPUTS}).logits
    assert torch.isnan(logits[0, :2]).all()
    torch.testing.assert_close(logits[0, 2:], expected[0, 2:], atol=2e-5, rtol=0)
    assert (inputs["labels"][0, :2] == -100).all()
    assert not inputs["conversation_state"].ema.requires_grad


def test_context_is_limited_stays_in_its_conversation_and_costs_no_gradient(rows):
    windows = ConversationDataset(rows, LABELS, turns_per_item=1, context_turns=2)
    for index, item in enumerate(windows.items):
        turn = rows[item[0]]["turn"]
        loaded = windows[index]
        assert loaded["context_turns"] == min(turn, 2)
        assert loaded["turns"] == list(range(max(0, turn - 2), turn + 1))
        assert len(loaded["waveforms"]) == len(loaded["labels"]) == len(loaded["turns"])
    fourth = next(i for i, item in enumerate(windows.items) if rows[item[0]]["turn"] == 3)
    model = tiny_model()
    batch = batch_of(windows, [fourth, 0])
    batch["input_values"].requires_grad_(True)
    batch.pop("conversation_ids")
    model(**start_from_context(model, batch, batch.pop("context_turns"), 8)).loss.backward()
    gradient = batch["input_values"].grad[0].abs().sum(dim=-1)  # by turn
    assert gradient[:2].tolist() == [0, 0]
    assert gradient[2] > 0


def test_training_from_context_differs_from_training_from_empty_states(tmp_path, rows):
    losses = []
    for context_turns in (0, 3):
        dataset = ConversationDataset(rows, LABELS, turns_per_item=1, context_turns=context_turns)
        trainer = make_trainer(tmp_path, dataset, tiny_model(), max_steps=1, logging_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] != losses[1]


def test_context_without_windows_is_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="set data.turns_per_item"):
        load_run_configuration(write_run(tmp_path / "run.yaml", corpus, tmp_path), ["data.context_turns=4"])
