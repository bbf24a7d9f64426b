"""The speech encoder: its ways to the same numbers, the choice of layers, freezing."""

import pytest
import torch
from transformers import WavLMModel

from modeling_mamba_ema.speech_encoder import num_frames, padded_hidden_states, receptive_field
from tests.support.models import tiny_config, tiny_model

NORMS = ("group", "layer")
KINDS = ("wavlm", "wav2vec2", "hubert")
LENGTHS = (400, 719, 4_000, 16_000)


def reference(backbone, waveform: torch.Tensor) -> list[torch.Tensor]:
    """All hidden states as transformers' model gives them for one utterance; the last is `last_hidden_state`."""
    output = backbone(waveform.unsqueeze(0), output_hidden_states=True)
    return [*(layer[0] for layer in output.hidden_states[:-1]), output.last_hidden_state[0]]


def padded_batch(lengths, samples, fill):
    torch.manual_seed(0)
    waveforms = torch.full((len(lengths), samples), fill, dtype=torch.float64)
    for row, length in enumerate(lengths):
        waveforms[row, :length] = torch.randn(length, dtype=torch.float64)
    return waveforms


def encoder_of(kind, norm, dtype=torch.float64):
    return tiny_model(norm=norm, dtype=dtype, speech_encoder_config={"model_type": kind}).speech_encoder


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [16_000, 80_000])
def test_every_hidden_state_of_a_padded_batch_is_that_of_the_utterance_alone(kind, norm, samples):
    encoder = encoder_of(kind, norm)
    waveforms = padded_batch(LENGTHS, samples, fill=0.0)
    with torch.no_grad():
        states = padded_hidden_states(encoder.backbone, waveforms, torch.tensor(LENGTHS), range(3))
        for row, length in enumerate(LENGTHS):
            frames = num_frames(length, encoder.backbone.config)
            for ours, theirs in zip(states, reference(encoder.backbone, waveforms[row, :length])):
                assert theirs.shape[0] == frames
                torch.testing.assert_close(ours[row, :frames], theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_hook_anywhere_the_numbers_stay_and_the_hook_runs(kind, norm):
    encoder = encoder_of(kind, norm)
    waveforms, lengths = padded_batch(LENGTHS, 16_000, fill=0.0), torch.tensor(LENGTHS)
    with torch.no_grad():
        expected = encoder.hidden_states(waveforms, lengths, range(3))
    backbone, seen = encoder.backbone, []
    for name in ("", "feature_extractor", "encoder", "encoder.layers.0", "encoder.layers.1.attention"):
        backbone.get_submodule(name).register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    backbone.encoder.layers[0].feed_forward.register_full_backward_hook(lambda *_: seen.append("backward"))
    states = encoder.hidden_states(waveforms, lengths, range(3))
    for ours, theirs in zip(states, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    states[-1].sum().backward()
    assert len(set(seen)) == 6
    assert len(seen) == 6 * len(LENGTHS)


def test_an_adapter_is_honoured_by_each_of_the_three_ways():
    encoder = encoder_of("wavlm", "layer")
    waveforms, lengths = padded_batch(LENGTHS, 16_000, fill=0.0), torch.tensor(LENGTHS)
    attention = encoder.backbone.encoder.layers[0].attention
    attention.v_proj = Tripled(attention.v_proj)
    with torch.no_grad():
        fast = encoder.hidden_states(waveforms, lengths, [2])[0]
        padded = padded_hidden_states(encoder.backbone, waveforms, lengths, [2])[0]
        attention.register_forward_hook(lambda *_: None)
        one_by_one = encoder.hidden_states(waveforms, lengths, [2])[0]
        attention.v_proj = attention.v_proj.linear
        without_adapter = encoder.hidden_states(waveforms, lengths, [2])[0]
    valid = one_by_one != 0
    torch.testing.assert_close(fast[valid], one_by_one[valid], atol=1e-12, rtol=0)
    torch.testing.assert_close(padded[valid], one_by_one[valid], atol=1e-12, rtol=0)
    assert (fast - without_adapter).abs().max() > 1e-3


class Tripled(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden):
        return 3 * self.linear(hidden)


@pytest.mark.parametrize("norm", NORMS)
def test_what_stands_in_the_padding_does_not_matter(norm):
    encoder = tiny_model(norm=norm, dtype=torch.float64).speech_encoder
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        silent, _, _ = encoder(padded_batch(LENGTHS, 20_000, fill=0.0), lengths)
        noisy, _, _ = encoder(padded_batch(LENGTHS, 20_000, fill=3.0), lengths)
    torch.testing.assert_close(silent, noisy, atol=1e-12, rtol=0)


def test_layers_above_the_highest_that_is_read_are_neither_computed_nor_trained():
    encoder = tiny_model(norm="layer", speech_encoder_layers=1).speech_encoder
    waveforms, lengths = torch.randn(1, 4_000), torch.tensor([4_000])
    expected = encoder(waveforms, lengths)[0]
    unread, read = encoder.wavlm.encoder.layers[1], encoder.wavlm.encoder.layers[0]
    assert not any(p.requires_grad for p in unread.parameters())
    assert all(p.requires_grad for p in read.parameters())
    with torch.no_grad():
        for parameter in unread.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(encoder(waveforms, lengths)[0], expected)


def test_several_layers_are_summed_with_softmax_weights():
    encoder = tiny_model(norm="layer", speech_encoder_layers=[0, 1, -1], speech_encoder_pooling="mean").speech_encoder
    with torch.no_grad():
        encoder.layer_weights.copy_(torch.tensor([0.0, 1.0, 2.0]))
        waveform = torch.randn(4_000)
        pooled, _, _ = encoder(waveform.unsqueeze(0), torch.tensor([4_000]))
        layers = torch.stack(reference(encoder.wavlm, waveform))  # (3, frames, hidden)
    weights = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    torch.testing.assert_close(pooled[0], (weights.view(-1, 1, 1) * layers).sum(0).mean(0), atol=1e-5, rtol=1e-5)


def test_one_layer_gives_that_layers_frames():
    encoder = tiny_model(norm="group", speech_encoder_layers=1, speech_encoder_pooling="mean").speech_encoder
    waveform = torch.randn(4_000)
    with torch.no_grad():
        pooled, _, _ = encoder(waveform.unsqueeze(0), torch.tensor([4_000]))
        theirs = reference(encoder.wavlm, waveform)[1].mean(0)
    torch.testing.assert_close(pooled[0], theirs, atol=1e-5, rtol=1e-5)


def test_a_frozen_encoder_stays_in_evaluation_mode_and_gets_no_gradient():
    encoder = tiny_model(freeze_speech_encoder=True).train().speech_encoder
    assert not encoder.wavlm.training
    pooled, _, _ = encoder(torch.randn(2, 4_000), torch.tensor([4_000, 3_000]))
    pooled.sum().backward()
    assert all(p.grad is None for p in encoder.wavlm.parameters())
    assert encoder.attention.weight.grad is not None


def test_weights_of_a_frozen_encoder_can_be_trained_again():
    encoder = tiny_model(freeze_speech_encoder=True).speech_encoder
    encoder.wavlm.encoder.layers[1].requires_grad_(True)
    encoder.train()
    assert encoder.wavlm.training
    encoder(torch.randn(2, 4_000), torch.tensor([4_000, 3_000]))[0].sum().backward()
    trained = {name for name, p in encoder.wavlm.named_parameters() if p.grad is not None}
    assert trained
    assert all(name.startswith("encoder.layers.1.") for name in trained)


def test_the_waveform_gets_a_gradient_through_a_frozen_encoder():
    encoder = tiny_model(freeze_speech_encoder=True).speech_encoder
    waveforms = torch.randn(1, 4_000, requires_grad=True)
    encoder(waveforms, torch.tensor([4_000]))[0].sum().backward()
    assert waveforms.grad.abs().max() > 0


def test_frame_counts_are_those_of_wavlm():
    config = tiny_config().speech_encoder_config
    wavlm = WavLMModel(config).eval()
    for samples in (400, 719, 720, 16_000, 15_999):
        assert wavlm(torch.randn(1, samples)).last_hidden_state.shape[1] == num_frames(samples, config)
    assert receptive_field(config) == 400
    assert num_frames(399, config) <= 0


def test_spec_augment_leaves_utterances_under_a_second_alone():
    encoder = tiny_model(
        speech_encoder_config={"apply_spec_augment": True, "mask_time_prob": 0.5, "hidden_dropout": 0.0}
    ).speech_encoder.train()
    for module in encoder.wavlm.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    with torch.no_grad():
        short = [encoder(torch.ones(1, 3_000).cumsum(1).sin(), torch.tensor([3_000]))[0] for _ in range(2)]
        long = [encoder(torch.ones(1, 32_000).cumsum(1).sin(), torch.tensor([32_000]))[0] for _ in range(2)]
    assert not torch.equal(long[0], long[1])
    assert short[0].shape == short[1].shape
