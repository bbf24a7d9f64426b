"""The example that listens, over a file; a microphone goes through the same code."""

import time

import numpy as np
import pytest
import soundfile as sf

from modeling_mamba_ema.sample import load_sample_conversation
from tests.helpers import tiny_model
from tests.tiny_corpus import run_program


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """A model, and a recording of three turns with a second of silence before each."""
    folder = tmp_path_factory.mktemp("listen")
    tiny_model().save_pretrained(folder / "model")
    silence = np.zeros(16_000, dtype=np.float32)
    turns = [turn["waveform"] for turn in load_sample_conversation()[2:5]]
    sf.write(folder / "call.wav", np.concatenate([part for turn in turns for part in (silence, turn)]), 16_000)
    return folder


def test_turns_of_a_file_are_printed_with_their_begin_and_values(call):
    done = run_program("examples/listen.py", str(call / "model"), "--file", str(call / "call.wav"), "--speed", "100")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["begin", "seconds", "valence", "arousal"]
    rows = [[float(cell) for cell in line.split()[:4]] for line in lines[1:]]
    assert 3 <= len(rows) <= 4
    assert rows[0][0] == pytest.approx(1.0, abs=0.15)
    assert all(0 <= value <= 1 for row in rows for value in row[2:])


def test_a_file_is_heard_no_faster_than_it_was_spoken(call):
    seconds = sf.info(call / "call.wav").duration
    begin = time.monotonic()
    run_program("examples/listen.py", str(call / "model"), "--file", str(call / "call.wav"), "--speed", "2")
    assert time.monotonic() - begin > seconds / 2


@pytest.mark.parametrize("arguments", [["--file", "absent.wav"], ["--file", "README.md"]])
def test_what_cannot_be_heard_is_one_line(call, arguments):
    done = run_program("examples/listen.py", str(call / "model"), *arguments, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("listen: ")
