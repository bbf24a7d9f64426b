"""A folder for audonnx gives its users the tracker's numbers."""

import numpy as np
import pytest

pytest.importorskip("audonnx", reason="needs audonnx: pip install audonnx")
pytest.importorskip("onnxscript", reason="export needs onnxscript: pip install '.[onnx]'")

import audinterface
import audonnx

from modeling_mamba_ema.inference import EmotionTracker
from tests.support.models import tiny_model
from tests.support.programs import call_command

RATE = 16_000


@pytest.mark.parametrize(
    ("norm", "context"), [("group", "mamba_ema"), pytest.param("layer", "none", marks=pytest.mark.slow)]
)
def test_an_utterance_gets_the_trackers_numbers_on_the_labels_scales(tmp_path, norm, context):
    tiny_model(norm, context=context, label_ranges={"valence": (1, 7)}).save_pretrained(tmp_path / "model")
    assert call_command("export", "--audonnx", "--model", tmp_path / "model", tmp_path / "audonnx") == 0
    tracker = EmotionTracker.from_pretrained(tmp_path / "model")
    model = audonnx.load(str(tmp_path / "audonnx"))
    interface = audinterface.Feature(
        model.labels("logits"), process_func=model, process_func_args={"outputs": "logits"}, sampling_rate=RATE
    )
    for seed, samples in enumerate((400, 8_000, 23_456)):
        signal = np.random.default_rng(seed).normal(0.1, 0.1, samples).astype(np.float32)
        tracker.reset()
        wanted = tracker.update(signal, RATE).label_values
        assert interface.process_signal(signal, RATE).iloc[0].to_dict() == pytest.approx(wanted, abs=2e-4)
        assert model(signal, RATE)["hidden_states"].shape == (1, tracker.model.config.speech_encoder_config.hidden_size)
