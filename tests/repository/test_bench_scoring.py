"""The benchmark of scoring runs, whose figures are taken by hand."""

import json

import pytest

from tests.support.programs import run_program


@pytest.mark.slow
def test_it_measures_one_process_and_two_and_going_on(tmp_path):
    options = ("--turns", 16, "--rounds", 1, "--json", tmp_path / "a.json")
    printed = run_program("benchmarks/bench_scoring.py", *options).stdout
    figures = json.loads((tmp_path / "a.json").read_text())
    assert set(figures["variants"]) == {"1 process", "2 processes"}
    assert all(found["turns_per_second"] > 0 for found in figures["variants"].values())
    assert "| 2 processes |" in printed
