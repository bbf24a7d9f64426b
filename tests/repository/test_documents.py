"""What the documents tell people to do is safe to do."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

from modeling_mamba_ema import MambaEMAConfig
from modeling_mamba_ema.publishing.model_card import model_card

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
FOLDERS = ("modeling_mamba_ema", "examples", "benchmarks")
PROGRAMS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def unpinned(code):
    """Calls that let remote code run without saying which revision of it."""
    for node in ast.walk(ast.parse(textwrap.dedent(code))):
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            trusted = given.get("trust_remote_code")
            if isinstance(trusted, ast.Constant) and trusted.value and "revision" not in given:
                yield ast.unparse(node)


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_check_sees_what_it_looks_for():
    assert list(unpinned("AutoModel.from_pretrained(name, trust_remote_code=True)"))
    assert not list(unpinned("AutoModel.from_pretrained(name, trust_remote_code=True, revision=commit)"))
    assert not list(unpinned("AutoModel.from_pretrained(name)"))


@pytest.mark.promise("E-09", "no document or program trusts remote code without a revision", "0")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_never_trust_remote_code_without_a_revision(path):
    for block in python_blocks(path.read_text(encoding="utf-8")):
        assert list(unpinned(block)) == []


@pytest.mark.promise("E-09")
def test_the_model_card_never_trusts_remote_code_without_a_revision():
    blocks = python_blocks(model_card(MambaEMAConfig()))
    assert any("trust_remote_code=True" in block for block in blocks)
    assert [call for block in blocks for call in unpinned(block)] == []


@pytest.mark.promise("E-09")
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_never_trust_remote_code_without_a_revision(path):
    assert list(unpinned(path.read_text(encoding="utf-8"))) == []


@pytest.mark.promise("E-10", "the oldest versions allowed are above the advisories that SECURITY.md names", "as stated")
def test_floors_are_above_the_advisories():
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    floors = {
        name: tuple(map(int, version.split("."))) for name, version in re.findall(r"^ +([\w-]+)>=([\d.]+)", text, re.M)
    }
    needed = {"torch": (2, 10), "transformers": (5, 10), "datasets": (4, 0), "gradio": (6, 16)}
    for name, version in needed.items():
        assert name not in floors or floors[name] >= version, name
    assert {"torch", "transformers", "datasets"} <= set(floors)
