"""A changed model starts from the trained one: what both have is kept, what is new changes no number and can learn."""

import pytest
import torch

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.adoption import adopt
from tests.support.models import tiny_config, tiny_model
from tests.support.published_models import (
    NARROW,
    AudeeringModel,
    OdysseyModel,
    publish,
    with_random_weights,
    write_encoder_config,
)

CONTEXTS = [
    {"context": "ema"},
    {"context": "mamba"},
    {"context": "mamba_ema"},
    {"context": "mamba_ema", "context_scope": "both"},
    {"context": "ema", "context_scope": "speaker"},
]
every_context = pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: " ".join(context.values()))


@pytest.fixture(scope="module", params=["odyssey", "audeering"])
def adopted(request, tmp_path_factory):
    """The folder of an adopted model."""
    folder = tmp_path_factory.mktemp(request.param)
    model = with_random_weights({"odyssey": OdysseyModel, "audeering": AudeeringModel}[request.param](NARROW))
    publish(model, folder / "published")
    encoder = write_encoder_config(NARROW, folder / "encoder") if request.param == "odyssey" else None
    adopt(str(folder / "published"), folder / "model", encoder_config=None if encoder is None else str(encoder))
    return folder / "model"


@pytest.fixture
def conversations():
    """Two conversations of up to 4 turns of different lengths, and labels for them."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_values": torch.randn(2, 4, 6_000, generator=generator), "attention_mask": torch.ones(2, 4, 6_000)}
    inputs["attention_mask"][0, 1, 4_000:] = 0
    inputs["attention_mask"][1, 3] = 0
    inputs["speaker_ids"] = torch.tensor([[0, 1, 0, 1], [1, 1, 0, -1]])
    return inputs, torch.rand(2, 4, 3, generator=generator)


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def new_parts(model):
    names = ("conversation_encoder.", "speaker_encoder.", "context_proj.")
    return {name: p for name, p in model.named_parameters() if any(part in name for part in names)}


# Conversation on top of a model of single utterances


@every_context
def test_a_context_on_top_of_an_adopted_model_changes_no_bit_before_the_first_step(adopted, conversations, context):
    inputs, _ = conversations
    trained = MambaEMAForRegression.from_pretrained(adopted)
    expected = logits(trained, inputs)
    for model in (
        trained.with_changes(**context),
        MambaEMAForRegression.from_pretrained(adopted, **context),
    ):
        assert model.config.context == context["context"]
        assert model.mamba_ema.contexts
        found = logits(model, inputs)
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        waveform = inputs["input_values"][0, :1]
        assert torch.equal(logits(model, {"input_values": waveform}), logits(trained, {"input_values": waveform}))


@every_context
def test_gradients_reach_a_new_context_and_it_learns(adopted, conversations, context):
    inputs, labels = conversations
    torch.manual_seed(0)
    model = MambaEMAForRegression.from_pretrained(adopted).with_changes(**context, dropout=0.0, pooled_dropout=0.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new_parts(model))
    optimizer = torch.optim.Adam(new_parts(model).values(), lr=2e-2)
    losses = []
    for step in range(30):
        loss = model.train()(**inputs, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        unreached = {name for name, p in new_parts(model).items() if p.grad is None or not p.grad.any()}
        # At first only the part of the head that reads the context has a gradient; it then gives the context one.
        assert "head.context_proj.weight" not in unreached
        assert step == 0 or not unreached
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05


def test_a_model_with_a_new_context_streams_saves_and_loads(adopted, conversations, tmp_path):
    inputs, _ = conversations
    model = MambaEMAForRegression.from_pretrained(adopted).with_changes(context="mamba_ema").eval()
    torch.nn.init.normal_(model.head.context_proj.weight)
    whole = logits(model, inputs)
    state, streamed = None, []
    for turn in range(3):
        with torch.no_grad():
            outputs = model(
                inputs["input_values"][:, turn],
                inputs["attention_mask"][:, turn],
                conversation_state=state,
                use_conversation_state=True,
            )
        state = outputs.conversation_state
        streamed.append(outputs.logits)
    torch.testing.assert_close(torch.stack(streamed, dim=1), whole[:, :3], atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    again, loading = MambaEMAForRegression.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert torch.equal(logits(again, inputs).nan_to_num(7.0), whole.nan_to_num(7.0))
    assert MambaEMAFeatureExtractor.from_pretrained(tmp_path).waveform_std == model.config.waveform_std


def test_a_context_on_a_head_with_a_hidden_layer_begins_at_zero_too(conversations):
    inputs, _ = conversations
    trained = tiny_model(context="none", id2label=dict(enumerate(("valence", "arousal", "dominance"))))
    model = trained.with_changes(context="mamba_ema")
    torch.testing.assert_close(logits(model, inputs), logits(trained, inputs), atol=1e-6, rtol=0, equal_nan=True)
    model.train()(**inputs, labels=conversations[1]).loss.backward()
    width = trained.config.hidden_size
    assert not model.head.dense.weight[:, width:].any()
    assert model.head.dense.weight.grad[:, width:].abs().max() > 0


def test_contexts_are_known_by_whose_turns_they_are_of(conversations):
    """From the speaker's own to both: what read the speaker's context reads it from its new place."""
    inputs, _ = conversations
    labels = {"id2label": {0: "valence", 1: "arousal", 2: "dominance"}}
    for head in ({"head_hidden_layers": 1}, {"head_hidden_layers": 0}):
        trained = tiny_model(context="mamba_ema", context_scope="speaker", **labels, **head)
        model = trained.with_changes(context_scope="both")
        torch.testing.assert_close(logits(model, inputs), logits(trained, inputs), atol=1e-6, rtol=0, equal_nan=True)
        again = model.with_changes(context_scope="speaker")
        torch.testing.assert_close(logits(again, inputs), logits(trained, inputs), atol=1e-6, rtol=0, equal_nan=True)


# Other changes


def test_a_label_is_added_or_left_out_by_its_name(adopted, conversations):
    inputs, _ = conversations
    trained = MambaEMAForRegression.from_pretrained(adopted)  # arousal, dominance, valence
    before = logits(trained, inputs)
    more = trained.with_changes(id2label={0: "valence", 1: "arousal", 2: "tension", 3: "dominance"})
    found = logits(more, inputs)
    torch.testing.assert_close(found[..., [1, 3, 0]], before, atol=1e-6, rtol=0, equal_nan=True)
    assert more.config.label_ranges == {name: [1.0, 7.0] for name in ("arousal", "dominance", "valence")}
    less = trained.with_changes(id2label={0: "valence"})
    torch.testing.assert_close(logits(less, inputs), before[..., 2:], atol=1e-6, rtol=0, equal_nan=True)
    assert less.config.label_ranges == {"valence": [1.0, 7.0]}


def test_deviations_beside_the_means_change_nothing_at_first(conversations):
    inputs, _ = conversations
    trained = tiny_model(speech_encoder_pooling="mean", id2label={0: "valence", 1: "arousal", 2: "dominance"})
    model = trained.with_changes(speech_encoder_pooling="statistics")
    torch.testing.assert_close(logits(model, inputs), logits(trained, inputs), atol=1e-6, rtol=0, equal_nan=True)
    model.train()(**inputs, labels=conversations[1]).loss.backward()
    assert model.mamba_ema.projection.weight.grad[:, 32:].abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"speech_encoder_pooling": "attention"}, {"mamba_ema.speech_encoder.attention"}),
        ({"speech_encoder_layers": [0, -1]}, {"mamba_ema.speech_encoder.layer_weights"}),
        ({"head_hidden_layers": 0}, {"head.out_proj", "head.context_proj"}),
        ({"num_hidden_layers": 3}, {"mamba_ema.conversation_encoder.layers.2"}),
        (
            {"hidden_size": 16},
            {"mamba_ema.projection", "mamba_ema.conversation_encoder", "head.dense", "head.out_proj.weight"},
        ),
        ({"dropout": 0.3, "speech_encoder_config": {"hidden_dropout": 0.2}}, set()),
    ],
)
def test_everything_that_fits_is_kept(changes, new):
    trained = tiny_model(speech_encoder_pooling="mean", context="mamba_ema")
    model = trained.with_changes(**changes)
    before, after = trained.state_dict(), model.state_dict()
    changed = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    assert all(any(name.startswith(prefix) for prefix in new) for name in changed), changed
    assert all(any(name.startswith(prefix) for name in changed) for prefix in new), new


def test_other_layers_do_not_inherit_the_weights_of_the_layers_before():
    trained = tiny_model(speech_encoder_layers=[0, 1])
    torch.nn.init.ones_(trained.speech_encoder.layer_weights)
    assert trained.with_changes(speech_encoder_layers=[0, 1]).speech_encoder.layer_weights.tolist() == [1.0, 1.0]
    assert trained.with_changes(speech_encoder_layers=[1, 2]).speech_encoder.layer_weights.tolist() == [0.0, 0.0]


def test_what_is_new_and_what_was_dropped_is_logged(caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        tiny_model(speech_encoder_pooling="attention", context="none").with_changes(
            speech_encoder_pooling="mean", context="ema", ema_decay_learnable=True
        )
    finally:
        logging.disable_propagation()
    (message,) = [record.message for record in caplog.records if "changed model" in record.message]
    assert "new: mamba_ema.conversation_encoder" in message
    assert "new in part: head.dense" in message
    assert "dropped: mamba_ema.speech_encoder" in message


def test_a_changed_model_keeps_device_dtype_and_mode_and_leaves_the_old_one_alone():
    trained = tiny_model(context="none", dtype=torch.float64)
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    model = trained.with_changes(context="ema", freeze_speech_encoder=True)
    assert model.dtype == torch.float64
    assert not model.training
    assert not any(p.requires_grad for p in model.speech_encoder.backbone.parameters())
    torch.nn.init.zeros_(model.head.out_proj.weight)
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    assert trained.config.context == "none"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"contxt": "ema"}, "a field to change is 'contxt'; allowed are 'activation_layer_norm'"),
        ({"context": "lstm"}, "context is 'lstm'"),
        ({"label_ranges": {"joy": [0, 1]}}, "'joy'"),
        ({"id2label": {0: "valence"}, "label_ranges": {"valense": [1, 7]}}, "'valense'"),
        ({"speech_encoder_config": {"hiden_dropout": 0.1}}, "speech_encoder_config.hiden_dropout is no field"),
        ({"speech_encoder_config": [0.1]}, "speech_encoder_config must be a dict of fields here, not list"),
        ({"num_labels": 3, "id2label": {0: "valence"}}, "num_labels is 3"),
    ],
)
def test_changes_that_cannot_be_meant_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        tiny_model().with_changes(**changes)


def test_what_was_frozen_of_the_encoder_stays_frozen_unless_told_otherwise():
    model = tiny_model(context="none")
    encoder = model.speech_encoder.backbone
    model.freeze_feature_encoder()
    changed = model.with_changes(context="ema").speech_encoder.backbone
    assert trained_parts(changed) == trained_parts(encoder)
    model.freeze_base_model()
    assert not trained_parts(model.with_changes(context="ema").speech_encoder.backbone)
    assert trained_parts(model.with_changes(freeze_speech_encoder=False).speech_encoder.backbone)


def trained_parts(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_as_many_labels_as_before_keep_their_names_and_ranges():
    config = tiny_config(label_ranges={"valence": (1, 7)}).with_changes(num_labels=2, dropout=0.3)
    assert (config.labels, config.label_ranges) == (["valence", "arousal"], {"valence": [1, 7]})
