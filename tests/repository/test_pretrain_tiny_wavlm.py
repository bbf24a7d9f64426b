"""examples/pretrain_tiny_wavlm.py: what it writes is an encoder like the one that ships with the package."""

import numpy as np
import torch
from transformers import WavLMConfig

from modeling_mamba_ema import MambaEMAForRegression, tiny_wavlm
from tests.support.models import TINY_SIZES, predict
from tests.support.programs import run_program


def test_a_few_steps_write_an_encoder_that_a_model_can_start_from(tmp_path):
    sizes = ["--clips", 6, "--clip-seconds", 2.5, "--seconds", 1.2, "--steps", 2, "--batch-size", 2]
    run_program("examples/pretrain_tiny_wavlm.py", "--output", tmp_path, *sizes)
    made, shipped = (WavLMConfig.from_pretrained(folder).to_dict() for folder in (tmp_path, tiny_wavlm.FOLDER))
    changing = ("_name_or_path", "transformers_version")
    assert {k: v for k, v in made.items() if k not in changing} == {
        k: v for k, v in shipped.items() if k not in changing
    }
    model = MambaEMAForRegression.from_pretrained_speech_encoder(tmp_path, **TINY_SIZES).eval()
    waveform = np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)
    assert torch.isfinite(predict(model, waveform).logits).all()
