"""Importing, loading and running a model reaches no network, starts no process and writes nothing but code's copy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import tiny_model

ROOT = Path(__file__).parents[1]

# Python tells an audit hook of every connection, process and change of files, before it happens.
PROGRAM = """
import json, os, sys

seen = {"network": [], "process": [], "write": []}
NETWORK = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind", "socket.getaddrinfo", "socket.gethostby")
PROCESS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
WRITE = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            seen["write"].append(str(path))
    for kind, names in (("network", NETWORK), ("process", PROCESS), ("write", WRITE)):
        if event.startswith(names):
            seen[kind].append(f"{event} {arguments[:2]}")

import torch, transformers  # what these do on their own is theirs
sys.addaudithook(watch)
folder, remote = sys.argv[1], sys.argv[2] == "remote"
if remote:
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
    options = dict(trust_remote_code=True, revision="main")
else:
    from modeling_mamba_ema import MambaEMAConfig as AutoConfig
    from modeling_mamba_ema import MambaEMAFeatureExtractor as AutoFeatureExtractor
    from modeling_mamba_ema import MambaEMAForRegression as AutoModel
    options = {}
AutoConfig.from_pretrained(folder, **options)
extractor = AutoFeatureExtractor.from_pretrained(folder, **options)
model = AutoModel.from_pretrained(folder, **options).eval()
waveform = torch.sin(torch.arange(8000) * 0.05)
with torch.no_grad():
    logits = model(**extractor([[waveform, waveform]], sampling_rate=16000, return_tensors="pt")).logits
model.state_dict()
seen["logits"] = logits.numpy().tobytes().hex()
json.dump(seen, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seen(folder, tmp_path_factory):
    """What happened, by way of loading."""
    happened = {}
    for way in ("installed", "remote"):
        home = tmp_path_factory.mktemp(way)
        (home / "program.py").write_text(PROGRAM)
        cache = home / "cache"
        cache.mkdir()
        (home / "home").mkdir(mode=0o500)  # read-only, and where the program stands
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(home / "home"),
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            **({"PYTHONPATH": str(ROOT)} if way == "installed" else {}),
        }
        done = subprocess.run(
            [sys.executable, str(home / "program.py"), str(folder), way],
            cwd=home / "home",
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert list((home / "home").iterdir()) == []
        happened[way] = (json.loads(done.stdout), cache)
    return happened


@pytest.mark.parametrize("way", ["installed", "remote"])
def test_no_connection_and_no_process_is_tried(seen, way):
    assert seen[way][0]["network"] == []
    assert seen[way][0]["process"] == []


def of_ours(writes):
    """Without what torch does when some of its modules are imported: it makes an empty folder for compiled kernels."""
    return [write for write in writes if os.devnull not in write and "torchinductor" not in write]


def test_the_installed_package_writes_nothing(seen):
    assert of_ours(seen["installed"][0]["write"]) == []
    assert list(seen["installed"][1].iterdir()) == []


def test_remote_code_is_copied_into_transformers_module_cache_and_nothing_else_is_written(seen):
    happened, cache = seen["remote"]
    modules = str(cache / "modules")
    assert [write for write in of_ours(happened["write"]) if modules not in write] == []
    assert {path.suffix for path in Path(modules).rglob("*") if path.is_file()} == {".py"}


def test_both_ways_give_bitwise_the_same_numbers(seen):
    assert seen["installed"][0]["logits"] == seen["remote"][0]["logits"]
