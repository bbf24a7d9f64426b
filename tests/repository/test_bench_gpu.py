"""The GPU benchmark, on a CPU with a tiny model: everything but CUDA graphs and compilation."""

import importlib
import json
import sys

import pytest
import torch


@pytest.fixture
def bench_gpu(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    return importlib.import_module("bench_gpu")


def test_it_measures_every_variant_and_writes_the_figures(bench_gpu, monkeypatch, tmp_path, capsys):
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tiny |= {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    wavlm_config = bench_gpu.wavlm_config
    monkeypatch.setattr(bench_gpu, "wavlm_config", lambda size: wavlm_config(size, **tiny))
    monkeypatch.setattr(bench_gpu, "compiled", lambda function: function)
    for name, value in {"DEVICE": "cpu", "PEAK_SIZE": 64, "TURNS": 70, "BATCHES": {"a": [0.5], "b": [0.5, 1]}}.items():
        monkeypatch.setattr(bench_gpu, name, value)
    monkeypatch.setattr(
        sys, "argv", ["bench_gpu.py", "--rounds", "1", "--compile", "--json", str(tmp_path / "gpu.json")]
    )
    bench_gpu.main()
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert "| b | this package, layers compiled |" in capsys.readouterr().out
    for dtype in ("bfloat16", "float32"):
        for variants in figures[dtype]["batches"].values():
            assert variants["WavLMModel"]["ratio"] == 1
            assert all(values["of_roofline"] > 0 for values in variants.values())
    assert figures["stream"]["eager"]["milliseconds"] > 0
    assert figures["scan"]["chunks as matrix products"]["ratio"] >= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(bench_gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit, match=r"^bench_gpu.py measures a CUDA device, and torch finds none here$"):
        bench_gpu.main()
