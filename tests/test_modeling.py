"""The whole model: inputs, outputs, gradients, labels. What may not change an answer is in test_invariances.py."""

import itertools
import math

import numpy as np
import pytest
import torch

from modeling_mamba_ema import MambaEMAForRegression, MambaEMAModel
from modeling_mamba_ema.conversation_encoder import CONTEXTS
from modeling_mamba_ema.pooling import POOLINGS
from tests.support.models import features, predict, predict_turn_by_turn, tiny_config, tiny_model

settings = pytest.mark.parametrize(
    ("norm", "pooling", "context"),
    [
        *((norm, pooling, "mamba_ema") for norm, pooling in itertools.product(("group", "layer"), POOLINGS)),
        *(("layer", "attention", context) for context in CONTEXTS if context != "mamba_ema"),
    ],
)
# The general forms of scorer, projection and head, all of them away from their defaults.
GENERAL = {
    "speech_encoder_pooling_hidden_size": 8,
    "projection_activation": "tanh",
    "head_hidden_layers": 0,
    "activation_layer_norm": True,
    "bounded_predictions": False,
}
names = ["float64", "float32"]
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=names)


def turns_of(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(0, 0.1, length).astype(np.float32) for length in lengths]


@pytest.mark.parametrize("pooling", ["attention", "multihead_attention", "attentive_statistics"])
@precisions
def test_the_general_forms_give_the_same_numbers_alone_in_a_batch_and_in_a_stream(pooling, dtype, tolerance):
    model = tiny_model(dtype=dtype, speech_encoder_pooling=pooling, **GENERAL)
    turns = turns_of(4_000, 400, 24_000)
    streamed = predict_turn_by_turn(model, turns)
    batch = predict(model, [[turns[2]], turns, [turns[1], turns[0]]]).logits
    torch.testing.assert_close(batch[1], streamed, atol=tolerance, rtol=0)
    alone = predict(model, turns[2]).logits[0]
    assert not torch.allclose(alone, streamed[2], atol=1e-3), "the context must change the numbers"
    torch.testing.assert_close(batch[0, 0], alone, atol=tolerance, rtol=0)


FORMS = {
    "default": {},
    "no hidden layer": {"head_hidden_layers": 0, "bounded_predictions": False, "projection_activation": "tanh"},
    "layer norms": {"activation_layer_norm": True, "projection_activation": "relu", "head_activation": "silu"},
    "nothing but linear layers": {"head_hidden_layers": 0, "activation_layer_norm": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("context", ["none", "ema"])
def test_projection_and_head_are_the_equations_of_their_docstrings(form, context):
    fields = FORMS[form]
    model = tiny_model(dtype=torch.float64, context=context, **fields)
    a, b = turns_of(2_000, 3_000)
    outputs = predict(model, [[a, b]])
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items() if ".speech_encoder." not in name}
    functions = {
        None: lambda x: x,
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    }

    def activated(x, name, prefix):
        if name is not None and fields.get("activation_layer_norm"):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * weights[f"{prefix}.norm.weight"] + weights[f"{prefix}.norm.bias"]
        return functions[name](x)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    pooled = outputs.pooled_output[0].numpy()  # (turns, pooled size)
    z = activated(
        linear(pooled, "mamba_ema.projection"), fields.get("projection_activation"), "mamba_ema.projection_activation"
    )
    c = np.stack([z[0], 0.8 * z[0] + 0.2 * z[1]]) if context == "ema" else z[:, :0]
    if fields.get("head_hidden_layers", 1):
        hidden = linear(np.concatenate([z, c], axis=-1), "head.dense")
        scores = linear(activated(hidden, fields.get("head_activation", "gelu"), "head.activation"), "head.out_proj")
    else:
        scores = linear(z, "head.out_proj") + (linear(c, "head.context_proj") if context == "ema" else 0.0)
    expected = 1 / (1 + np.exp(-scores)) if fields.get("bounded_predictions", True) else scores
    np.testing.assert_allclose(outputs.logits[0].numpy(), expected, atol=1e-12)


def test_a_part_of_the_head_that_reads_a_new_context_alone_begins_at_zero():
    model = MambaEMAForRegression(tiny_config(head_hidden_layers=0))
    assert not model.head.context_proj.weight.any()
    assert model.head.out_proj.weight.all()


def test_unbounded_predictions_leave_the_unit_scale_and_are_learned_all_the_same():
    model = tiny_model(**GENERAL)
    logits = predict(model, [turns_of(2_000, 3_000, 4_000)]).logits
    assert ((logits < 0) | (logits > 1)).any()
    labels = torch.rand(1, 3, 2, generator=torch.Generator().manual_seed(0))
    model.train()(**features([turns_of(2_000, 3_000, 4_000)]), labels=labels).loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if p.requires_grad and "head" in name)


