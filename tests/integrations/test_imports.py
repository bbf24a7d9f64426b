"""What is not installed: it is not imported where it is not needed, and named with the line that installs it."""

import importlib
import sys

import pytest

from tests.support.models import tiny_model
from tests.support.programs import ROOT, run_program

# Packages that the extra `train` brings, and no other that commands for a single recording or the page need.
OF_TRAIN = ("accelerate", "datasets", "evaluate", "peft", "scipy")
# Runs a program as where some packages, which are its first argument, are not installed.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
sys.argv = sys.argv[1:]
(runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "program", "line"),
    [("pipecat", "pipecat", "pip install pipecat-ai"), ("ray_data", "ray", r"ema\[cluster\]")],
)
def test_what_is_not_installed_is_named(monkeypatch, module, program, line):
    for name in [name for name in sys.modules if name == program or name.startswith(f"{program}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"modeling_mamba_ema.integrations.{module}", raising=False)
    monkeypatch.setitem(sys.modules, program, None)
    with pytest.raises(ImportError, match=line):
        importlib.import_module(f"modeling_mamba_ema.integrations.{module}")


def test_a_recording_is_scored_and_drawn_without_what_training_needs(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    sound, picture = ROOT / "modeling_mamba_ema" / "sample" / "turn4_anna.wav", tmp_path / "out.png"
    command = ["timeline", "--model", tmp_path / "model", sound, "--window", "1", "--plot", picture]
    run_program("-c", WITHOUT, ",".join([*OF_TRAIN, "pandas"]), "modeling_mamba_ema", *command)
    assert picture.stat().st_size > 5_000


def test_the_page_needs_nothing_that_training_needs():
    pytest.importorskip("gradio", reason="the page needs its extra: pip install '.[page]'")
    run_program("-c", WITHOUT, ",".join(OF_TRAIN), "modeling_mamba_ema.page.server")


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (["modeling_mamba_ema", "metrics", "a.csv"], "[train] for corpora"),
        (
            ["examples/run_finetune.py", "configuration/demo.yaml"],
            "training needs pip install 'modeling-mamba-ema[train]'",
        ),
    ],
    ids=["mamba-ema", "run_finetune"],
)
def test_a_program_whose_packages_are_not_installed_names_them_and_the_extra(program, says):
    result = run_program("-c", WITHOUT, "pandas,datasets", *program, check=False)
    assert result.returncode == 1
    assert says in result.stderr
    assert "Traceback" not in result.stderr
