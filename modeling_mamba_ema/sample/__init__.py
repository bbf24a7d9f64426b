"""A small SYNTHETIC conversation that ships with the package: seven turns of two speakers, from a quarrel to good news.

`tests/test_sample.py` makes it again from its text.
"""

import json
from pathlib import Path
from typing import Any

from ..audio_files import load_audio
from ..feature_extraction_mamba_ema import SAMPLING_RATE

FOLDER = Path(__file__).parent


def load_sample_conversation() -> list[dict[str, Any]]:
    """The turns in order.

    Returns:
        One dict a turn: `waveform` (samples,) float32, `sampling_rate` in Hz, `file_name` (absolute), `speaker`,
        `text`, and `valence`, `arousal` on the unit scale, as they were rendered.
    """
    turns = []
    for line in (FOLDER / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["file_name"] = str(FOLDER / row["file_name"])
        row["waveform"], row["sampling_rate"] = load_audio(row["file_name"]), SAMPLING_RATE
        turns.append(row)
    return turns
