"""Make a corpus of SYNTHETIC spoken conversations for the demo and the tests.

    python examples/make_demo_corpus.py --output data/demo

Writes wav and flac files, `metadata.jsonl` in the normal form (file_name, conversation_id, turn, speaker, split,
valence, arousal, and beside them text, rendering and the salient stretch), and a dataset card. The same arguments give
the same bytes.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

import soundfile as sf

from modeling_mamba_ema.data.synthetic_corpus import LABEL_SCALE, synthesise_corpus
from modeling_mamba_ema.data.synthetic_speech import SAMPLING_RATE

CARD = """---
pretty_name: Synthetic spoken conversations for Mamba-EMA
license: apache-2.0
tags:
- synthetic
- speech
- emotion
label_scale: [{low:g}, {high:g}]
---

# SYNTHETIC spoken conversations

Made by `python examples/make_demo_corpus.py --conversations {conversations} --seed {seed}` with eSpeak NG. Valence and
arousal drift from turn to turn and are rendered into the voice by rule. **No human speech and no human judgement is in
here:** results on this corpus show that software works, not how well emotion is recognised.

Labels lie on [{low:g}, {high:g}]. Splits share no speaker.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--conversations", type=int, default=220, help="number of conversations (default 220)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (default 0)")
    arguments = parser.parse_args()

    started = time.perf_counter()
    turns, seconds = Counter(), Counter()
    with _fresh_metadata(arguments.output) as metadata:
        for turn in synthesise_corpus(arguments.conversations, arguments.seed):
            suffix = "flac" if turn.turn % 2 else "wav"
            name = Path(turn.split) / turn.conversation_id / f"turn{turn.turn:02d}.{suffix}"
            (arguments.output / name).parent.mkdir(parents=True, exist_ok=True)
            sf.write(arguments.output / name, turn.waveform, SAMPLING_RATE, subtype="PCM_16")
            row = {
                "file_name": name.as_posix(),
                "conversation_id": turn.conversation_id,
                "turn": turn.turn,
                "speaker": turn.speaker,
                "split": turn.split,
                "valence": turn.valence,
                "arousal": turn.arousal,
                "text": turn.text,
                "rendering": turn.rendering,
                "salient_start": turn.salient[0] if turn.salient else None,
                "salient_end": turn.salient[1] if turn.salient else None,
            }
            metadata.write(json.dumps(row) + "\n")
            turns[turn.split] += 1
            seconds[turn.split] += turn.waveform.size / SAMPLING_RATE
    low, high = LABEL_SCALE
    card = CARD.format(low=low, high=high, conversations=arguments.conversations, seed=arguments.seed)
    (arguments.output / "README.md").write_text(card, encoding="utf-8")

    print(f"SYNTHETIC corpus in {arguments.output} ({time.perf_counter() - started:.0f} s)")
    for split in turns:
        print(f"  {split:<10} {turns[split]:>4} turns  {seconds[split] / 60:5.1f} min")


def _fresh_metadata(folder: Path) -> TextIO:
    """Open `metadata.jsonl` anew; audio that an earlier one lists is removed, nothing else in the folder is."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        for line in metadata.read_text(encoding="utf-8").splitlines():
            earlier = (folder / json.loads(line)["file_name"]).resolve()
            if earlier.is_relative_to(folder.resolve()):
                earlier.unlink(missing_ok=True)
    return metadata.open("w", encoding="utf-8")


if __name__ == "__main__":
    main()
