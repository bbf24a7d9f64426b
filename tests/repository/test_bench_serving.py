"""The benchmark of the service runs, whose figures are taken by hand."""

import json

import pytest

from tests.support.programs import run_program

pytest.importorskip("prometheus_client", reason="the service needs its extra: pip install '.[serve]'")


@pytest.mark.slow
def test_it_measures_every_number_of_calls_both_ways(saved_model, tmp_path):
    options = (
        "--model",
        saved_model,
        "--seconds",
        0.2,
        "--period",
        0.5,
        "--calls",
        1,
        2,
        "--json",
        tmp_path / "a.json",
    )
    printed = run_program("benchmarks/bench_serving.py", *options).stdout
    figures = json.loads((tmp_path / "a.json").read_text())["variants"]
    for variant in figures.values():
        assert set(variant) == {"1", "2"}
        assert all(0 < found["p50"] <= found["p95"] <= found["p99"] for found in variant.values())
    assert printed.count("| in one pass |") == 2
