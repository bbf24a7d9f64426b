"""What the README and the guides tell a reader to paste works: Python in order, shell lines by their parsers."""

import configparser
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import WavLMConfig, WavLMModel

from modeling_mamba_ema.__main__ import command_parser
from modeling_mamba_ema.sample import FOLDER
from modeling_mamba_ema.training.run_configuration import load_run_configuration
from tests.support.models import TINY_ENCODER, tiny_model
from tests.support.service import serving
from tests.support.tiny_corpus import write_corpus

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_SNIPPETS = [path for path in DOCUMENTS if "```python\n" in path.read_text(encoding="utf-8")]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Names in the documents that stand for what a reader has, and what stands for them here."""
    folder = tmp_path_factory.mktemp("stand_ins")
    tiny_model(interval_radii={label: {"0.9": 0.2} for label in ("valence", "arousal")}).save_pretrained(
        folder / "demo"
    )
    ranges = {label: [1, 7] for label in ("arousal", "dominance", "valence")}
    tiny_model(id2label=dict(enumerate(ranges)), label_ranges=ranges).save_pretrained(folder / "adopted")
    WavLMModel(WavLMConfig(**TINY_ENCODER)).save_pretrained(folder / "encoder")
    return {
        "outputs/demo/model": str(folder / "demo"),
        "models/odyssey": str(folder / "adopted"),
        "microsoft/wavlm-large": str(folder / "encoder"),
        "data/demo": str(write_corpus(folder / "corpus")),
        "speech.wav": str(FOLDER / "turn0_anna.wav"),
    }


@pytest.fixture(scope="module")
def server(stand_ins):
    pytest.importorskip("prometheus_client", reason="the service needs its extra: pip install '.[serve]'")
    with serving(stand_ins["outputs/demo/model"]) as started:
        yield started


@pytest.mark.parametrize("path", WITH_SNIPPETS, ids=lambda path: path.name)
def test_the_snippets_run_in_order(path, stand_ins, request, tmp_path, capsys, monkeypatch):
    if path.name == "serving.md":
        address = request.getfixturevalue("server").address
        stand_ins = stand_ins | {"http://127.0.0.1:8000": address, "ws://127.0.0.1:8000": address.replace("http", "ws")}
    monkeypatch.chdir(tmp_path)  # they write files
    names: dict = {}
    for block in blocks(path, "python"):
        for name, stand_in in stand_ins.items():
            block = block.replace(name, stand_in)
        exec(compile(block, path.name, "exec"), names)
    printed = capsys.readouterr().out
    if path.name == "README.md":
        assert re.search(r"^\{'arousal': \d\.\d+, 'dominance': \d\.\d+, 'valence': \d\.\d+\}$", printed, re.MULTILINE)
        assert "turn 7: valence" in printed
        assert torch.isfinite(names["outputs"].logits).all()
    if path.name == "serving.md":
        assert printed.count("'valence': ") > 7  # the turns by REST, and at least one by WebSocket
    if path.name == "streaming.md":
        assert (tmp_path / "turn7.svg").is_file()
        assert names["state"].num_turns.tolist() == [7]
        assert len(names["table"]) == 7


def shell_lines(path):
    """The commands of the shell blocks, with lines that are continued put together and comments left out."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):  # the environment of one command
                del words[0]
            if words:
                yield words


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_shell_lines_use_programs_options_settings_and_extras_that_exist(path):
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    for words in shell_lines(path):
        program = next((word for word in words if word.startswith(("examples/", "benchmarks/"))), None)
        if words[0] == "mamba-ema":
            command_parser().parse_args(words[1:])
        elif program:
            source, given = (ROOT / program).read_text(encoding="utf-8"), words[words.index(program) + 1 :]
            if "argument_parser(__doc__" in source:
                source += (ROOT / "benchmarks" / "measuring.py").read_text(encoding="utf-8")
            for option in given:
                assert not option.startswith("--") or f'"{option}"' in source, (program, option)
            if program == "examples/run_finetune.py":
                load_run_configuration(ROOT / given[0], given[1:])
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", words[2]))):
                assert extra in extras["options.extras_require"], extra
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), words
        else:
            assert words[0] in ("python", "hf", "ray"), words


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_targets_and_headings_that_are_named_are_there(path):
    text = path.read_text(encoding="utf-8")
    for diff in blocks(path, "diff"):  # makes new files
        text = text.replace(diff, "")
    for name in re.findall(r"(?:examples|configuration|tests|docs|benchmarks)/[\w/]+\.(?:py|yaml|md|png|svg)", text):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), target
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), link
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
        assert 5_000 < (path.parent / picture).stat().st_size < 400_000, picture
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in text.splitlines() if line[:1] == "#"
    }
    for link in re.findall(r"\]\(#([\w-]+)\)", text):
        assert link in headings, link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
