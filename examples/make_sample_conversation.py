"""Make the small SYNTHETIC conversation that ships with the package.

python examples/make_sample_conversation.py --output modeling_mamba_ema/sample
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile as sf

from modeling_mamba_ema.data.synthetic_corpus import SPEAKERS, say
from modeling_mamba_ema.data.synthetic_speech import SAMPLING_RATE, Synthesizer

# speaker, what is said, valence, arousal: from a bad start to good news
DIALOGUE = (
    ("anna", "Where have you been? I waited for an hour.", 0.15, 0.70),
    ("ben", "I am sorry. The train was late again.", 0.35, 0.30),
    ("anna", "You could have called me.", 0.25, 0.50),
    ("ben", "Listen, I have some news for you.", 0.60, 0.55),
    ("anna", "What is it?", 0.55, 0.60),
    ("ben", "We got the house! It is ours!", 0.95, 0.90),
    ("anna", "Really? That is wonderful! I am so glad!", 0.95, 0.95),
)
VOICES = {"anna": SPEAKERS["test"][0], "ben": SPEAKERS["test"][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    synthesizer, generator = Synthesizer(), np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for turn, (speaker, text, valence, arousal) in enumerate(DIALOGUE):
            speech = say(synthesizer, text, VOICES[speaker], valence, arousal, generator)
            name = f"turn{turn}_{speaker}.wav"
            sf.write(folder / name, speech, SAMPLING_RATE, subtype="PCM_16")
            row = {
                "file_name": name,
                "conversation_id": "sample",
                "turn": turn,
                "speaker": speaker,
                "valence": valence,
                "arousal": arousal,
                "text": text,
            }
            metadata.write(json.dumps(row) + "\n")
    size = sum(path.stat().st_size for path in folder.glob("*.wav")) / 1024
    print(f"SYNTHETIC conversation of {len(DIALOGUE)} turns in {folder}, {size:.0f} KiB")


if __name__ == "__main__":
    main()
