"""The shipped encoder in other runtimes: exported once to ONNX, run one utterance at a time as its export runs best.

8 bits are onnxruntime's own dynamic quantisation of the matrix products, weights by output channel. OpenVINO has none
for a model that was not calibrated.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    utterance = torch.randn(1, 16_000)
    with torch.inference_mode():
        reference = wavlm(utterance).last_hidden_state.numpy()
    for output in (session.run(None, {"input_values": utterance.numpy()})[0], compiled(utterance.numpy())[0]):
        if abs(output - reference).max() > 1e-3:
            raise RuntimeError("an exported encoder does not give the numbers of the model it was exported from")
    return {
        "onnxruntime, one by one, float32": lambda row: session.run(None, {"input_values": row}),
        "onnxruntime, one by one, int8": lambda row: in_8_bits.run(None, {"input_values": row}),
        "OpenVINO, one by one, float32": compiled,
        "OpenVINO, one by one, bfloat16": half,
    }
