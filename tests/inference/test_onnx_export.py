"""The model in onnxruntime, without torch: the numbers of EmotionTracker, turn by turn."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAForRegression, tiny_wavlm
from modeling_mamba_ema.__main__ import main
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.inference.onnx_export import ConversationStepForExport, export_onnx, quantize_products
from modeling_mamba_ema.sample import load_sample_conversation
from tests.support.models import tiny_model
from tests.support.programs import environment

ONE_LAYER = {"num_hidden_layers": 1}
# Much of what the others have one by one.
TOGETHER = {
    "norm": "layer",
    "speech_encoder_layers": [0, -1],
    "speech_encoder_pooling": "attentive_statistics",
    "speech_encoder_pooling_hidden_size": 8,
    "label_ranges": {"valence": (1, 7)},
    "context_scope": "both",
    "max_speakers": 2,
    "interval_radii": {"valence": {"0.9": 0.3}, "arousal": {"0.9": 0.2}},
}
MODELS = [
    {"norm": "layer", "speech_encoder_layers": [0, -1], "label_ranges": {"valence": (1, 7)}, "seed": 0},
    {
        "norm": "layer",
        "context": "mamba",
        "speech_encoder_pooling": "multihead_attention",
        "speech_encoder_pooling_hidden_size": 8,
        "projection_activation": "silu",
        "activation_layer_norm": True,
        "bounded_predictions": False,
        "do_normalize": False,
        "waveform_mean": 0.01,
        "waveform_std": 0.1,
    },
    {
        "norm": "layer",
        "context": "ema",
        "ema_decay_learnable": True,
        "speech_encoder_pooling": "attentive_statistics",
        "head_hidden_layers": 0,
        "do_normalize": False,
    },
    {"norm": "group", "context": "none", "speech_encoder_pooling": "mean"},
    {
        "norm": "layer",
        "context_scope": "both",
        "max_speakers": 2,
        "interval_radii": {"valence": {"0.9": 0.3}, "arousal": {"0.9": 0.2}},
    },
    {
        "norm": "layer",
        "context_scope": "speaker",
        "context": "ema",
        "predict_spread": True,
        "interval_radii": {"valence": {"0.9": 0.4}, "arousal": {"0.9": 0.3}},
        "scaled_intervals": True,
    },
]
# Names of the turns; with two speakers kept, the third makes the first begin anew.
NAMES = ("anna", "ben", "anna", None, "cleo", "anna", "ben", "", "anna")

# In a process where torch and transformers cannot be imported.
RUNNER = """
import json, sys
for name in ("torch", "transformers", "modeling_mamba_ema", "safetensors"):
    sys.modules[name] = None
import numpy as np
folder, turns, names = sys.argv[1:]
sys.path.insert(0, folder)
from mamba_ema_onnx import OnnxEmotionTracker
tracker = OnnxEmotionTracker(folder)
arrays = np.load(turns)
rows = []
for name, speaker in zip(arrays.files, json.loads(names)):
    heard = tracker.update(arrays[name], speaker)
    rows.append({**heard, "attention": heard["attention"].tolist()})
refused = 0
damaged = [np.full(500, np.nan), np.full(500, 100.0)]
for bad in (np.zeros(399), *damaged, np.zeros((2, 500)), np.zeros(500, int), np.zeros(500_000)):
    try:
        tracker.update(bad)
    except ValueError:
        refused += 1
tracker.reset()
print(json.dumps({"rows": rows, "again": tracker.update(arrays[arrays.files[0]])["values"], "refused": refused}))
"""


def build(fields):
    fields = dict(fields)
    return tiny_model(fields.pop("norm"), speech_encoder_config=ONE_LAYER, **fields)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and the folder that it was exported to: tracing takes most of the time of these tests."""
    model, folder = build(TOGETHER), tmp_path_factory.mktemp("exported")
    files = export_onnx(model, folder)
    assert {path.name for path in files} == {path.name for path in folder.iterdir()}
    return model, folder


def test_onnxruntime_gives_the_trackers_numbers_where_torch_cannot_be_imported(exported, tmp_path):
    model, folder = exported
    assert_the_trackers_numbers(model, folder, tmp_path)
    assert_steps_are_batched_over_conversations(model, folder)


@pytest.mark.slow
@pytest.mark.parametrize("fields", MODELS)
def test_other_models_get_the_trackers_numbers_too(tmp_path, fields):
    model = build(fields)
    export_onnx(model, tmp_path / "onnx")
    assert_the_trackers_numbers(model, tmp_path / "onnx", tmp_path)
    assert_steps_are_batched_over_conversations(model, tmp_path / "onnx")


