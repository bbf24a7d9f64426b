"""Whose turns the context is taken over: the conversation's, each speaker's own, or both."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_mamba_ema import ConversationState, MambaEMAConfig, MambaEMAForRegression
from modeling_mamba_ema.conversation_encoder import CONTEXTS, ConversationEncoder, SpeakerEncoder
from modeling_mamba_ema.data.synthetic_corpus import coupled_walks
from tests.support.models import tiny_config, tiny_model

HIDDEN, SPEAKERS = 16, 4
CONTEXT_KINDS = [context for context in CONTEXTS if context != "none"]
every_context = pytest.mark.parametrize("context", CONTEXT_KINDS)
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)


def sizes(context="mamba_ema"):
    return {
        "hidden_size": HIDDEN,
        "context": context,
        "num_hidden_layers": 2,
        "state_size": 8,
        "conv_kernel": 4,
        "expand": 2,
        "head_dim": 8,
        "ema_decay": 0.8,
        "ema_decay_learnable": True,
        "dropout": 0.0,
    }


def make_encoder(context="mamba_ema", dtype=torch.float64):
    torch.manual_seed(0)
    return SpeakerEncoder(SPEAKERS, **sizes(context)).to(dtype).eval()


def make_inputs(batch, turns, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(batch, turns, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    speaker_ids = torch.randint(-1, SPEAKERS, (batch, turns), generator=generator)
    turn_mask = torch.rand(batch, turns, generator=generator) < 0.8
    turn_mask[:, 0] = True
    return observations, turn_mask, speaker_ids


def speaker_by_speaker(encoder, observations, turn_mask, speaker_ids):
    """An encoder of conversations run in a loop on the turns of each speaker, cut out one by one."""
    plain = ConversationEncoder(**sizes(next(c for c in CONTEXT_KINDS if made_of(encoder) == CONTEXTS[c])))
    plain.to(observations.dtype).eval().load_state_dict(encoder.state_dict())
    context = torch.zeros_like(observations)
    for row in range(observations.shape[0]):
        for speaker in range(-1, SPEAKERS):
            turns = (turn_mask[row] & (speaker_ids[row] == speaker)).nonzero().flatten()
            if len(turns):
                alone = observations[row, turns][None]
                context[row, turns] = plain(alone, torch.ones(1, len(turns), dtype=torch.bool))[0][0]
    return context


def made_of(encoder):
    return bool(len(encoder.layers)), encoder.ema is not None


# The encoder


@every_context
@precisions
def test_each_speaker_gets_the_context_of_a_conversation_of_their_turns_alone(context, dtype, tolerance):
    encoder = make_encoder(context, dtype)
    inputs = make_inputs(3, 24, dtype)
    with torch.no_grad():
        observations, turn_mask, speaker_ids = inputs
        found, _ = encoder(observations, turn_mask, None, speaker_ids)
        torch.testing.assert_close(found, speaker_by_speaker(encoder, *inputs), atol=tolerance, rtol=tolerance)


@every_context
def test_without_speakers_the_context_is_that_of_the_conversation(context):
    encoder = make_encoder(context)
    observations, turn_mask, _ = make_inputs(3, 10)
    plain = ConversationEncoder(**sizes(context)).double().eval()
    plain.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        expected, _ = plain(observations, turn_mask)
        assert torch.equal(encoder(observations, turn_mask)[0], expected)
        unknown = torch.full(turn_mask.shape, -1)
        assert torch.equal(encoder(observations, turn_mask, None, unknown)[0], expected)
        one_speaker = torch.full(turn_mask.shape, 2)
        assert torch.equal(encoder(observations, turn_mask, None, one_speaker)[0], expected)


@every_context
@precisions
@pytest.mark.parametrize("piece", [1, 2, 7])
def test_in_pieces_of_any_size_the_contexts_and_the_state_are_those_of_the_whole(context, dtype, tolerance, piece):
    encoder = make_encoder(context, dtype)
    observations, turn_mask, speaker_ids = make_inputs(2, 15, dtype)
    with torch.no_grad():
        expected, expected_state = encoder(observations, turn_mask, None, speaker_ids)
        state, found = None, []
        for first in range(0, 15, piece):
            part = slice(first, first + piece)
            context_of_part, state = encoder(observations[:, part], turn_mask[:, part], state, speaker_ids[:, part])
            found.append(context_of_part)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=tolerance, rtol=tolerance)
    for name, tensor in expected_state.state_dict().items():
        torch.testing.assert_close(state.state_dict()[name], tensor, atol=tolerance, rtol=tolerance, msg=name)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(SPEAKERS)), st.integers(1, 12), st.integers(0, 2**31))
def test_another_numbering_of_the_speakers_changes_no_bit(order, turns, seed):
    encoder = make_encoder()
    observations, turn_mask, speaker_ids = make_inputs(2, turns, seed=seed)
    renamed = torch.tensor([*order, -1])[speaker_ids]  # index -1 is the last
    with torch.no_grad():
        expected, _ = encoder(observations, turn_mask, None, speaker_ids)
        found, _ = encoder(observations, turn_mask, None, renamed)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_speaker_who_joins_late_begins_as_one_who_spoke_first():
    encoder = make_encoder()
    observations, _, _ = make_inputs(1, 8)
    ids = torch.tensor([[0, 1, 0, 1, 0, 1, 2, 2]])
    everybody = torch.ones(1, 8, dtype=torch.bool)
    with torch.no_grad():
        together, _ = encoder(observations, everybody, None, ids)
        alone, _ = encoder(observations[:, 6:], everybody[:, 6:], None, ids[:, 6:])
    torch.testing.assert_close(together[:, 6:], alone, atol=1e-12, rtol=0)


def test_what_one_speaker_says_changes_no_bit_of_another():
    encoder = make_encoder()
    observations, turn_mask, speaker_ids = make_inputs(2, 12)
    changed = torch.where((speaker_ids == 1)[..., None], observations + 1, observations)
    with torch.no_grad():
        before, after = (encoder(o, turn_mask, None, speaker_ids)[0] for o in (observations, changed))
    others = speaker_ids != 1
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others & turn_mask], after[~others & turn_mask])


def test_gradients_are_those_of_the_loop_over_speakers():
    encoder = make_encoder()
    gradients = []
    for run in (lambda *i: encoder(i[0], i[1], None, i[2])[0], lambda *i: speaker_by_speaker(encoder, *i)):
        observations, turn_mask, speaker_ids = make_inputs(2, 12)
        observations.requires_grad_(True)
        run(observations, turn_mask, speaker_ids).square().sum().backward()
        gradients.append(observations.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-10, rtol=1e-8)


def test_a_turn_costs_the_same_state_after_many_turns_and_touches_one_speaker():
    encoder = make_encoder("mamba_ema", torch.float32)
    observations, _, _ = make_inputs(1, 1, torch.float32)
    mask, state = torch.ones(1, 1, dtype=torch.bool), None
    with torch.no_grad():
        for turn in range(300):
            _, state = encoder(observations, mask, state, torch.tensor([[turn % 3]]))
        shapes = {name: tensor.shape for name, tensor in state.state_dict().items()}
        _, later = encoder(observations + 1, mask, state, torch.tensor([[1]]))
    assert {name: tensor.shape for name, tensor in later.state_dict().items()} == shapes
    for name, tensor in later.state_dict().items():
        same = [torch.equal(tensor[:, row], state.state_dict()[name][:, row]) for row in range(SPEAKERS + 1)]
        assert same == [True, True, False, True, True], name
    assert state.num_turns.tolist() == [[0, 100, 100, 100, 0]]


# The model


def speech(batch, turns, seed=0):
    return torch.randn(batch, turns, 2_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_context
@pytest.mark.parametrize("scope", ["conversation", "speaker", "both"])
def test_streams_with_speakers_equal_the_whole(context, scope):
    model = tiny_model(dtype=torch.float64, context=context, context_scope=scope, max_speakers=3)
    waveforms, ids = speech(2, 5), torch.tensor([[0, 1, 0, 2, 1], [2, -1, 2, 2, 0]])
    with torch.no_grad():
        expected = model(waveforms, speaker_ids=ids).logits
        state, found = None, []
        for turn in range(5):
            outputs = model(
                waveforms[:, turn],
                speaker_ids=ids[:, turn],
                conversation_state=state,
                use_conversation_state=True,
            )
            state = outputs.conversation_state
            found.append(outputs.logits)
    torch.testing.assert_close(torch.stack(found, dim=1), expected, atol=1e-12, rtol=0)
    assert state.num_turns.tolist() == [5, 5]


def test_speakers_change_the_numbers_only_where_they_are_in_scope():
    waveforms = speech(1, 6)
    ids, others = torch.tensor([[0, 1, 0, 1, 0, 1]]), torch.tensor([[0, 0, 1, 1, 0, 0]])
    differences = {}
    for scope in ("conversation", "speaker", "both"):
        model = tiny_model(dtype=torch.float64, context_scope=scope)
        with torch.no_grad():
            differences[scope] = (
                (model(waveforms, speaker_ids=ids).logits - model(waveforms, speaker_ids=others).logits).abs().max()
            )
            none, unknown = model(waveforms).logits, model(waveforms, speaker_ids=torch.full_like(ids, -1)).logits
        assert torch.equal(none, unknown)
    assert differences["conversation"] == 0
    assert differences["speaker"] > 1e-3
    assert differences["both"] > 1e-3


def test_scope_both_has_the_conversations_context_beside_the_speakers():
    model = tiny_model(dtype=torch.float64, context_scope="both")
    waveforms, ids = speech(2, 4), torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        base = model.mamba_ema(waveforms, speaker_ids=ids)
        z, conversation, speaker = base.last_hidden_state.chunk(3, dim=-1)
        present = torch.ones(2, 4, dtype=torch.bool)
        torch.testing.assert_close(conversation, model.mamba_ema.conversation_encoder(z, present)[0])
        torch.testing.assert_close(speaker, model.mamba_ema.speaker_encoder(z, present, None, ids)[0])


def test_states_with_speakers_are_values(tmp_path):
    model = tiny_model(context_scope="both", max_speakers=2)
    waveforms, ids = speech(2, 3).float(), torch.tensor([[0, 1, 0], [1, 1, 0]])
    with torch.no_grad():
        state = model(waveforms, speaker_ids=ids, use_conversation_state=True).conversation_state
        rows = [state.select(row) for row in (1, 0)]
        stacked = ConversationState.stack(rows)
        assert stacked.select([1, 0]) == state
        assert ConversationState.from_state_dict(state.state_dict()) == state
        assert state.copy() == state
        assert state.copy().speakers.ema.data_ptr() != state.speakers.ema.data_ptr()
        torch.save(state, tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt") == state
        nxt = speech(1, 1, seed=5).float()[0]
        expected = model(nxt, speaker_ids=torch.tensor([1]), conversation_state=rows[0]).logits
        both = model(nxt.expand(2, -1), speaker_ids=torch.tensor([1, 0]), conversation_state=stacked).logits
    torch.testing.assert_close(both[:1], expected, atol=1e-6, rtol=0)


def test_a_forgotten_speaker_begins_anew_and_the_others_stay():
    model = tiny_model(dtype=torch.float64, context_scope="speaker", max_speakers=2)
    waveforms = speech(1, 3)
    with torch.no_grad():
        state = model(waveforms, speaker_ids=torch.tensor([[0, 1, 0]]), use_conversation_state=True).conversation_state
        forgotten, turn = state.forget_speaker(0), speech(1, 1, seed=3)[0]
        first = model(turn, speaker_ids=torch.tensor([0])).logits
        assert torch.equal(model(turn, speaker_ids=torch.tensor([0]), conversation_state=forgotten).logits, first)
        one, two = (model(turn, speaker_ids=torch.tensor([1]), conversation_state=s).logits for s in (state, forgotten))
    assert torch.equal(one, two)
    for speaker in (-2, 2):
        with pytest.raises(ValueError, match=f"speaker is {speaker}; allowed are 0 to 1, and -1 for unknown"):
            state.forget_speaker(speaker)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[0, 1, 8]]), r"turn 2 of row 0 has the id 8; allowed are 0 to 7 .*-1 for unknown"),
        (torch.tensor([[0, -2, 1]]), "turn 1 of row 0 has the id -2"),
        (torch.tensor([[0, 1]]), r"speaker_ids are torch.int64 of shape \(1, 2\)"),
        (torch.tensor([[0.0, 1.0, 2.0]]), "speaker_ids are torch.float32"),
        (torch.tensor([[True, False, True]]), "speaker_ids are torch.bool"),
    ],
)
def test_speakers_that_cannot_be_are_refused(ids, message):
    model = tiny_model(context_scope="speaker")
    with pytest.raises(ValueError, match=message):
        model(speech(1, 3).float(), speaker_ids=ids)


def test_padded_turns_may_have_any_speaker():
    model = tiny_model(context_scope="speaker")
    waveforms, mask = speech(1, 3).float(), torch.tensor([[1, 1, 0]])
    with torch.no_grad():
        one = model(waveforms, turn_mask=mask, speaker_ids=torch.tensor([[0, 1, -100]])).logits
        two = model(waveforms, turn_mask=mask, speaker_ids=torch.tensor([[0, 1, 1]])).logits
    torch.testing.assert_close(one, two, equal_nan=True)


def test_a_state_of_another_scope_is_refused():
    states = {}
    for scope in ("conversation", "speaker"):
        model = tiny_model(context_scope=scope)
        states[scope] = model(speech(1, 2).float(), use_conversation_state=True).conversation_state
    with pytest.raises(ValueError, match="state is of another model"):
        tiny_model(context_scope="speaker")(speech(1, 1).float(), conversation_state=states["conversation"])
    with pytest.raises(ValueError, match="state is of another model"):
        tiny_model(context_scope="conversation")(speech(1, 1).float(), conversation_state=states["speaker"])


def test_scope_and_speakers_are_checked_saved_and_loaded(tmp_path):
    with pytest.raises(ValueError, match="context_scope is 'speakers'; allowed are 'conversation', 'speaker', 'both'"):
        tiny_config(context_scope="speakers")
    with pytest.raises(ValueError, match="max_speakers is 0"):
        tiny_config(max_speakers=0)
    model = tiny_model(context_scope="both", max_speakers=3)
    model.save_pretrained(tmp_path)
    loaded = MambaEMAForRegression.from_pretrained(tmp_path).eval()
    waveforms, ids = speech(1, 3).float(), torch.tensor([[0, 2, 0]])
    with torch.no_grad():
        assert torch.equal(loaded(waveforms, speaker_ids=ids).logits, model(waveforms, speaker_ids=ids).logits)
    assert MambaEMAConfig.from_pretrained(tmp_path).max_speakers == 3


def test_a_model_without_context_takes_speakers_and_has_no_state():
    model = tiny_model(context="none", context_scope="both")
    outputs = model(speech(1, 3).float(), speaker_ids=torch.tensor([[0, 1, 0]]), use_conversation_state=True)
    assert outputs.conversation_state is None


@pytest.mark.parametrize("scope", ["speaker", "both"])
def test_speakers_compile_in_one_graph(scope):
    radii = {"0.9": 0.2}
    model = tiny_model(context_scope=scope, max_speakers=2, interval_radii={"valence": radii, "arousal": radii})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    waveforms, ids = speech(2, 3).float(), torch.tensor([[0, 1, 0], [1, -1, 0]])
    with torch.no_grad():
        expected = model(waveforms, speaker_ids=ids)
        found = compiled(waveforms, speaker_ids=ids)
    torch.compiler.reset()
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.intervals, expected.intervals, atol=1e-5, rtol=0)


def simulated_conversations(seed, count, coupling, turns=12):
    """Frames (count, turns, 1, 1, 8) that tell of 7 in 10 turns' emotions, noisily; emotions; who speaks."""
    random = np.random.default_rng([seed, count])
    emotions = np.stack([coupled_walks(turns, coupling, random) for _ in range(count)])
    mixing = np.random.default_rng(7).normal(size=(2, 8))
    tells = random.random((count, turns, 1)) > 0.3
    frames = tells * (emotions - 0.5) @ mixing + random.normal(0, 0.5, (count, turns, 8))
    frames = torch.tensor(frames, dtype=torch.float32)[:, :, None, None]
    inputs = {"frame_values": frames, "frame_mask": torch.ones(count, turns, 1, dtype=torch.bool)}
    inputs["speaker_ids"] = torch.arange(turns).remainder(2).expand(count, -1)
    return inputs, torch.tensor(emotions, dtype=torch.float32)


def ccc_on_simulated_conversations(scope, coupling, seed):
    torch.manual_seed(seed)
    encoder = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16}
    sizes = {"speech_encoder_pooling": "mean", "num_hidden_layers": 1, "dropout": 0.1, "context_scope": scope}
    model = MambaEMAForRegression(tiny_config(speech_encoder_config=encoder, **sizes)).train()
    inputs, labels = simulated_conversations(1, 300, coupling)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(20):
        for rows in torch.randperm(300).split(50):
            loss = model(**{name: tensor[rows] for name, tensor in inputs.items()}, labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    inputs, labels = simulated_conversations(2, 150, coupling)
    with torch.no_grad():
        return 1 - model.eval()(**inputs, labels=labels).loss.item()


@pytest.mark.slow
@pytest.mark.parametrize(("coupling", "better"), [(0.0, "speaker"), (1.0, "conversation")])
def test_the_context_of_those_whose_emotion_drifts_together_helps_most(coupling, better):
    ccc = {
        scope: np.mean([ccc_on_simulated_conversations(scope, coupling, seed) for seed in range(2)])
        for scope in ("conversation", "speaker")
    }
    other = ({*ccc} - {better}).pop()
    assert ccc[better] > ccc[other] + 0.02
