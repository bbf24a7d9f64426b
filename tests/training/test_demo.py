"""The demo: what ships with the package is what it says, and the trained model measures emotion, not the recording."""

import json

import numpy as np
import pytest
import torch
from transformers import WavLMModel

from modeling_mamba_ema import tiny_wavlm
from modeling_mamba_ema.data.recording_conditions import level_of_speech
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.sample import load_sample_conversation
from modeling_mamba_ema.training import load_run_configuration
from modeling_mamba_ema.training.building import build_model
from tests.support.programs import ROOT, run_program
from tests.support.runs import FINETUNE

DEMO = ROOT / "configuration" / "demo.yaml"


def test_the_shipped_encoder_is_small_and_is_the_demos():
    assert sum(path.stat().st_size for path in tiny_wavlm.FOLDER.iterdir() if path.is_file()) < 4_000_000
    shipped = WavLMModel.from_pretrained(tiny_wavlm.FOLDER, dtype=torch.float32).eval()
    model, _ = build_model(load_run_configuration(DEMO, ["data.source=unread"]))
    backbone = model.speech_encoder.backbone
    assert backbone.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    waveform = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(backbone.eval()(waveform)[0], shipped(waveform)[0])


def test_the_shipped_encoder_has_learnt_what_speech_is():
    """Frames of the same sentence in noise are nearer to its clean frames than those of a random encoder."""
    speech = load_sample_conversation()[0]["waveform"]
    noisy = speech + 0.1 * np.std(speech) * np.random.default_rng(0).standard_normal(speech.size).astype(np.float32)
    waveforms = torch.from_numpy(np.stack([(x - x.mean()) / x.std() for x in (speech, noisy)]))
    shipped = WavLMModel.from_pretrained(tiny_wavlm.FOLDER, dtype=torch.float32).eval()
    torch.manual_seed(0)
    random = WavLMModel(shipped.config).eval()

    def change(encoder):
        with torch.inference_mode():
            clean, disturbed = encoder(waveforms)[0]
        between_frames = (clean - clean.roll(len(clean) // 2, dims=0)).square().mean()
        return float((clean - disturbed).square().mean() / between_frames)

    assert change(shipped) < 0.5 * change(random)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of the demo's run, made as `make demo` makes it."""
    pytest.importorskip("espeakng_loader", reason="the synthesiser: pip install '.[demo]'")
    folder = tmp_path_factory.mktemp("demo")
    run_program("-m", "modeling_mamba_ema", "prepare", "synthetic", "--output", folder / "data")
    places = [f"data.source={folder / 'data'}", f"training.output_dir={folder / 'run'}"]
    run_program(FINETUNE, DEMO, *places, f"data.cache_folder={folder / 'frames'}")
    return folder / "run"


def sample_under(change):
    return [change(turn["waveform"]).astype(np.float32) for turn in load_sample_conversation()]


def values_of(demo, waveforms):
    tracker = EmotionTracker.from_pretrained(demo / "model")
    return [tracker.update(waveform, 16_000) for waveform in waveforms]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_noise_of_30_db_hardly_moves_the_samples_arousal(demo):
    random = np.random.default_rng(0)

    def noisy(speech):
        return speech + level_of_speech(speech, 16_000) * 10 ** (-30 / 20) * random.standard_normal(speech.size)

    clean, heard = (values_of(demo, sample_under(change)) for change in (lambda speech: speech, noisy))
    moved = [abs(a.values["arousal"] - b.values["arousal"]) for a, b in zip(clean, heard)]
    assert max(moved) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_less_than_half_of_the_attention_lies_on_pauses(demo):
    waveforms = sample_under(lambda speech: speech)
    on_pauses = []
    for waveform, heard in zip(waveforms, values_of(demo, waveforms)):
        weights = np.asarray(heard.attention).reshape(-1, np.shape(heard.attention)[-1]).mean(axis=0)
        frames = np.lib.stride_tricks.sliding_window_view(waveform, 400)[::320][: weights.size].astype(np.float64)
        power = np.mean(frames**2, axis=1)
        on_pauses.append(weights[power < 1e-3 * power.max()].sum())
    assert np.mean(on_pauses) < 0.5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_is_better_than_the_mean_on_voices_it_has_not_heard(demo):
    test = json.loads((demo / "results.json").read_text())["test"]
    for label in ("valence", "arousal"):
        assert test[f"ccc_{label}_low"] > 0.1