def assert_the_trackers_numbers(model, folder, tmp_path):
    random = np.random.default_rng(0)
    lengths = (16_000, 400, 5_555, 480_000, 719, 720, 30_001, 8_000)
    turns = [random.normal(0.01, 0.1, length).astype(np.float32) for length in lengths]
    turns.append(np.full(8_000, 1e-5, dtype=np.float32) * random.normal(size=8_000).astype(np.float32))
    np.savez(tmp_path / "turns.npz", *turns)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(folder), str(tmp_path / "turns.npz"), json.dumps(NAMES)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": ""},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    live = EmotionTracker(model, MambaEMAFeatureExtractor.for_model(model.config))
    wanted = [live.update(turn, 16_000, speaker=name) for turn, name in zip(turns, NAMES)]
    assert len(answer["rows"]) == len(wanted)
    for got, row in zip(answer["rows"], wanted):
        assert got["values"] == pytest.approx(row.values, abs=2e-5)
        assert got["label_values"] == pytest.approx(row.label_values, abs=2e-4)
        assert got["low_level"] == row.low_level
        assert (got["intervals"] is None) is (row.intervals is None)
        for label, ends in (row.intervals or {}).items():
            assert got["intervals"][label] == pytest.approx(ends, abs=2e-5)
        assert (got["spread"] is None) is (row.spread is None)
        assert row.spread is None or got["spread"] == pytest.approx(row.spread, abs=2e-5)
        np.testing.assert_allclose(got["attention"], row.attention, atol=2e-5)
    assert wanted[-1].low_level
    assert answer["refused"] == 6
    assert answer["again"] == pytest.approx(wanted[0].values, abs=2e-5)


def assert_steps_are_batched_over_conversations(model, folder):
    import onnxruntime

    step = onnxruntime.InferenceSession(folder / "conversation_step.onnx")
    state = {name: tensor.numpy() for name, tensor in ConversationStepForExport(model).initial_state(5).items()}
    width = model.mamba_ema.projection.in_features
    observations = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0)).numpy()
    alone = [{name: tensor[:1] for name, tensor in state.items()} for _ in range(5)]
    for observed in observations:
        together = step.run(None, {"pooled": observed, **state})
        rows = [step.run(None, {"pooled": observed[row : row + 1], **alone[row]}) for row in range(5)]
        for tensor, expected in zip(together, zip(*rows), strict=True):
            np.testing.assert_allclose(tensor, np.concatenate(expected), atol=1e-5)
        first = len(together) - len(state)
        state = dict(zip(state, together[first:]))
        alone = [dict(zip(state, row[first:])) for row in rows]


@pytest.mark.slow
def test_the_command_exports_a_folder(tmp_path, capsys):
    model = MambaEMAForRegression.from_pretrained_speech_encoder(tiny_wavlm.FOLDER)
    model.save_pretrained(tmp_path / "model")
    for name, options in {"onnx": [], "int8": ["--int8"]}.items():
        assert main(["export", "--model", str(tmp_path / "model"), str(tmp_path / name), *options]) == 0
        assert str(tmp_path / name / "encoder.onnx") in capsys.readouterr().out.splitlines()
    weights = sum(p.numel() * p.element_size() for p in model.speech_encoder.parameters())
    assert (tmp_path / "int8" / "encoder.onnx").stat().st_size < 0.6 * weights


def test_a_model_that_cannot_be_exported_is_refused(tmp_path):
    for model in (tiny_model().train(), tiny_model().double(), tiny_model().bfloat16()):
        with pytest.raises(ValueError, match=r"model.float\(\).cpu\(\).eval\(\)"):
            export_onnx(model, tmp_path)
    with pytest.raises(ValueError, match="8 bits; export the model before"):
        export_onnx(tiny_model().quantize_speech_encoder(), tmp_path)


def test_8_bits_without_onnxruntime_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(ImportError, match="8 bits needs onnxruntime: pip install"):
        export_onnx(tiny_model(), tmp_path / "onnx", int8=True)
    assert not (tmp_path / "onnx").exists()


def test_products_in_8_bits_stay_near_the_trackers_numbers_in_a_smaller_file(exported, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    model, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    quantize_products(tmp_path / "onnx" / "encoder.onnx")
    graph = onnx.load(tmp_path / "onnx" / "encoder.onnx").graph
    assert not {"MatMul", "Gemm"} & {node.op_type for node in graph.node if "weight" in "".join(node.input)}
    monkeypatch.syspath_prepend(tmp_path / "onnx")
    monkeypatch.delitem(sys.modules, "mamba_ema_onnx", raising=False)
    from mamba_ema_onnx import OnnxEmotionTracker

    live = EmotionTracker(model, MambaEMAFeatureExtractor.for_model(model.config))
    rounded = OnnxEmotionTracker(tmp_path / "onnx")
    differences = []
    for turn in load_sample_conversation()[:3]:
        wanted = live.update(turn["waveform"], 16_000, speaker=turn["speaker"]).values
        got = rounded.update(turn["waveform"], turn["speaker"])["values"]
        differences += [abs(got[label] - value) for label, value in wanted.items()]
    assert 0 < max(differences) < 0.03, differences


def test_another_runtime_can_take_the_place_of_the_encoders_session(exported, monkeypatch):
    model, folder = exported
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "mamba_ema_onnx", raising=False)
    from mamba_ema_onnx import OnnxEmotionTracker

    class ByTorch:
        calls = 0

        def run(self, names, inputs):
            self.calls += 1
            with torch.inference_mode():
                pooled, attention, _ = model.speech_encoder(torch.from_numpy(inputs["input_values"]))
            outputs = {"pooled": pooled.numpy(), "attention": attention.numpy()}
            return [outputs[name] for name in names]

    trackers = [OnnxEmotionTracker(folder), OnnxEmotionTracker(folder)]
    trackers[1].encoder = ByTorch()
    for turn in load_sample_conversation()[:2]:
        expected, got = (tracker.update(turn["waveform"], turn["speaker"])["values"] for tracker in trackers)
        assert got == pytest.approx(expected, abs=2e-5)
    assert trackers[1].encoder.calls == 2
