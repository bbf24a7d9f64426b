"""The benchmarks run, on models and corpora that are small; figures are taken by hand."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.models import TINY_ENCODER
from tests.support.programs import environment, run_program

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import bench_busy
with bench_busy.busy_core():
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a benchmark by its name, with the shape of the tiny encoder for every WavLM."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def imported(name):
        module = importlib.import_module(name)
        wavlm_config = module.wavlm_config
        monkeypatch.setattr(module, "wavlm_config", lambda size: wavlm_config(size, **TINY_ENCODER))
        return module

    return imported


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process keeps the number of a parent that has ended")
def test_the_load_beside_the_encoder_ends_when_the_benchmark_is_killed():
    # Both write to the same pipe, which is at its end when both have ended.
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(BENCHMARKS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(), text=True) as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == -9, errors


def test_on_a_gpu_every_variant_is_measured(benchmark, monkeypatch, tmp_path, capsys):
    """On a CPU: everything but CUDA graphs and compilation."""
    bench_gpu = benchmark("bench_gpu")
    monkeypatch.setattr(bench_gpu, "compiled", lambda function: function)
    for name, value in {"DEVICE": "cpu", "PEAK_SIZE": 64, "TURNS": 70, "BATCHES": {"a": [0.5], "b": [0.5, 1]}}.items():
        monkeypatch.setattr(bench_gpu, name, value)
    command = ["bench_gpu.py", "--rounds", "1", "--compile", "--json", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", command)
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
def test_without_a_gpu_its_benchmark_says_so_in_a_line(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit, match=r"^bench_gpu.py measures a CUDA device, and torch finds none here$"):
        benchmark("bench_gpu").main()


def test_every_step_trains_and_lora_trains_less(benchmark, monkeypatch):
    bench_lora = benchmark("bench_lora")
    monkeypatch.setattr(bench_lora, "lengths_in_seconds", lambda count: [0.4, 0.6])
    optimizers = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: optimizers.append(self) or step(self, *a))
    arguments = argparse.Namespace(size="base", layers=1, utterances=2, device="cpu")
    trained = {}
    for name in bench_lora.VARIANTS:
        run, trained[name] = bench_lora.step_of(name, arguments)
        run()
        moments = [s["exp_avg"].abs().sum() for s in optimizers[-1].state.values()]
        assert len(moments) == len(optimizers[-1].param_groups[0]["params"]), name
    of_peft, full, lora, *checkpointed = trained.values()
    assert of_peft < lora < full
    assert checkpointed == [full, lora]


@pytest.mark.slow
def test_scoring_is_measured_in_one_process_in_two_and_when_it_goes_on(tmp_path):
    options = ("--turns", 16, "--rounds", 1, "--json", tmp_path / "a.json")
    printed = run_program("benchmarks/bench_scoring.py", *options).stdout
    figures = json.loads((tmp_path / "a.json").read_text())
    assert set(figures["variants"]) == {"1 process", "2 processes"}
    assert all(found["turns_per_second"] > 0 for found in figures["variants"].values())
    assert "| 2 processes |" in printed


@pytest.mark.slow
def test_the_service_is_measured_both_ways_for_every_number_of_calls(saved_model, tmp_path):
    pytest.importorskip("prometheus_client", reason="the service needs its extra: pip install '.[serve]'")
    options = ["--model", saved_model, "--seconds", 0.2, "--period", 0.5, "--json", tmp_path / "a.json"]
    printed = run_program("benchmarks/bench_serving.py", *options, "--calls", 1, 2).stdout
    figures = json.loads((tmp_path / "a.json").read_text())["variants"]
    for variant in figures.values():
        assert set(variant) == {"1", "2"}
        assert all(0 < found["p50"] <= found["p95"] <= found["p99"] for found in variant.values())
    assert printed.count("| in one pass |") == 2
