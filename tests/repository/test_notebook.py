"""The notebook runs from top to bottom: it trains and saves a model, or loads one, and draws the conversation."""

import ast
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from transformers import WavLMConfig, WavLMModel

from tests.support.models import TINY_ENCODER

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def run_notebook(monkeypatch, tmp_path, corpus):
    """A function of the environment that runs all cells; it gives the names and the values that end the cells."""

    def run(**variables):
        monkeypatch.chdir(ROOT)
        for name, value in {"CORPUS": corpus, "OUTPUT": tmp_path / "out", **variables}.items():
            monkeypatch.setenv(name, str(value))
        names: dict = {}
        shown = []
        for number, cell in enumerate(CODE):
            tree = ast.parse(cell)
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, f"cell {number}", "exec"), names)
            if last is not None:
                shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names))
        return names, [value for value in shown if value is not None]

    return run


def test_the_notebook_trains_scores_and_draws_and_takes_the_model_again(run_notebook, monkeypatch, tmp_path, capsys):
    WavLMModel(WavLMConfig(**TINY_ENCODER)).save_pretrained(tmp_path / "encoder")
    names, shown = run_notebook(ENCODER=tmp_path / "encoder")
    assert "CCC valence" in capsys.readouterr().out
    assert [type(value) for value in shown] == [Figure, Figure]
    trained = [turn.values for turn in names["heard"]]
    assert len(trained) == 7
    names, shown = run_notebook(MODEL=tmp_path / "out" / "model", ENCODER="not/asked-for")
    assert [type(value) for value in shown] == [Figure, Figure]
    assert [turn.values for turn in names["heard"]] == trained


def test_the_notebook_is_kept_without_what_a_run_leaves_in_it():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
