"""Run transformers' common tests on this model: `python -m tests.tools.common_tests` (`make common-tests`).

They come with transformers' source release, not with what pip installs, so that the release is downloaded once, into
`.compat/`. A release is tested with itself: `--version` installs it beside, see `compat.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from tests.tools.compat import FOLDER, ROOT, overlay

OURS = Path(__file__).with_name("common_tests_of_transformers.py")
# What the common tests import and the source release leaves out; nothing of it is used for a model like this one.
LEFT_OUT = {
    "distributed_testing_utils.py": "def __getattr__(name):\n    return None\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def source_release(number: str) -> Path:
    """The unpacked source release of transformers, downloaded if it is not there."""
    folder = FOLDER / f"transformers-{number}-source"
    if not folder.exists():
        part = FOLDER / f"transformers-{number}-source.part"
        shutil.rmtree(part, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", "transformers", "--dest", str(part), f"transformers=={number}"]
        subprocess.run(command, check=True, timeout=1_200)
        with tarfile.open(next(part.glob("*.tar.gz"))) as archive:
            archive.extractall(part, filter="data")
        (part / f"transformers-{number}").rename(folder)
        shutil.rmtree(part)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default=version("transformers"), help="of transformers (default: %(default)s)")
    parser.add_argument("-k", default="", help="only tests whose name matches, as in pytest")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    release = source_release(options.version)
    place = release / "tests" / "models" / "mamba_ema"
    place.mkdir(parents=True, exist_ok=True)
    for name, source in LEFT_OUT.items():
        (release / "tests" / name).parent.mkdir(exist_ok=True)
        (release / "tests" / name).write_text(source, encoding="utf-8")
    for folder in (place, place.parent, place.parent.parent):
        (folder / "__init__.py").touch()
    shutil.copyfile(OURS, place / "test_modeling_mamba_ema.py")
    paths = [ROOT] if options.version == version("transformers") else [overlay(options.version), ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [release, *paths])), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", options.k]
    command += ["--rootdir", str(release), "-c", os.devnull, str(place / "test_modeling_mamba_ema.py")]
    return subprocess.run(command, cwd=release, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
