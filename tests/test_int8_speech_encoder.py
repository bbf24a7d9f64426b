"""The speech encoder in 8 bits: near to float32, a quarter of the memory, and for inference only."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_mamba_ema import MambaEMAForRegression
from modeling_mamba_ema.fast_speech_encoder import Int8Linear, fast_hidden_states, quantize_linear_layers
from modeling_mamba_ema.training import add_lora

from .support.models import tiny_model
from .test_fast_speech_encoder import backbone, batch, every_kind


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """Each row to the nearest of 255 steps, in float64"""
    scale = rows.double().abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(scale > 0, (rows.double() / scale).round() * scale, 0.0)


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_the_product_of_rounded_rows_and_rounded_weights(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    hidden = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e4]).repeat(8)
    expected = rounded(hidden) @ rounded(layer.weight).t() + (layer.bias.double() if bias else 0.0)
    with torch.no_grad():
        torch.testing.assert_close(Int8Linear(layer)(hidden).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    layer = Int8Linear(nn.Linear(24, 40))
    row = torch.randn(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.cat([row, 1e4 * torch.randn(3, 24)]))[:1], layer(row), rtol=0, atol=0)


def test_silence_and_weights_that_are_zero_give_the_bias():
    layer = nn.Linear(24, 40)
    nn.init.zeros_(layer.weight[:3])
    with torch.no_grad():
        assert torch.equal(Int8Linear(layer)(torch.zeros(2, 24)), layer.bias.expand(2, -1))
        assert torch.equal(Int8Linear(layer)(torch.randn(2, 24))[:, :3], layer.bias[:3].expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_hidden_states_stay_near_those_of_float32(kind, dtype):
    model = backbone(kind, "layer")
    waveforms, lengths = batch([16_000, 9_000])
    with torch.no_grad():
        (expected,) = fast_hidden_states(model, waveforms, lengths, [3])
        model = model.to(dtype)
        quantize_linear_layers(model)
        (fast,) = fast_hidden_states(model, waveforms, lengths, [3])
    assert (fast.float() - expected).norm() < 0.1 * expected.norm()
    assert not torch.equal(fast.float(), expected)


def test_without_the_fast_path_the_numbers_are_the_same():
    model = tiny_model().quantize_speech_encoder()
    waveforms = torch.randn(1, 2, 9000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        fast = model(waveforms).logits
        model.speech_encoder.backbone.encoder.layers[0].register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(waveforms).logits, fast, rtol=0, atol=2e-3)


def test_weights_take_a_quarter_of_their_memory():
    model = tiny_model()
    layers = {
        name: module
        for name, module in model.named_modules()
        if ".encoder.layers." in name and name.endswith(("_proj", "_dense"))
    }
    assert len(layers) == 6 * model.config.speech_encoder_config.num_hidden_layers
    before = {name: layer.weight.numel() * layer.weight.element_size() for name, layer in layers.items()}
    assert model.quantize_speech_encoder() is model
    for name, size in before.items():
        layer = model.get_submodule(name)
        assert layer.weight.numel() * layer.weight.element_size() == size / 4
    assert not any(parameter.requires_grad for parameter in model.speech_encoder.backbone.parameters())


def test_no_gradient_is_given():
    model = tiny_model().quantize_speech_encoder()
    assert not model.training
    with pytest.raises(RuntimeError, match="no gradient"):
        model(torch.randn(1, 1, 8000, requires_grad=True))


def test_transformers_trainer_refuses_before_the_first_step(tmp_path):
    model = tiny_model().quantize_speech_encoder()
    data = [{"input_values": torch.randn(1, 8000), "labels": torch.rand(1, 2)} for _ in range(2)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="8 bits; train the model before"):
        Trainer(model, arguments, train_dataset=data).train()


def test_what_8_bits_cannot_do_is_refused(tmp_path):
    model = tiny_model()
    model.quantize_speech_encoder()
    with pytest.raises(ValueError, match="8 bits; save the model before"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="8 bits; change the model before"):
        model.with_changes(context="ema")
    with pytest.raises(ValueError, match="is Int8Linear"):
        model.quantize_speech_encoder()
    adapted = tiny_model()
    add_lora(adapted, {"r": 2}, "microsoft/wavlm-large", "main")
    with pytest.raises(ValueError, match="without adapters \\(merge them\\)"):
        adapted.quantize_speech_encoder()


def test_a_saved_model_is_quantised_after_loading_and_predicts_nearly_the_same(saved_model):
    waveforms = torch.randn(1, 3, 9000, generator=torch.Generator().manual_seed(0))
    model = MambaEMAForRegression.from_pretrained(saved_model).eval()
    with torch.inference_mode():
        before = model(waveforms).logits
        after = model.quantize_speech_encoder()(waveforms).logits
    torch.testing.assert_close(after, before, rtol=0, atol=0.02)
    assert not torch.equal(after, before)
