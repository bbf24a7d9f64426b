"""Use and train a model with the versions that setup.cfg allows: both ends, and some between.

Run as `python -m tests.tools.compat` (`make compat`).

Each version of transformers is installed into a folder of its own (`.compat/`, 250 MB each), which is put in front of
the packages of this environment. With each one, a folder saved here is loaded by remote code and by the installed
package, through the Auto classes, the pipeline and turn by turn, and saved again; its numbers must be those of this
environment to 1e-6. The tests of the model run at both ends, those of training at both ends of what training allows.

`--python PATH --torch VERSION` tries a Python and a build of torch instead, in a virtual environment of its own, with
the oldest or the newest of everything else (`--oldest`). From PyPI torch brings CUDA along, 7 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".compat"
OLDEST, NEWEST, OLDEST_FOR_TRAINING = "4.57.6", "5.24.0", "5.10.4"
VERSIONS = (OLDEST, "5.0.0", "5.8.1", OLDEST_FOR_TRAINING, "5.17.0", NEWEST)
TOLERANCE = 1e-6
MODEL_TESTS = ["test_conversation_encoder.py", "test_fast_speech_encoder.py", "test_modeling.py", "test_saving.py"]
TRAINING_TESTS = ["training/test_finetuning.py", "training/test_trainer.py"]
# Loads a folder in one of two ways, uses it in every way, and prints the numbers.
USE = """
import json, sys, tempfile
import numpy as np, torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

way, folder = sys.argv[1:]
options = {"trust_remote_code": True, "revision": "main"} if way == "remote" else {}
kind = {}
if way == "installed":
    import modeling_mamba_ema
    kind = {"pipeline_class": modeling_mamba_ema.MambaEMAPipeline}
time = np.arange(8000, dtype=np.float32)
turns = [np.sin(time[: 4000 + 1000 * turn] * 0.02 * (turn + 1)) for turn in range(3)]
assert AutoConfig.from_pretrained(folder, **options).model_type == "mamba_ema"

def answers(folder):
    extractor = AutoFeatureExtractor.from_pretrained(folder, **options)
    for auto in (AutoModel, AutoModelForAudioClassification):
        model = auto.from_pretrained(folder, **options).eval()
        with torch.inference_mode():
            yield model(**extractor([turns, turns[:2]], sampling_rate=16_000, return_tensors="pt")).logits[0].tolist()
    state, streamed = None, []
    for turn in turns:
        inputs = extractor(turn, sampling_rate=16_000, return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs, conversation_state=state, use_conversation_state=True)
        state = outputs.conversation_state
        streamed += outputs.logits.tolist()
    yield streamed
    rows = pipeline("audio-classification", model=folder, **options, **kind)(turns[0])
    yield [[row["score"] for row in sorted(rows, key=lambda row: row["label"], reverse=True)]]
    model.save_pretrained(folder + "/again")
    extractor.save_pretrained(folder + "/again")

