"""Looking at the input takes no time that anybody would notice."""

import json

import pytest

from tests.support.programs import run_program


@pytest.mark.promise(
    "A-10", "all checks of an input together cost next to nothing", "under 1 % of a forward pass of WavLM-base"
)
@pytest.mark.slow
def test_all_checks_cost_under_a_hundredth_of_a_forward_pass(tmp_path, record_property):
    measured = tmp_path / "checks.json"
    run_program("benchmarks/bench_checks.py", "--utterances", "2", "--rounds", "2", "--json", str(measured))
    share = json.loads(measured.read_text())["share"]
    record_property("figure", f"{100 * share:.2f} %")
    assert share < 0.01
