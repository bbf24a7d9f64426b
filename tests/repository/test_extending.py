"""The changes that docs/extending.md shows apply to the repository, and their tests pass."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import HANGS, environment

ROOT = Path(__file__).parents[2]
DIFFS = re.findall(
    r"^```diff\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git to apply a diff")
def test_the_changes_apply_and_their_tests_pass(tmp_path):
    for folder in ("modeling_mamba_ema", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tests = []
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
        changed = re.findall(r"^\+\+\+ b/(\S+)$", diff, flags=re.MULTILINE)
        assert len(changed) == 2, "one file of the package and its test"
        tests += [name for name in changed if name.startswith("tests/")]
    assert len(tests) == 2
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path, env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True, timeout=HANGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
