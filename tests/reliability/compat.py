"""Run the tests with the oldest and with the newest versions that setup.cfg allows.

Run as `python -m tests.reliability.compat`.

For each end it makes a virtual environment (`.venv-oldest`, `.venv-newest`), installs what the model and training need,
and runs the tests of the model, of saving and loading, and of training. Then each end loads what the other has saved
and must compute the same numbers. The environments are removed again; `--keep` leaves them. Needs nothing but Python.

From PyPI torch brings CUDA along, 7 GB an environment; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids
that.
"""

from __future__ import annotations

import argparse
import configparser
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENDS = ("oldest", "newest")
TESTS = [
    *("test_ccc_loss.py", "test_ccc_metric.py", "test_configuration.py", "test_conversation_encoder.py"),
    *(
        "test_fast_speech_encoder.py",
        "test_feature_extraction.py",
        "test_mamba2.py",
        "test_modeling.py",
        "test_pooling.py",
    ),
    *("test_publishing.py", "test_speech_encoder.py", "test_checkpoints.py", "test_training.py"),
    *("reliability/test_any_input.py", "reliability/test_bad_input.py", "reliability/test_hostile_files.py"),
    *("reliability/test_invariances.py", "reliability/test_loading_alone.py", "reliability/test_model_object.py"),
    *("reliability/test_properties.py",),
]
# Saves a model, or loads one, and prints what it answers.
EXCHANGE = """
import json, sys, torch
from modeling_mamba_ema import MambaEMAForRegression
from tests.helpers import tiny_model
folder, task = sys.argv[1:]
if task == "save":
    tiny_model().save_pretrained(folder)
model = MambaEMAForRegression.from_pretrained(folder).eval()
with torch.no_grad():
    print(json.dumps(model(torch.sin(torch.arange(8000.0) * 0.05).repeat(2, 3, 1)).logits.tolist()))
"""


def requirements(end: str) -> list[str]:
    """What pip is asked for: `name==floor` for the oldest end, the declared range for the newest."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["train"]
    needed = [line.split(";")[0].strip() for line in lines.splitlines() if line.strip()]
    if end == "oldest":
        needed = [re.sub(r">=([\d.]+).*", r"==\1", line) for line in needed]
    tools = setup["options.extras_require"]["dev"].splitlines()
    return needed + [line.strip() for line in tools if re.match(r"(audmetric|hypothesis|pytest|torchmetrics)", line)]


def python_of(end: str) -> Path:
    return ROOT / f".venv-{end}" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(end: str, python: str) -> None:
    if not python_of(end).exists():
        subprocess.run([python, "-m", "venv", str(ROOT / f".venv-{end}")], check=True, timeout=300)
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if end == "newest" else []
    command = [str(python_of(end)), "-m", "pip", "install", "--quiet", *upgrade, *requirements(end)]
    subprocess.run(command, check=True, timeout=3_000)
    subprocess.run([str(python_of(end)), "-m", "pip", "check"], check=True, timeout=300)


def run(end: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [str(python_of(end)), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, timeout=3_000, **options)  # type: ignore


def versions(end: str) -> str:
    names = ("torch", "transformers", "numpy", "safetensors", "accelerate", "datasets")
    program = (
        "import platform; from importlib.metadata import version; "
        f"print(', '.join(['python ' + platform.python_version(), *(n + ' ' + version(n) for n in {names})]))"
    )
    return run(end, "-c", program, capture_output=True, check=True).stdout.strip()


def exchange(ends: tuple[str, ...]) -> float:
    """Largest difference between what a model answers where it was saved and at the other end."""
    largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for end in ends:
            answers = {}
            for other in (end, *(name for name in ends if name != end)):
                task = "save" if other == end else "load"
                done = run(other, "-c", EXCHANGE, f"{folder}/{end}", task, stdout=subprocess.PIPE, check=True)
                answers[other] = json.loads(done.stdout.splitlines()[-1])
            largest = max(largest, largest_difference(*answers.values()))
    return largest


def largest_difference(one: list[list[list[float]]], two: list[list[list[float]]]) -> float:
    """Between two answers (batch, turns, labels); infinite if a number is missing or is none."""
    flat = [[value for row in answer for turn in row for value in turn] for answer in (one, two)]
    if len(flat[0]) != len(flat[1]) or not flat[0] or not all(map(math.isfinite, flat[0] + flat[1])):
        return math.inf
    return max(abs(a - b) for a, b in zip(*flat))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end", choices=ENDS, help="only one end, without the exchange of models")
    parser.add_argument("--oldest-python", default=sys.executable, help="Python of the oldest end")
    parser.add_argument("--newest-python", default=sys.executable, help="Python of the newest end")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    options = parser.parse_args()
    ends = (options.end,) if options.end else ENDS
    results = {}
    try:
        for end in ends:
            install(end, getattr(options, f"{end}_python"))
            print(f"{end}: {versions(end)}", flush=True)
            tests = [f"tests/{test}" for test in TESTS]
            results[end] = run(
                end, "-m", "pytest", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", *tests
            )
        difference = exchange(ends) if len(ends) == 2 else 0.0
        for end in ends:
            print(f"{end}: {versions(end)}: {'passed' if results[end].returncode == 0 else 'FAILED'}")
    finally:
        for end in ends:
            if not options.keep:
                shutil.rmtree(ROOT / f".venv-{end}", ignore_errors=True)
    if len(ends) == 2:
        print(f"each loads what the other saved; largest difference of an answer {difference:.1e}, allowed 2e-5")
    return int(any(done.returncode for done in results.values()) or difference > 2e-5)


if __name__ == "__main__":
    sys.exit(main())
