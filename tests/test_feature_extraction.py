"""MambaEMAFeatureExtractor: shapes, scales, folders. What is refused is in tests/test_bad_input.py."""

import numpy as np
import pytest
import torch

from modeling_mamba_ema import MambaEMAFeatureExtractor
from tests.support.models import tiny_config

RATE = 16_000


@pytest.fixture
def extractor():
    return MambaEMAFeatureExtractor()


def noise(samples, seed=0, scale=0.1):
    return np.random.default_rng(seed).normal(0, scale, samples).astype(np.float32)


def test_one_waveform_is_a_batch_of_one(extractor):
    features = extractor(noise(1_000), sampling_rate=RATE, return_tensors="pt")
    assert features["input_values"].shape == features["attention_mask"].shape == (1, 1_000)
    assert features["input_values"].dtype == torch.float32


def test_utterances_are_padded_on_the_right_and_masked(extractor):
    features = extractor([noise(1_000), noise(600)], sampling_rate=RATE, return_tensors="np")
    assert features["input_values"].shape == (2, 1_000)
    assert features["attention_mask"].sum(1).tolist() == [1_000, 600]
    assert not features["input_values"][1, 600:].any()


def test_conversations_are_padded_in_turns_and_in_samples(extractor):
    batch = [[noise(1_000), noise(500)], [noise(700)]]
    features = extractor(batch, sampling_rate=RATE, return_tensors="pt")
    assert features["input_values"].shape == features["attention_mask"].shape == (2, 2, 1_000)
    assert features["turn_mask"].tolist() == [[1, 1], [1, 0]]
    assert features["attention_mask"].sum(-1).tolist() == [[1_000, 500], [700, 0]]
    alone = extractor(batch[1][0], sampling_rate=RATE, return_tensors="pt")
    torch.testing.assert_close(features["input_values"][1, 0, :700], alone["input_values"][0], rtol=0, atol=0)


def test_each_utterance_is_normalised_by_itself(extractor):
    values = extractor([noise(9_000, scale=0.01) + 0.3, noise(800)], sampling_rate=RATE)["input_values"]
    for row, length in zip(values, (9_000, 800)):
        assert row[:length].mean() == pytest.approx(0, abs=1e-3)
        assert row[:length].var() == pytest.approx(1, abs=1e-2)


def test_without_normalisation_samples_pass_through():
    waveform = noise(500)
    extractor = MambaEMAFeatureExtractor(do_normalize=False)
    np.testing.assert_array_equal(extractor(waveform, sampling_rate=RATE)["input_values"][0], waveform)


@pytest.mark.parametrize(("dtype", "full_scale"), [(np.int16, 2**15), (np.int32, 2**31), (np.uint8, 2**7)])
def test_integers_are_scaled_by_the_range_of_their_type(dtype, full_scale):
    waveform = np.clip(noise(2_000), -0.99, 0.99)
    integers = np.round(waveform * full_scale + (128 if dtype == np.uint8 else 0)).astype(dtype)
    extractor = MambaEMAFeatureExtractor(do_normalize=False)
    row = extractor([noise(400), integers], sampling_rate=RATE)["input_values"][1]
    np.testing.assert_allclose(row, waveform, atol=1 / full_scale + 1e-7)


def test_another_rate_is_resampled_only_when_asked(extractor):
    seconds = np.arange(8_000) / 8_000
    with pytest.raises(ValueError, match="8000 Hz.*16000 Hz.*resample=True"):
        extractor(np.sin(2 * np.pi * 440 * seconds), sampling_rate=8_000)
    row = extractor(np.sin(2 * np.pi * 440 * seconds), sampling_rate=8_000, resample=True)["input_values"][0]
    expected = np.sqrt(2) * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(row[1_000:-1_000], expected[1_000:-1_000], atol=0.02)


def test_noise_below_70_db_is_flagged_and_not_amplified(extractor):
    features = extractor([noise(2_000, scale=1e-5), noise(2_000)], sampling_rate=RATE, return_low_level=True)
    assert features["low_level"].tolist() == [True, False]
    assert np.abs(features["input_values"][0]).max() < 1e-4


def test_statistics_of_a_corpus_leave_loud_and_quiet_utterances_loud_and_quiet():
    extractor = MambaEMAFeatureExtractor(do_normalize=False, waveform_mean=0.01, waveform_std=0.2)
    loud, quiet, silent = noise(2_000, scale=0.1), noise(900, seed=1, scale=0.001), noise(500, scale=1e-6)
    features = extractor([loud, quiet, silent], sampling_rate=RATE, return_low_level=True)
    for row, waveform in zip(features["input_values"], (loud, quiet, silent)):
        np.testing.assert_array_equal(row[: len(waveform)], (waveform - 0.01) / (0.2 + 1e-6))
        assert row.dtype == np.float32
    assert features["low_level"].tolist() == [False, False, True]
    assert not features["input_values"][1][900:].any()


def test_the_statistics_of_a_corpus_are_saved_and_follow_the_configuration_and_the_encoder(tmp_path):
    statistics = {"do_normalize": False, "waveform_mean": 0.01, "waveform_std": 0.2}
    config = tiny_config(**statistics)
    MambaEMAFeatureExtractor.for_model(config, max_seconds=20).save_pretrained(tmp_path)
    for loaded in (
        MambaEMAFeatureExtractor.from_pretrained(tmp_path),
        MambaEMAFeatureExtractor.from_speech_encoder(tmp_path),
    ):
        assert {name: getattr(loaded, name) for name in statistics} == statistics
    assert MambaEMAFeatureExtractor.from_pretrained(tmp_path).max_seconds == 20


def test_a_folder_gives_the_same_feature_extractor_back(tmp_path):
    MambaEMAFeatureExtractor(do_normalize=False, max_seconds=20).save_pretrained(tmp_path)
    loaded = MambaEMAFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.do_normalize, loaded.max_seconds, loaded.return_attention_mask) == (False, 20, True)


def test_a_wavlm_folder_gives_its_normalisation(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=False).save_pretrained(tmp_path)
    assert MambaEMAFeatureExtractor.from_speech_encoder(tmp_path).do_normalize is False
    assert MambaEMAFeatureExtractor.from_speech_encoder(tmp_path / "none").do_normalize is True