def test_dropout_of_the_pooled_vector_is_off_unless_asked_for():
    speech = features(turns_of(4_000))
    for probability, same in ((0.0, True), (0.5, False)):
        model = tiny_model(pooled_dropout=probability, freeze_speech_encoder=True).train()
        torch.manual_seed(0)
        first, second = model(**speech).logits, model(**speech).logits
        assert torch.equal(first, second) == same


def test_padded_turns_have_no_numbers_and_predictions_lie_on_the_unit_scale():
    logits = predict(tiny_model(), [turns_of(2_000, 3_000), turns_of(1_000)]).logits
    assert torch.isnan(logits[1, 1]).all()
    assert ((logits[~torch.isnan(logits)] >= 0) & (logits[~torch.isnan(logits)] <= 1)).all()


def test_attention_comes_back_as_weights_over_the_valid_frames():
    model = tiny_model(speech_encoder_pooling="multihead_attention", speech_encoder_pooling_heads=4)
    weights = predict(model, [turns_of(16_000, 4_000), turns_of(8_000)]).pooling_attentions
    assert weights.shape == (2, 2, 4, 49)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4))
    assert not weights[0, 1, :, 12:].any()
    assert not weights[1, 1].any()


def test_cached_frames_give_the_numbers_of_the_waveform():
    model = tiny_model(speech_encoder_layers=[0, -1])
    a, b, c = turns_of(2_000, 8_000, 2_500)
    inputs = features([[a, b], [c]])
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        frames = torch.stack(
            [expected.hidden_states[layer] for layer in (0, 2)], dim=2
        )  # (2, 2, layers, frames, hidden)
        mask = expected.pooling_attentions[:, :, 0] > 0
        cached = model(frame_values=frames, frame_mask=mask)
    torch.testing.assert_close(cached.logits, expected.logits, atol=1e-6, rtol=0, equal_nan=True)


@settings
def test_every_trainable_parameter_receives_a_gradient(norm, pooling, context):
    model = tiny_model(
        norm=norm,
        speech_encoder_pooling=pooling,
        context=context,
        speech_encoder_layers=[1, -1],
        ema_decay_learnable=True,
    ).train()
    speech = [turns_of(16_000, 9_000, 12_000), turns_of(7_000, 8_000)]
    labels = torch.rand(2, 3, 2)
    model(**features(speech), labels=labels).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # Softmax over time does not change when all scores move together, so the bias of the attention has gradient 0.
    assert [name for name in without if not name.endswith("speech_encoder.attention.bias")] == []
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_missing_labels_and_padded_turns_do_not_count_in_the_loss():
    model = tiny_model()
    speech = [turns_of(2_000, 3_000, 900), turns_of(1_000)]
    labels = torch.full((2, 3, 2), -100.0)
    labels[0] = torch.tensor([[0.1, 0.2], [0.5, -100.0], [0.9, 0.7]])
    labels[1, 0] = torch.tensor([0.3, 0.4])
    with torch.no_grad():
        outputs = model(**features(speech), labels=labels)
    from modeling_mamba_ema.ccc_loss import ccc_loss

    rows = [(0, 0), (0, 1), (0, 2), (1, 0)]
    expected = ccc_loss(torch.stack([outputs.logits[row] for row in rows]), torch.stack([labels[row] for row in rows]))
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.promise("A-07")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0.5, float("nan")], [0.5, 0.5]]), r"label at \[0, 1\] is NaN"),
        (torch.tensor([[0.5, 0.5], [4.0, 0.5]]), r"label at \[1, 0\] is 4, but labels are on the unit scale"),
        (torch.rand(2), "labels have shape"),
        (torch.rand(2, 3), "labels have shape"),
    ],
)
def test_labels_that_cannot_be_right_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**features(turns_of(2_000, 3_000)), labels=labels)


