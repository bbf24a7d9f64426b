"""The shipped encoder in other runtimes: exported once, run one utterance at a time as its export runs best.

8 bits are each runtime's own way: onnxruntime's dynamic quantisation of the matrix products, weights by output channel,
and OpenVINO's quantisation of products, convolutions and what lies between them, whose ranges NNCF measures on noise
beforehand. Their numbers are not the model's, and are not compared here.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnxruntime
import openvino
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn
from transformers import WavLMModel


class _LastHiddenState(nn.Module):
    def __init__(self, wavlm: WavLMModel):
        super().__init__()
        self.wavlm = wavlm

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        """(1, samples) -> (1, frames, hidden)"""
        return self.wavlm(input_values).last_hidden_state


def exported(wavlm: WavLMModel) -> dict[str, Callable[[np.ndarray], Any]]:
    """Name -> function of (1, samples) in float32; each runtime's numbers are checked against torch's first."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wavlm.onnx"
        samples = torch.export.Dim("samples", min=400, max=16_000 * 60)
        torch.onnx.export(
            _LastHiddenState(wavlm).eval(),
            (torch.randn(1, 16_000),),
            path,
            dynamic_shapes={"input_values": {1: samples}},
            input_names=["input_values"],
            dynamo=True,
            verbose=False,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        rounded = Path(folder) / "int8.onnx"
        quantize_dynamic(
            path,
            rounded,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        in_8_bits = onnxruntime.InferenceSession(rounded, options, providers=["CPUExecutionProvider"])
        # OpenVINO takes bfloat16 by itself where the processor has it; the comparison is in float32.
        compiled = openvino.compile_model(
            path, "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        )
        half = openvino.compile_model(
            path, "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16"}
        )
        calibrated = nncf.quantize(
            openvino.Core().read_model(path),
            nncf.Dataset([torch.randn(1, 48_000).numpy() for _ in range(4)]),
            subset_size=4,
            model_type=nncf.ModelType.TRANSFORMER,
        )
        openvino_in_8_bits = openvino.compile_model(
            calibrated, "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16"}
        )
    _check(wavlm, lambda row: session.run(None, {"input_values": row})[0])
    _check(wavlm, lambda row: compiled(row)[0])
    return {
        "onnxruntime, one by one, float32": lambda row: session.run(None, {"input_values": row}),
        "onnxruntime, one by one, int8": lambda row: in_8_bits.run(None, {"input_values": row}),
        "OpenVINO, one by one, float32": compiled,
        "OpenVINO, one by one, bfloat16": half,
        "OpenVINO, one by one, int8 with bfloat16": openvino_in_8_bits,
    }


def compiled_ahead_of_time(wavlm: WavLMModel) -> Callable[[np.ndarray], Any]:
    """A function of (1, samples), by torch.export and AOTInductor; needs a C++ compiler and a minute or two."""
    samples = torch.export.Dim("samples", min=1_600, max=16_000 * 60)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(
            _LastHiddenState(wavlm).eval(),
            (torch.randn(1, 16_000),),
            dynamic_shapes={"input_values": {1: samples}},
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/wavlm.pt2")
        compiled = torch._inductor.aoti_load_package(package)
    _check(wavlm, lambda row: compiled(torch.from_numpy(row)).numpy())
    return lambda row: compiled(torch.from_numpy(row))


def exported_by_transformers(wavlm: WavLMModel) -> Callable[[np.ndarray], Any]:
    """A function of (1, samples), by transformers' own export to OpenVINO, which needs transformers 5.23 or newer."""
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    options = OpenVINOConfig(dynamic_shapes={"input_values": {1: torch.export.Dim.AUTO}})
    model = OpenVINOExporter().export(wavlm, {"input_values": torch.randn(1, 16_000)}, options).program
    compiled = openvino.compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    )
    _check(wavlm, lambda row: compiled([row])[0])
    return lambda row: compiled([row])


def _check(wavlm: WavLMModel, encode: Callable[[np.ndarray], np.ndarray]) -> None:
    """Raise `RuntimeError` where the numbers in float32 are not those of the model."""
    utterance = torch.randn(1, 16_000)
    with torch.inference_mode():
        reference = wavlm(utterance).last_hidden_state.numpy()
    if abs(encode(utterance.numpy()) - reference).max() > 1e-3:
        raise RuntimeError("an exported encoder does not give the numbers of the model it was exported from")
