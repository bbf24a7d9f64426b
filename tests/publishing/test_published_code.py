"""What is published beside the weights: which files, what their code imports and calls, and whether they are intact."""

import ast
import json
import shutil
import subprocess

import pytest

from modeling_mamba_ema.publishing import prepare_release
from modeling_mamba_ema.publishing.checksums import damaged_files
from tests.support.models import tiny_model

ALLOWED_MODULES = {
    *(
        "numpy",
        "torch",
        "torch.distributed",
        "torch.nn",
        "torch.nn.functional",
        "torch.nn.modules.module",
        "torch.nn.utils.rnn",
    ),
    *("transformers", "transformers.activations", "transformers.dynamic_module_utils"),
    *("transformers.integrations.hub_kernels", "transformers.utils", "transformers.utils.generic"),
    "transformers.models.wavlm.modeling_wavlm",
    *(
        "__future__",
        "base64",
        "binascii",
        "collections.abc",
        "concurrent.futures",
        "contextlib",
        "dataclasses",
        "difflib",
        "functools",
        "hashlib",
        "heapq",
        "inspect",
        "io",
        "itertools",
        "math",
        "os",
        "pathlib",
        "threading",
    ),
    *("random", "re", "reprlib", "struct", "typing", "warnings", "wave"),
}
# Only inside try / except ImportError: the model runs without them.
GUARDED_MODULES = {
    "modeling_mamba_ema.adoption.changes",
    "modeling_mamba_ema.publishing",
    "soundfile",
    "soxr",
    "torch._C._functorch",
}
# Of os, the one name that is used in annotations.
ALLOWED_OS_NAMES = {"PathLike", "register_at_fork"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "open", "input", "globals", "breakpoint", "__import__", "__builtins__"}
FORBIDDEN_ATTRIBUTES = {
    *("load", "loads", "hub", "jit", "save", "open", "write_text", "write_bytes", "mkdir", "touch", "unlink", "rmdir"),
    *("rename", "chmod", "symlink_to", "hardlink_to", "__subclasses__", "__globals__", "__code__", "__builtins__"),
}
# Where a published file reads or writes a file, and why.
ALLOWED_CALLS = {
    ("fast_speech_encoder.py", "torch.jit"),  # asks whether it is being traced
    ("speech_encoder.py", "torch.jit"),  # the same
    ("audio_files.py", "path.open"),  # audio: the path that the caller gave
    ("audio_files.py", "source.open"),  # audio: the bytes or the path that the caller gave
    ("audio_files.py", "wave.open"),  # the same, where soundfile is not installed
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    tiny_model().save_pretrained(folder)
    prepare_release(folder)
    return folder


@pytest.mark.promise("E-01", "only safetensors, JSON, Python, text and two short samples are published", "as stated")
def test_only_weights_settings_code_text_and_two_short_samples_are_published(folder):
    others = {"README.md", "requirements.txt", "SHA256SUMS", "sample_quarrel.wav", "sample_good_news.wav"}
    assert all(path.is_file() for path in folder.iterdir())
    assert sum(path.stat().st_size for path in folder.glob("*.wav")) < 200_000
    assert {path.suffix for path in folder.iterdir() if path.name not in others} == {".json", ".safetensors", ".py"}
    for path in folder.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    assert (folder / "model.safetensors").read_bytes()[8:9] == b"{"  # no pickle under another name


def violations(name, source):
    """What a file imports, names or calls that is not allowed. A reader's help, not a sandbox."""
    tree = ast.parse(source)
    guarded = {
        id(node)
        for attempt in ast.walk(tree)
        if isinstance(attempt, ast.Try)
        and any("ImportError" in ast.unparse(h.type) for h in attempt.handlers if h.type)
        for node in ast.walk(attempt)
    }
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        for module in modules:
            if module not in ALLOWED_MODULES and not (module in GUARDED_MODULES and id(node) in guarded):
                yield f"{name} imports {module}"
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield f"{name} names {node.id}"
        if isinstance(node, ast.Attribute):
            of_os = isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr not in ALLOWED_OS_NAMES
            called = {(name, ast.unparse(node)), (name, node.attr)}
            if of_os or (node.attr in FORBIDDEN_ATTRIBUTES and not called & ALLOWED_CALLS):
                yield f"{name} uses {ast.unparse(node)}"


@pytest.mark.promise(
    "E-02", "published code imports and calls only what is listed, is flat and short enough to be read", "0 others"
)
def test_published_code_imports_and_calls_only_what_is_listed_here(folder):
    for path in folder.glob("*.py"):
        assert list(violations(path.name, path.read_text(encoding="utf-8"))) == []


@pytest.mark.promise("E-02")
@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "import os.path",
        "from http import client",
        "import importlib",
        "import soundfile",
        "import torch.utils.cpp_extension",
        "os.popen('id')",
        "os.execv('/bin/sh', [])",
        "open('/etc/passwd')",
        "Path('a').open()",
        "Path('a').write_text('b')",
        "torch.load('weights.bin')",
        "torch.hub.load('a', 'b')",
        "np.load('a.npy', allow_pickle=True)",
        "eval('1')",
        "run = exec",
        "__import__('os')",
        "().__class__.__base__.__subclasses__()",
    ],
)
def test_the_scan_sees(source):
    assert list(violations("file.py", source))


@pytest.mark.promise("E-02")
def test_published_code_is_flat_and_short_enough_to_be_read(folder, record_property):
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.py")}
    record_property("figure", f"{len(lines)} files, {sum(lines.values())} lines, the longest {max(lines.values())}")
    assert sum(lines.values()) < 6_300
    assert max(lines.values()) < 880


@pytest.mark.promise("E-12")
def test_a_release_is_intact(folder):
    assert damaged_files(folder) == []
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


@pytest.mark.promise("E-12", "a saved folder carries SHA256SUMS, by which damage is found", "every case")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: flip_a_bit(f / "model.safetensors"), "model.safetensors is damaged"),
        (lambda f: flip_a_bit(f / "modeling_mamba_ema.py"), "modeling_mamba_ema.py is damaged"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is not in SHA256SUMS"),
        (lambda f: (f / "SHA256SUMS").unlink(), "there is no SHA256SUMS"),
    ],
    ids=["weights", "code", "missing", "added", "no sums"],
)
def test_damage_is_found_and_named(folder, tmp_path, damage, says):
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    assert damaged_files(tmp_path / "copy") == [says]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
