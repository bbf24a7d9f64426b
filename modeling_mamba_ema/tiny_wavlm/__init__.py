"""A tiny pretrained WavLM that ships with the package, for demos and tests; README.md in this folder is its card."""

from pathlib import Path

# A model's folder, for `from_pretrained_speech_encoder` and `WavLMModel.from_pretrained`.
FOLDER = Path(__file__).parent
