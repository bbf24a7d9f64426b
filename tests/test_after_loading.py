"""What holds after a model was loaded, relabelled or changed: what is trained, and that settings fit the weights."""

import pytest
import torch

from modeling_mamba_ema import MambaEMAForRegression
from tests.support.models import tiny_config, tiny_model


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("settings", [{"freeze_speech_encoder": True}, {"speech_encoder_layers": 1}])
def test_a_loaded_model_trains_what_it_trained_when_it_was_built(settings, tmp_path):
    model = tiny_model(**settings)
    model.save_pretrained(tmp_path)
    loaded = MambaEMAForRegression.from_pretrained(tmp_path)
    assert trained(loaded) == trained(model) != {name for name, _ in model.named_parameters()}
    assert loaded.train().speech_encoder.backbone.training is not settings.get("freeze_speech_encoder", False)


def test_an_encoder_is_frozen_where_loading_says_so(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = MambaEMAForRegression.from_pretrained(tmp_path, freeze_speech_encoder=True)
    assert not any(parameter.requires_grad for parameter in loaded.speech_encoder.backbone.parameters())
    assert loaded.head.out_proj.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 64),
        ("context", "none"),
        ("context_scope", "both"),
        ("ema_decay", 0.5),
        ("head_activation", "tanh"),
        ("speech_encoder_pooling", "mean"),
        ("speech_encoder_layers", 1),
        ("id2label", {0: "valence", 1: "arousal", 2: "dominance"}),
    ],
)
def test_a_setting_that_no_longer_fits_the_weights_is_refused_when_a_model_is_saved(name, value, tmp_path):
    model = tiny_model()
    setattr(model.config, name, value)
    named = "num_labels" if name == "id2label" else name
    with pytest.raises(ValueError, match=rf"{named} of the configuration was .* when the model was built"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_labels_in_another_order_are_refused_on_loading_and_taken_by_with_changes(tmp_path):
    model = tiny_model(label_ranges={"valence": (1, 7)})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in another order, \['valence', 'arousal'\]"):
        MambaEMAForRegression.from_pretrained(tmp_path, id2label={0: "arousal", 1: "valence"})
    renamed = MambaEMAForRegression.from_pretrained(tmp_path, id2label={0: "arousal", 1: "dominance"})
    assert renamed.config.labels == ["arousal", "dominance"]
    turned = model.with_changes(id2label={0: "arousal", 1: "valence"})
    speech = torch.randn(1, 4_000)
    torch.testing.assert_close(turned(speech).logits[0].flip(0), model(speech).logits[0])


def test_a_model_with_adapters_is_not_changed_by_name():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="adapters change; merge them first"):
        model.with_changes(dropout=0.2)


def test_speaker_ids_of_any_integer_type_are_the_same():
    model = tiny_model(context_scope="speaker")
    turns = torch.randn(1, 3, 2_000)
    wanted = model(turns, speaker_ids=torch.tensor([[0, 1, 0]])).logits
    for dtype in (torch.uint8, torch.int8, torch.int32):
        assert torch.equal(model(turns, speaker_ids=torch.tensor([[0, 1, 0]], dtype=dtype)).logits, wanted)


@pytest.mark.filterwarnings("ignore")  # torch has other ways by now
def test_layers_quantised_by_torch_give_nearly_the_same_numbers():
    model, speech = tiny_model(), torch.randn(2, 3, 4_000)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        torch.testing.assert_close(quantised(speech).logits, model(speech).logits, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "scorer",
    [{}, {"speech_encoder_pooling": "multihead_attention"}, {"speech_encoder_pooling_hidden_size": 8}],
)
def test_pooling_that_starts_uniform_begins_with_the_mean_learns_and_is_loaded_as_it_was_trained(scorer, tmp_path):
    config = tiny_config(context="none", speech_encoder_pooling_uniform_start=True, **scorer)
    model = MambaEMAForRegression(config)
    speech = torch.randn(4, 8_000)
    outputs = model(speech, labels=torch.rand(4, 2))
    weights = outputs.pooling_attentions
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / weights.shape[-1]))
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), lr=10.0).step()
    weights = model.eval()(speech).pooling_attentions.detach()
    assert float((weights - 1 / weights.shape[-1]).abs().max()) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = MambaEMAForRegression.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(speech).pooling_attentions, weights)
