"""The folder that becomes a Hugging Face Space."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.models import tiny_model
from tests.support.programs import HANGS, environment, wait_until

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"


def test_its_settings_name_what_is_there():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    settings = yaml.safe_load(text.split("---")[1])
    assert settings["sdk"] == "gradio"
    assert (SPACE / settings["app_file"]).is_file()
    assert len(settings["short_description"]) <= 60
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"gradio=={settings['sdk_version']}\n" in pinned  # the version that the tests ran with


def test_its_requirements_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    ours = setup["options"]["install_requires"] + setup["options.extras_require"]["page"]
    ours += setup["options.extras_require"]["tools"]
    for requirement in (SPACE / "requirements.txt").read_text().split():
        assert requirement in ours.split(), requirement


@pytest.mark.slow
def test_it_starts_with_a_copy_of_the_package_beside_it(tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[page]'")
    shutil.copytree(SPACE, tmp_path / "space")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "modeling_mamba_ema", tmp_path / "space" / "modeling_mamba_ema", ignore=ignored)
    tiny_model().save_pretrained(tmp_path / "space" / "model")
    settings = {**environment(), "GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    settings.pop("PYTHONPATH")
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=tmp_path / "space", env=settings, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        address = re.search(r"http://127\.0\.0\.1:\d+", line).group(0)
        wait_until(lambda: httpx.get(address, trust_env=False).status_code == 200, process)
        assert "Mamba-EMA" in httpx.get(address, trust_env=False).text
    finally:
        process.terminate()
        process.wait(timeout=HANGS)


@pytest.mark.slow
def test_without_a_model_it_says_what_to_set(tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[page]'")
    command = [sys.executable, str(SPACE / "app.py")]
    settings = {**environment(), "HF_HUB_OFFLINE": "1", "MODEL": os.fspath(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "name a model in the variables MODEL" in done.stderr
