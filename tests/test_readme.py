"""The README's snippets run, in order, as a reader would paste them."""

import re
from pathlib import Path

import torch

from tests.helpers import tiny_model

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
NEEDS_THE_HUB = ("microsoft/wavlm-large", "push_to_hub")


def test_the_snippets_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they write files
    tiny_model().save_pretrained(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    local = [block for block in blocks if not any(word in block for word in NEEDS_THE_HUB)]
    assert len(local) >= 4
    names: dict = {}
    for block in local:
        exec(compile(block.replace("outputs/demo/model", str(tmp_path)), "README.md", "exec"), names)
    assert "turn 7: valence" in capsys.readouterr().out
    assert names["outputs"].conversation_state.num_turns.tolist() == [7]
    assert torch.isfinite(names["outputs"].logits).all()


def test_remote_code_is_never_loaded_without_a_revision():
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            assert "trust_remote_code=True" not in line or "revision=" in line


def test_commands_and_files_that_are_named_are_there():
    root = Path(__file__).parent.parent
    for name in re.findall(r"(?:examples|configuration|tests)/[\w/]+\.(?:py|yaml)", README):
        assert (root / name).is_file(), name
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert f"\n{target}:" in makefile, target
