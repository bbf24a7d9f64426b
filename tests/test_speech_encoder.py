"""The speech encoder against transformers' WavLMModel, and its independence of padding."""

import pytest
import torch
from transformers import WavLMModel

from modeling_mamba_ema.speech_encoder import num_frames, receptive_field, wavlm_hidden_states
from tests.helpers import tiny_config, tiny_model

NORMS = ("group", "layer")
LENGTHS = (400, 719, 4_000, 16_000)


def reference(wavlm: WavLMModel, waveform: torch.Tensor) -> list[torch.Tensor]:
    """All hidden states as WavLMModel gives them for one unpadded utterance; the last is `last_hidden_state`."""
    output = wavlm(waveform.unsqueeze(0), output_hidden_states=True)
    return [*(layer[0] for layer in output.hidden_states[:-1]), output.last_hidden_state[0]]


def padded_batch(lengths, samples, fill):
    torch.manual_seed(0)
    waveforms = torch.full((len(lengths), samples), fill, dtype=torch.float64)
    for row, length in enumerate(lengths):
        waveforms[row, :length] = torch.randn(length, dtype=torch.float64)
    return waveforms


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("samples", [16_000, 32_000, 80_000])
def test_every_hidden_state_of_a_padded_batch_equals_wavlm_run_alone(norm, dtype, tolerance, samples):
    wavlm = tiny_model(norm=norm, dtype=dtype).speech_encoder.wavlm
    waveforms = padded_batch(LENGTHS, samples, fill=0.0).to(dtype)
    with torch.no_grad():
        states = wavlm_hidden_states(wavlm, waveforms, torch.tensor(LENGTHS), range(3))
        for row, length in enumerate(LENGTHS):
            frames = num_frames(length, wavlm.config)
            for ours, theirs in zip(states, reference(wavlm, waveforms[row, :length])):
                assert theirs.shape[0] == frames
                torch.testing.assert_close(ours[row, :frames], theirs, atol=tolerance, rtol=tolerance)


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
    encoder.wavlm.encoder.layers[1].register_forward_hook(lambda *_: pytest.fail("layer 2 was computed"))
    encoder(torch.randn(1, 4_000), torch.tensor([4_000]))
    assert not any(p.requires_grad for p in encoder.wavlm.encoder.layers[1].parameters())
    assert all(p.requires_grad for p in encoder.wavlm.encoder.layers[0].parameters())


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
