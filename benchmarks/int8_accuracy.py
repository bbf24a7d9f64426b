"""What 8 bits do to a trained model's numbers: this package's, onnxruntime's and OpenVINO's.

    python benchmarks/int8_accuracy.py MODEL CORPUS [--columns split=split_fold1] [--calibration 64] [--json FILE]

Every turn of the test split is heard in the order of its conversation by the exported model
(`mamba_ema_onnx.OnnxEmotionTracker`), whose encoder alone is another one each time. OpenVINO's activations are
calibrated by NNCF on utterances of the training split, with the convolutions and without them. Reported: CCC, and by
how much predictions differ from float32's, on the unit scale.
"""

import copy
import functools
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from datasets import Dataset
from measuring import COUNT, argument_parser, machine, parsed, report

from modeling_mamba_ema import MambaEMAForRegression
from modeling_mamba_ema.audio_files import load_audio
from modeling_mamba_ema.ccc_loss import MISSING_LABEL
from modeling_mamba_ema.commands.evaluate import renaming
from modeling_mamba_ema.data.dataset import load_emotion_dataset
from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.data.utterances import utterances_of
from modeling_mamba_ema.inference.mamba_ema_onnx import OnnxEmotionTracker
from modeling_mamba_ema.inference.onnx_export import export_onnx
from modeling_mamba_ema.metrics import concordance_cc

REFERENCE = "float32"
CONVOLUTIONS = nncf.IgnoredScope(types=["Convolution", "GroupConvolution"])


class Encoder:
    """A function of (1, samples) that gives pooled frames and attention, in the place of onnxruntime's session."""

    def __init__(self, encode: Callable[[np.ndarray], Any]):
        self.encode = encode

    def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self.encode(inputs["input_values"]))[: len(names)]


def by_torch(model: MambaEMAForRegression, waveform: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode():
        return [output.float().numpy() for output in model.speech_encoder(torch.from_numpy(waveform))[:2]]


def by_openvino(model: Any, waveform: np.ndarray) -> list[np.ndarray]:
    outputs = model(waveform)
    return [outputs["pooled"], outputs["attention"]]


def noted(session: Any, inputs: list[np.ndarray], waveform: np.ndarray) -> list[np.ndarray]:
    inputs.append(waveform)
    return session.run(None, {"input_values": waveform})


def calibrated(path: Path, waveforms: list[np.ndarray], **options: Any) -> Any:
    """An exported encoder in 8 bits; the rest is computed in float32."""
    model = nncf.quantize(
        openvino.Core().read_model(path),
        nncf.Dataset(waveforms),
        subset_size=len(waveforms),
        model_type=nncf.ModelType.TRANSFORMER,
        **options,
    )
    return openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def waveforms_of(rows: Dataset) -> list[np.ndarray]:
    return [load_audio(one.file_name, one.start, one.end) for one in utterances_of(rows)]


def predictions(tracker: OnnxEmotionTracker, rows: Dataset, waveforms: list[np.ndarray]) -> np.ndarray:
    """(turns, labels) of rows that lie in the order of their conversations."""
    speakers = rows["speaker"] if "speaker" in rows.column_names else [None] * len(rows)
    heard, conversation = [], None
    for waveform, speaker, name in zip(waveforms, speakers, rows["conversation_id"]):
        if name != conversation:
            tracker.reset()
            conversation = name
        heard.append(list(tracker.update(waveform, speaker)["values"].values()))
    return np.array(heard)


def encoders_of(model: MambaEMAForRegression, examples: list[np.ndarray]) -> tuple[OnnxEmotionTracker, dict[str, Any]]:
    """The exported model, and the encoders that can take its encoder's place."""
    in_8_bits = {"int8": copy.deepcopy(model), "int8 with bfloat16": copy.deepcopy(model).bfloat16()}
    for quantized in in_8_bits.values():
        quantized.quantize_speech_encoder()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as rounded:
        path = export_onnx(model, folder)[0]
        export_onnx(model, rounded, int8=True)
        tracker, tracker_in_8_bits = OnnxEmotionTracker(folder), OnnxEmotionTracker(rounded)
        session, inputs = tracker.encoder, []
        tracker.encoder = Encoder(functools.partial(noted, session, inputs))
        for waveform in examples:
            tracker.update(waveform)
        by_openvino_in_8_bits = {
            "int8 but for convolutions": calibrated(path, inputs, ignored_scope=CONVOLUTIONS),
            "int8": calibrated(path, inputs),
        }
    return tracker, {
        REFERENCE: session,
        **{f"this package, {name}": Encoder(functools.partial(by_torch, one)) for name, one in in_8_bits.items()},
        "onnxruntime, int8": tracker_in_8_bits.encoder,
        **{
            f"OpenVINO, {name}": Encoder(functools.partial(by_openvino, one))
            for name, one in by_openvino_in_8_bits.items()
        },
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("corpus", help="a corpus with a training and a test split")
    parser.add_argument(
        "--columns", nargs="*", default=[], type=renaming, metavar="NAME=COLUMN", help="such as split=split_fold1"
    )
    parser.add_argument("--calibration", type=COUNT, default=64, help="training utterances for OpenVINO (default 64)")
    arguments = parsed(parser)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    model = MambaEMAForRegression.from_pretrained(arguments.model).eval()
    labels = model.config.labels
    ranges = {label: model.config.label_range(label) for label in labels}
    splits = load_emotion_dataset(arguments.corpus, labels, ranges, dict(arguments.columns))
    if not {"train", "test"} <= set(splits):
        parser.error(f"{arguments.corpus} has the splits {', '.join(splits)}; train and test are needed")
    chosen = np.random.default_rng(0).permutation(len(splits["train"]))[: arguments.calibration]
    tracker, encoders = encoders_of(model, waveforms_of(splits["train"].select(sorted(chosen))))
    waveforms = waveforms_of(splits["test"])
    results = {}
    for name, tracker.encoder in encoders.items():
        results[name] = predictions(tracker, splits["test"], waveforms)
    references = [np.array(splits["test"][label]) for label in labels]
    rows, figures = [], {}
    for name, predicted in results.items():
        pairs = zip(predicted.T, references, strict=True)
        ccc = [concordance_cc(mine[theirs != MISSING_LABEL], theirs[theirs != MISSING_LABEL]) for mine, theirs in pairs]
        difference = np.abs(predicted - results[REFERENCE])
        figures[name] = {"ccc": dict(zip(labels, ccc)), "mean": difference.mean(), "largest": difference.max()}
        rows.append([name, *(f"{v:.3f}" for v in ccc), f"{difference.mean():.4f}", f"{difference.max():.4f}"])
    print(f"{len(waveforms)} turns of {arguments.corpus}; {machine()}")
    print(
        markdown_table(
            ["encoder", *(f"CCC {label}" for label in labels), "mean difference", "largest difference"], rows
        )
    )
    report(arguments, {"encoders": figures})


if __name__ == "__main__":
    main()
