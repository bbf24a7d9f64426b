"""Properties over spaces of inputs: lengths and orders of batches, shapes and cuts of conversations, sets of labels."""

import functools

import audmetric
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.ccc_loss import MISSING_LABEL, ccc_loss
from modeling_mamba_ema.conversation_encoder import CONTEXTS
from modeling_mamba_ema.pooling import POOLINGS
from tests.support.audio_cases import RATE, noise
from tests.support.models import tiny_model

lengths = st.integers(400, 4_000)
precisions = st.sampled_from([(torch.float64, 1e-12), (torch.float32, 2e-5)])
in_pieces = st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)])


@functools.cache
def make_model(norm, pooling, context, dtype):
    return tiny_model(norm=norm, dtype=dtype, speech_encoder_pooling=pooling, context=context)


@torch.no_grad()
def predict(model, speech, **options):
    features = MambaEMAFeatureExtractor()(speech, sampling_rate=RATE, return_tensors="pt")
    return model(**features, **options)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(lengths, min_size=2, max_size=6, unique=True),
    order=st.randoms(use_true_random=False),
    norm=st.sampled_from(["group", "layer"]),
    pooling=st.sampled_from(list(POOLINGS)),
    precision=precisions,
)
def test_any_lengths_in_any_order_get_the_numbers_they_get_alone(batch, order, norm, pooling, precision):
    dtype, tolerance = precision
    model = make_model(norm, pooling, "mamba_ema", dtype)
    shuffled = order.sample(batch, len(batch))
    logits = predict(model, [noise(length, length) for length in shuffled]).logits
    alone = torch.cat([predict(model, noise(length, length)).logits for length in shuffled])
    torch.testing.assert_close(logits, alone, atol=tolerance, rtol=0)


@st.composite
def cut_conversations(draw):
    """Lengths of the turns of each conversation, and where all of them are cut."""
    conversations = draw(st.lists(st.lists(lengths, min_size=1, max_size=7), min_size=1, max_size=4))
    cuts = draw(st.sets(st.integers(1, 6)))
    return conversations, [0, *sorted(cuts), 7]


@settings(max_examples=40, deadline=None)
@given(cut=cut_conversations(), context=st.sampled_from(list(CONTEXTS)), precision=in_pieces)
def test_any_conversations_cut_anywhere_get_the_numbers_of_the_whole(cut, context, precision):
    dtype, tolerance = precision
    model = make_model("layer", "attention", context, dtype)
    conversations = [[noise(length, length) for length in turns] for turns in cut[0]]
    whole = predict(model, conversations).logits
    state, live, found = None, list(range(len(conversations))), [[] for _ in conversations]
    for start, end in zip(cut[1], cut[1][1:]):
        going_on = [position for position, row in enumerate(live) if len(conversations[row]) > start]
        live = [live[position] for position in going_on]
        if not live:
            break
        state = None if state is None else state.select(going_on)
        pieces = [conversations[row][start:end] for row in live]
        outputs = predict(model, pieces, conversation_state=state, use_conversation_state=True)
        state = outputs.conversation_state
        for position, row in enumerate(live):
            found[row].append(outputs.logits[position, : len(pieces[position])])
    for row, turns in enumerate(conversations):
        torch.testing.assert_close(torch.cat(found[row]), whole[row, : len(turns)], atol=tolerance, rtol=0)


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