first = list(answers(folder))
print(json.dumps([first, list(answers(folder + "/again"))]))
"""


def overlay(version: str) -> Path:
    """A folder with one version of transformers and what it needs, torch aside; made if it is not there."""
    folder = FOLDER / f"transformers-{version}"
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".part")
        wanted = [
            f"transformers=={version}",
            *(["numpy==1.26.4"] if version == OLDEST and sys.version_info < (3, 13) else []),
        ]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(unfinished), *wanted]
        subprocess.run(command, check=True, timeout=1_200)
        unfinished.rename(folder)
    return folder


def run(python: str, paths: list[Path], *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": home,
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "TRANSFORMERS_OVERLAY": str(paths[0]) if paths and paths[0] != ROOT else "",
        }
        # Not from the repository's folder: remote code must not find the package by chance.
        return subprocess.run(  # type: ignore[call-overload]
            [python, *arguments], cwd=home, env=environment, text=True, timeout=1_800, **options
        )


def use(python: str, paths: list[Path], way: str, folder: str) -> list[float]:
    """Every number that a way of loading a folder gives; an empty list, and its error, where it fails."""
    paths = [*paths, *([ROOT] if way == "installed" else [])]
    done = run(python, paths, "-c", USE, way, folder, capture_output=True)
    if done.returncode:
        print(done.stderr[-2_000:], file=sys.stderr)
        return []
    answers = json.loads(done.stdout.splitlines()[-1])
    return [number for time in answers for answer in time for turn in answer for number in turn]


def largest_difference(one: list[float], two: list[float]) -> float:
    """Infinite where a number is missing or is none."""
    if len(one) != len(two) or not one or not all(map(math.isfinite, one + two)):
        return math.inf
    return max(abs(a - b) for a, b in zip(one, two))


def save_models(folder: str) -> list[str]:
    """Two small models: both norms of the speech encoder, several layers, a learned decay."""
    from tests.support.models import tiny_model

    tiny_model("layer", label_ranges={"valence": (1, 7)}).save_pretrained(f"{folder}/layer")
    tiny_model(
        "group",
        speech_encoder_pooling="attentive_statistics",
        speech_encoder_layers=[0, 1, 2],
        ema_decay_learnable=True,
    ).save_pretrained(f"{folder}/group")
    return [f"{folder}/layer", f"{folder}/group"]


def test(python: str, paths: list[Path], tests: list[str]) -> bool:
    names = [str(ROOT / "tests" / name) for name in tests]
    options = ["-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    return run(python, [*paths, ROOT], "-m", "pytest", *options, *names).returncode == 0


def environment_of(python: str, torch: str, oldest: bool) -> str:
    """A virtual environment with a Python and a build of torch, the rest at one end; its Python is returned."""
    folder = FOLDER / f"python-{Path(python).name}-torch-{torch}-{'oldest' if oldest else 'newest'}"
    if not folder.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True, timeout=300)
    rest = [f"transformers=={OLDEST}", "numpy==1.26.4"] if oldest else ["transformers", "numpy"]
    tools = ["soundfile", "soxr", "pytest", "pytest-timeout", "hypothesis", "audmetric", "torchmetrics", "accelerate"]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={torch}", *rest, *tools], check=True, timeout=3_600)
    return pip[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="another Python, with --torch")
    parser.add_argument("--torch", help="version of torch for --python")
    parser.add_argument("--oldest", action="store_true", help="with --python: the oldest of the rest, not the newest")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n", encoding="utf-8")
    began, failures = time.monotonic(), []

    def note(what: str, passed: bool, figure: str = "") -> None:
        print(f"{time.monotonic() - began:5.0f} s  {'passed' if passed else 'FAILED'}  {what}{figure}", flush=True)
        failures.extend([] if passed else [what])

    with tempfile.TemporaryDirectory() as saved:
        folders = save_models(saved)
        expected = {folder: use(sys.executable, [], "installed", folder) for folder in folders}
        targets: list[tuple[str, str, list[Path]]] = [
            (f"transformers {version}", sys.executable, [overlay(version)]) for version in VERSIONS
        ]
        if options.python:
            python = environment_of(options.python, options.torch, options.oldest)
            targets = [(f"{options.python}, torch {options.torch}", python, [])]
        for name, python, paths in targets:
            for way in ("remote", "installed"):
                numbers = {folder: use(python, paths, way, folder) for folder in folders}
                difference = max(largest_difference(expected[folder], numbers[folder]) for folder in folders)
                note(f"{name}, {way}", difference <= TOLERANCE, f": largest difference {difference:.1e}")
        if options.python:
            note(f"tests of the model, {targets[0][0]}", test(python, [], MODEL_TESTS))
        else:
            for version in (OLDEST, NEWEST):
                note(
                    f"tests of the model, transformers {version}", test(sys.executable, [overlay(version)], MODEL_TESTS)
                )
            for version in (OLDEST_FOR_TRAINING, NEWEST):
                passed = test(sys.executable, [overlay(version)], TRAINING_TESTS)
                note(f"tests of training, transformers {version}", passed)
    print("all passed" if not failures else f"failed: {'; '.join(failures)}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
