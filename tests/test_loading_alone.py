"""A saved folder in a process of its own: loaded by remote code or by the package, it gives the same numbers.

Importing, loading and running a model reaches no network, starts no process and writes nothing but the code's copy.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from tests.support.models import predict, tiny_model

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

way, folder, again = sys.argv[1:]
for name in ("kernels", "soundfile", "soxr", "datasets", "evaluate", "accelerate", "matplotlib"):
    sys.modules[name] = None  # as if nothing optional were installed
import torch, transformers  # what these do on their own is theirs
sys.addaudithook(watch)
options = {}
if way == "remote":
    sys.modules["modeling_mamba_ema"] = None
    options = dict(trust_remote_code=True, revision="main")
else:
    import modeling_mamba_ema
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification

assert AutoConfig.from_pretrained(folder, **options).model_type == "mamba_ema"
extractor = AutoFeatureExtractor.from_pretrained(folder, **options)
waveform = torch.sin(torch.arange(8000) * 0.05)
inputs = extractor([[waveform, waveform[:3000]]], sampling_rate=16000, return_tensors="pt")
seen["logits"] = []
for auto in (AutoModel, AutoModelForAudioClassification):
    model = auto.from_pretrained(folder, **options).eval()
    assert type(model).__name__ == "MambaEMAForRegression", type(model)
    with torch.no_grad():
        seen["logits"].append(model(**inputs).logits.numpy().tobytes().hex())
model.state_dict()
json.dump(seen, sys.stdout)
model.save_pretrained(again)
extractor.save_pretrained(again)
"""


class Loaded:
    """What a process of its own did that loaded a folder.

    Attributes:
        seen: network, process and write by the audit hook, and the logits, as hexadecimal float32.
        cache: the folder for what Hugging Face's libraries keep, which was empty.
        again: where the model was saved again.
    """

    def __init__(self, way, folder, home, python=sys.executable):
        self.cache, self.again = home / "cache", home / "again"
        self.cache.mkdir()
        (home / "home").mkdir(mode=0o500)  # read-only, and where the program stands
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(home / "home"),
            "HF_HOME": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            # Where another version of transformers is tried, it lies in front of the packages of this Python.
            "PYTHONPATH": os.pathsep.join(
                filter(None, [os.environ.get("TRANSFORMERS_OVERLAY"), str(ROOT) if way == "installed" else ""])
            ),
        }
        command = [str(python), "-c", PROGRAM, way, str(folder), str(self.again)]
        done = subprocess.run(command, cwd=home / "home", env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert list((home / "home").iterdir()) == []
        self.seen = json.loads(done.stdout)


@pytest.fixture(scope="module")
def loaded(saved_model, tmp_path_factory):
    """The saved model, loaded in each way."""
    return {way: Loaded(way, saved_model, tmp_path_factory.mktemp(way)) for way in ("installed", "remote")}


def numbers():
    """What the saved model must give."""
    waveform = torch.sin(torch.arange(8000) * 0.05)
    return predict(tiny_model(), [[waveform, waveform[:3000]]]).logits.numpy().tobytes().hex()


@pytest.mark.promise("E-03", "loading and running a model tries no connection", "0")
@pytest.mark.parametrize("way", ["installed", "remote"])
def test_no_connection_and_no_process_is_tried(loaded, way):
    assert loaded[way].seen["network"] == []
    assert loaded[way].seen["process"] == []


def of_ours(writes):
    """Without what torch does when some of its modules are imported: it makes an empty folder for compiled kernels."""
    return [write for write in writes if os.devnull not in write and "torchinductor" not in write]


@pytest.mark.promise(
    "E-04", "loading writes nothing; remote code is copied into transformers' module cache only", "0 other writes"
)
def test_the_installed_package_writes_nothing(loaded):
    assert of_ours(loaded["installed"].seen["write"]) == []
    assert list(loaded["installed"].cache.iterdir()) == []


@pytest.mark.promise("E-04")
def test_remote_code_is_copied_into_transformers_module_cache_and_nothing_else_is_written(loaded):
    modules = str(loaded["remote"].cache / "modules")
    assert [write for write in of_ours(loaded["remote"].seen["write"]) if modules not in write] == []
    assert {path.suffix for path in Path(modules).rglob("*") if path.is_file()} == {".py"}


@pytest.mark.promise("B-01", "the same call, a reload and a save after a load change no bit", "bitwise")
@pytest.mark.promise("E-11", "the installed package gives the numbers of remote code, without it", "bitwise")
def test_both_ways_give_bitwise_the_numbers_of_the_model_that_was_saved(loaded):
    assert loaded["remote"].seen["logits"] == loaded["installed"].seen["logits"] == [numbers()] * 2


@pytest.mark.promise("B-01")
def test_a_model_loaded_as_remote_code_and_saved_again_loads_with_the_same_numbers(loaded, tmp_path):
    assert Loaded("remote", loaded["remote"].again, tmp_path).seen["logits"] == [numbers()] * 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_loads_in_a_fresh_environment_with_torch_transformers_numpy_and_safetensors_alone(saved_model, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = ["torch", "transformers", "numpy", "safetensors"]
    constraints = str(ROOT / "constraints.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *packages], check=True, timeout=1200)
    assert Loaded("remote", saved_model, tmp_path, python).seen["logits"] == [numbers()] * 2
