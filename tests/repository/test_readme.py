"""The README's snippets run, in order, as a reader would paste them."""

import configparser
import re
import shlex
from pathlib import Path

import torch

from modeling_mamba_ema.__main__ import command_parser
from tests.support.models import tiny_model

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
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
    printed = capsys.readouterr().out
    assert "turn 7: valence" in printed
    assert re.search(r"^\{'valence': 0\.\d+, 'arousal': 0\.\d+\}$", printed, flags=re.MULTILINE)
    assert (tmp_path / "turn7.svg").is_file()
    assert names["state"].num_turns.tolist() == [7]
    assert names["outputs"].conversation_state.num_turns.tolist() == [7]
    assert torch.isfinite(names["outputs"].logits).all()


def test_remote_code_is_never_loaded_without_a_revision():
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            assert "trust_remote_code=True" not in line or "revision=" in line


ROOT = Path(__file__).parents[2]


def shell_lines():
    """The commands of the shell blocks, with lines that are continued put together and comments left out."""
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):  # the environment of one command
                del words[0]
            if words:
                yield words


def test_commands_and_files_that_are_named_are_there():
    for name in re.findall(r"(?:examples|configuration|tests|docs)/[\w/]+\.(?:py|yaml|md|png|svg)", README):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert f"\n{target}:" in makefile, target


def test_shell_lines_use_programs_options_and_extras_that_exist():
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    seen = 0
    for words in shell_lines():
        program = next((word for word in words if word.startswith("examples/")), None)
        if words[0] == "mamba-ema":
            command_parser().parse_args(words[1:])
        elif program:
            source = (ROOT / program).read_text()
            for option in words[words.index(program) + 1 :]:
                assert not option.startswith("--") or f'"{option}"' in source, (program, option)
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", words[2]))):
                assert extra in extras["options.extras_require"], extra
        else:
            assert words[0] in ("make", "touch"), words
        seen += 1
    assert seen >= 15


def test_the_mamba_ssm_that_is_installed_is_the_one_that_was_measured():
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8")
    (installed,) = re.findall(r"mamba-ssm==(\d+\.\d+\.\d+)", README)
    assert set(re.findall(r"mamba-ssm (\d+\.\d+\.\d+)", notes)) == {installed}


def test_links_within_the_page_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", line[3:]).strip().lower().replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("## ")
    }
    for link in re.findall(r"\]\(#([\w-]+)\)", README):
        assert link in headings, link
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README):
        assert 5_000 < (ROOT / picture).stat().st_size < 400_000, picture
