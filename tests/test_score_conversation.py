"""The scoring program and its pictures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.sample import FOLDER, load_sample_conversation
from tests.helpers import tiny_model

REPOSITORY = Path(__file__).parent.parent


def score(*arguments):
    command = [sys.executable, "examples/score_conversation.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


def test_files_are_scored_turn_by_turn_with_the_numbers_of_the_whole_conversation(model_folder, tmp_path):
    turns = load_sample_conversation()
    done = score(model_folder, *(turn["file_name"] for turn in turns), "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [line.split()[-2:] for line in done.stdout.splitlines()[1 : 1 + len(turns)]]
    speech = [[turn["waveform"] for turn in turns]]
    with torch.no_grad():
        logits = tiny_model()(**MambaEMAFeatureExtractor()(speech, sampling_rate=16_000, return_tensors="pt")).logits
    np.testing.assert_allclose(np.array(printed, dtype=float), logits[0], atol=6e-4)
    for name in ("trajectory.png", "attention.png"):
        assert imread(tmp_path / name).std() > 0.05


def test_a_corpus_folder_is_scored_beside_its_labels(model_folder, tmp_path):
    done = score(model_folder, FOLDER, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "valence label" in done.stdout
    assert "anna" in done.stdout


def test_a_broken_file_is_one_human_line(model_folder, tmp_path):
    (tmp_path / "broken.wav").write_text("no audio")
    done = score(model_folder, tmp_path / "broken.wav", "--output", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("score_conversation: broken.wav is no audio file")


def test_the_sample_is_small_and_readable():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 500 * 1024
    turns = load_sample_conversation()
    assert len(turns) == 7
    assert all(turn["sampling_rate"] == 16_000 and turn["waveform"].size > 8_000 for turn in turns)
