"""A small SYNTHETIC conversation that ships with the package: seven turns of two speakers, from a quarrel to good news.

Made by `python examples/make_sample_conversation.py --output modeling_mamba_ema/sample`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def load_sample_conversation() -> list[dict[str, Any]]:
    """The turns in order; needs `soundfile`.

    Returns:
        One dict a turn: `waveform` (samples,) float32, `sampling_rate` in Hz, `file_name` (absolute), `speaker`,
        `text`, and `valence`, `arousal` on the unit scale, as they were rendered.
    """
    import soundfile as sf

    turns = []
    for line in (FOLDER / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["file_name"] = str(FOLDER / row["file_name"])
        row["waveform"], row["sampling_rate"] = sf.read(row["file_name"], dtype="float32")
        turns.append(row)
    return turns


__all__ = ["load_sample_conversation"]
