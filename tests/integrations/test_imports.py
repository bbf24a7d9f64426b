"""An integration whose program is not installed names the line that installs it."""

import importlib
import sys

import pytest


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
