"""The conversation that ships with the package: small, readable, and what the synthesiser makes of its text."""

import pytest

from modeling_mamba_ema.sample import FOLDER, load_sample_conversation
from tests.support.programs import run_program

# In a process of its own: eSpeak NG says the same only where it has said nothing before.
MAKE = """
import json, sys
import numpy as np, soundfile as sf
from modeling_mamba_ema.data.synthetic_corpus import SPEAKERS, express, say
from modeling_mamba_ema.data.synthetic_speech import SAMPLING_RATE, Synthesizer
from modeling_mamba_ema.sample import FOLDER

voices = {"anna": SPEAKERS["test"][0], "ben": SPEAKERS["test"][1]}
synthesizer, generator = Synthesizer(), np.random.default_rng(0)
for line in (FOLDER / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    expression = express(row["valence"], row["arousal"])
    speech = say(synthesizer, row["text"], voices[row["speaker"]], expression, generator)
    sf.write(f"{sys.argv[1]}/{row['file_name']}", speech, SAMPLING_RATE, subtype="PCM_16")
"""


def test_it_is_small_and_readable():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 500 * 1024
    turns = load_sample_conversation()
    assert len(turns) == 7
    assert all(turn["sampling_rate"] == 16_000 and turn["waveform"].size > 8_000 for turn in turns)


def test_it_is_made_again_from_its_text_to_the_byte(tmp_path):
    pytest.importorskip("espeakng_loader", reason="the synthesiser: pip install '.[demo]'")
    run_program("-c", MAKE, str(tmp_path))
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in FOLDER.glob("*.wav")}