@pytest.mark.promise("A-07")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["attention_mask"][1].zero_(), "row 1 of the batch has no valid turn"),
        (lambda f: f["attention_mask"][1, 399:].zero_(), "turn 0 of row 1 has 399 valid samples; at least 400"),
        (lambda f: f["attention_mask"][0, :10].zero_(), "gap or is left-padded"),
        (lambda f: f["attention_mask"][0, 50:60].zero_(), "gap or is left-padded"),
        (lambda f: f["attention_mask"].mul_(2), "must hold 0 and 1 only"),
        (lambda f: f.update(attention_mask=f["attention_mask"][:, :-1]), "attention_mask has shape"),
        (lambda f: f.update(attention_mask=f["attention_mask"][:1]), "attention_mask has shape"),
        (lambda f: f.update(attention_mask=torch.ones(2, 9)), "attention_mask has shape"),
        (lambda f: f.update(input_values=f["input_values"].int()), "must be floating point"),
        (lambda f: f.update(input_values=f["input_values"][:0]), "not empty"),
        (lambda f: f.update(input_values=f["input_values"][0]), "must be .batch, samples. or .batch, turns, samples."),
        (lambda f: f.update(turn_mask=torch.ones(2, 3)), "turn_mask has shape"),
    ],
)
def test_inputs_that_are_no_complete_utterances_are_refused(change, message):
    inputs = dict(features(turns_of(3_000, 3_000)))
    change(inputs)
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs)


def test_a_state_of_another_batch_or_model_is_refused():
    a, b = turns_of(2_000, 3_000)
    state = predict(tiny_model(), a, use_conversation_state=True).conversation_state
    with pytest.raises(ValueError, match="2"):
        predict(tiny_model(), [a, b], conversation_state=state)
    with pytest.raises(ValueError, match="state"):
        predict(tiny_model(context="ema"), a, conversation_state=state)


def test_predictions_are_read_back_on_the_labels_own_scale():
    model = tiny_model(label_ranges={"valence": (1, 7), "arousal": (-1, 1)})
    scaled = model.to_label_ranges(torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[1.0, -1.0], [4.0, 0.0], [7.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_float32_predictions_close_to_the_full_ones(dtype):
    speech = [turns_of(8_000, 16_000, 3_000)]
    full = predict(tiny_model(), speech).logits
    half = predict(tiny_model().to(dtype), speech, use_conversation_state=True)
    assert half.logits.dtype == torch.float32
    assert half.conversation_state.ema.dtype == torch.float32
    torch.testing.assert_close(half.logits, full, atol=5e-2 if dtype == torch.bfloat16 else 1e-2, rtol=0)


def test_attention_adds_1025_parameters_to_wavlm_large_with_mean_pooling():
    from modeling_mamba_ema import MambaEMAConfig

    def count(pooling):
        with torch.device("meta"):
            return sum(p.numel() for p in MambaEMAModel(MambaEMAConfig(speech_encoder_pooling=pooling)).parameters())

    assert count("attention") - count("mean") == 1025


def test_the_attention_layer_is_one_linear_reachable_on_the_speech_encoder():
    model = tiny_model(speech_encoder_pooling="attention")
    assert model.speech_encoder.pooling == "attention"
    assert isinstance(model.speech_encoder.attention, torch.nn.Linear)
    assert model.speech_encoder.attention.out_features == 1
    assert not hasattr(tiny_model(speech_encoder_pooling="mean").speech_encoder, "attention")


def test_inputs_are_needed_once():
    model = tiny_model()
    with pytest.raises(ValueError, match="either input_values or frame_values"):
        model()
    with pytest.raises(ValueError, match="need frame_mask"):
        model(frame_values=torch.randn(1, 1, 1, 5, tiny_config().speech_encoder_config.hidden_size))


@pytest.mark.promise(
    "A-07", "the model itself refuses masks, values, frames and labels that cannot be right", "every case"
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e19, 32_767.0], ids=str)
def test_a_model_refuses_input_values_that_are_no_normalised_speech(value):
    inputs = features(turns_of(1_200, 1_200, 2_000))
    inputs["input_values"][2, 700] = value
    with pytest.raises(ValueError, match="turn 0 of row 2 of input_values is NaN, infinite or beyond 10000"):
        tiny_model()(**inputs)


FRAMES = torch.randn(2, 3, 1, 9, 32, generator=torch.Generator().manual_seed(0))


FRAME_MASK = torch.ones(2, 3, 9)


@pytest.mark.promise("A-07")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frame_mask": None}, "need frame_mask"),
        ({"frame_values": FRAMES[:, :, 0]}, "must be (batch, turns, 1, frames, 32)"),
        ({"frame_values": FRAMES.expand(2, 3, 2, 9, 32)}, "must be (batch, turns, 1, frames, 32)"),
        ({"frame_values": FRAMES[..., :16]}, "must be (batch, turns, 1, frames, 32)"),
        ({"frame_values": FRAMES[:0]}, "must be (batch, turns, 1, frames, 32)"),
        ({"frame_mask": FRAME_MASK[..., :8]}, "frame_mask has shape (2, 3, 8), but must be (2, 3, 9)"),
        ({"frame_mask": 2 * FRAME_MASK}, "frame_mask must hold 0 and 1 only"),
        ({"frame_mask": 0 * FRAME_MASK}, "row 0 of the batch has no valid turn"),
        ({"turn_mask": torch.ones(2, 2)}, "turn_mask has shape (2, 2), but must be (2, 3)"),
        (
            {"frame_mask": FRAME_MASK * torch.tensor([1, 0, 1])[:, None], "turn_mask": torch.ones(2, 3)},
            "turn 1 of row 0 has no frame in frame_mask",
        ),
        ({"input_values": torch.randn(2, 3, 1_000)}, "either input_values or frame_values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_refuses_cached_frames_that_are_not_its_own(changes, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        tiny_model()(**({"frame_values": FRAMES, "frame_mask": FRAME_MASK} | changes))
    assert says in str(caught.value)


def test_intervals_stand_around_the_predictions_as_the_configuration_says(tmp_path):
    radii = {"valence": {"0.5": 0.1, "0.9": 0.2}, "arousal": {"0.5": 0.3, "0.9": 0.6}}
    model, waveforms = tiny_model(interval_radii=radii), torch.randn(2, 3, 4_000)
    model.save_pretrained(tmp_path)
    model = MambaEMAForRegression.from_pretrained(tmp_path).eval()
    turn_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        outputs = model(waveforms, turn_mask=turn_mask)
        plain = tiny_model()(waveforms, turn_mask=turn_mask)
    assert plain.intervals is None
    assert torch.equal(outputs.logits[turn_mask.bool()], plain.logits[turn_mask.bool()])
    reach = torch.tensor([0.2, 0.6])
    expected = torch.stack([(outputs.logits - reach).clamp(min=0), (outputs.logits + reach).clamp(max=1)], dim=-1)
    torch.testing.assert_close(outputs.intervals, expected, equal_nan=True)
    assert outputs.intervals[1, 2].isnan().all()
    model.config.interval_level = 0.5
    torch.testing.assert_close(
        model.intervals(outputs.logits)[..., 1, 1], (outputs.logits[..., 1] + 0.3).clamp(max=1), equal_nan=True
    )
    assert [model.config.confidence("valence", value) for value in (0.55, 0.35, 0.75)] == [0, 0.5, 0.9]
    # Another model errs otherwise.
    assert model.config.with_changes(context="none").interval_radii is None
    assert type(model.config).from_pretrained(tmp_path, num_labels=3).interval_radii is None
    unbounded = tiny_model(interval_radii=radii, bounded_predictions=False)
    with torch.no_grad():
        outputs = unbounded(waveforms)
    torch.testing.assert_close(outputs.intervals.mean(dim=-1), outputs.logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval_radii": {"valence": {"0.9": 0.1}}}, r"no '0.9' \(interval_level\) of arousal"),
        ({"interval_radii": {key: {"0.9": 0.1} for key in ("valence", "arousal", "anger")}}, "'anger'"),
        ({"interval_radii": {key: {"0.9": -1} for key in ("valence", "arousal")}}, "-1"),
        ({"interval_radii": {key: {"0.9": 0.1, "90": 0.1} for key in ("valence", "arousal")}}, "a level .* 90"),
        ({"interval_level": 2}, "interval_level is 2"),
    ],
)
def test_intervals_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
