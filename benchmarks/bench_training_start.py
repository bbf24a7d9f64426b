"""From the start of the fine-tuning program to its first step, on a large corpus of short files; and the frame cache.

    python benchmarks/bench_training_start.py [--rows 200000] [--conversations 30000] [--folder DIR] [--json FILE]

The files are hard links to 1,000 of half a second. The program starts twice: the first time it looks at all audio, the
second time at what has changed. Then frames of single utterances of the same length are cached, by the tiny encoder.
Processor seconds, of all threads and worker processes, depend less than wall seconds on what else the machine does.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import transformers
from measuring import COUNT, SAMPLE_RATE, argument_parser, machine, parsed, report

from modeling_mamba_ema import MambaEMAFeatureExtractor, MambaEMAForRegression, tiny_wavlm
from modeling_mamba_ema.data.dataset import load_emotion_dataset
from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.training import MambaEMATrainingArguments, cache_frames

FILES, CACHED = 1_000, 1_000
LABELS = ["valence", "arousal"]
# The program, which says at its first step what it took until there, and ends.
FIRST_STEP = """
import json, os, resource, runpy, sys, time
begin = time.perf_counter()
from transformers import TrainerCallback
from modeling_mamba_ema.training import MambaEMATrainer

class End(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        workers = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = time.process_time() + workers.ru_utime + workers.ru_stime
        print(json.dumps([time.perf_counter() - begin, processor, peak]), flush=True)
        os._exit(0)

made = MambaEMATrainer.__init__
def make(self, *args, **kwargs):
    made(self, *args, **kwargs)
    self.add_callback(End())

MambaEMATrainer.__init__ = make
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_corpus(folder: Path, rows: int, conversations: int) -> None:
    """Conversations of random lengths, 90 % of them to train on; every file is a link to one of a thousand."""
    random = np.random.default_rng(0)
    for number in range(FILES):
        sf.write(folder / f"{number}.wav", random.normal(0, 0.1, SAMPLE_RATE // 2), SAMPLE_RATE)
    of_row = np.sort(
        np.concatenate([np.arange(conversations), random.integers(conversations, size=rows - conversations)])
    )
    splits = np.select([of_row < 0.9 * conversations, of_row < 0.95 * conversations], ["train", "validation"], "test")
    turns = np.arange(rows) - np.searchsorted(of_row, of_row)
    for part in range(256):
        (folder / f"{part:02x}").mkdir()
    lines = []
    for row, (conversation, turn, split) in enumerate(zip(of_row.tolist(), turns.tolist(), splits.tolist())):
        name = f"{row % 256:02x}/{conversation}_{turn}.wav"
        os.link(folder / f"{row % FILES}.wav", folder / name)
        place = {"file_name": name, "conversation_id": conversation, "turn": turn, "split": split}
        lines.append(json.dumps({**place, **dict(zip(LABELS, random.random(2).round(3).tolist()))}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def start(folder: Path) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and GiB until the first step."""
    options = [f"data.source={folder / 'corpus'}", f"data.cache_folder={folder / 'cache'}", "data.cache_frames=false"]
    options += [f"training.output_dir={folder / 'run'}", "training.max_seconds_per_batch=200"]
    program = [sys.executable, "-c", FIRST_STEP, "examples/run_finetune.py", "configuration/demo.yaml", *options]
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(program, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    wall, processor, peak = json.loads(done.stdout.splitlines()[-1])
    return wall, processor, peak


def fill_cache(folder: Path) -> tuple[float, float]:
    """Wall and processor milliseconds an utterance."""
    rows = load_emotion_dataset(folder / "corpus", LABELS)["train"].select(range(CACHED))
    model = MambaEMAForRegression.from_pretrained_speech_encoder(
        str(tiny_wavlm.FOLDER), freeze_speech_encoder=True, hidden_size=64
    )
    arguments = MambaEMATrainingArguments(output_dir=str(folder / "run"))
    wall, processor = time.perf_counter(), time.process_time()
    cache = cache_frames(model, MambaEMAFeatureExtractor(), [rows], folder / "frames", arguments)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    count = len(list(cache.folder.rglob("*.safetensors")))
    return 1_000 * wall / count, 1_000 * processor / count


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=COUNT, default=200_000, help="utterances (default: %(default)s)")
    parser.add_argument("--conversations", type=COUNT, default=30_000, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="for the corpus (default: a temporary one)")
    arguments = parsed(parser)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        (folder / "corpus").mkdir()
        write_corpus(folder / "corpus", arguments.rows, arguments.conversations)
        starts = {name: start(folder) for name in ("first start", "second start")}
        cached = fill_cache(folder)
    print(f"{arguments.rows} utterances of {arguments.conversations} conversations; {machine()}\n")
    lines = [[name, *(f"{value:.1f}" for value in values)] for name, values in starts.items()]
    print(markdown_table(["", "seconds to the first step", "processor seconds", "peak memory, GiB"], lines))
    print(f"\nframes cached, an utterance: {cached[0]:.1f} ms, {cached[1]:.1f} ms of processor time")
    report(arguments, {"rows": arguments.rows, **starts, "cached_ms": cached})


if __name__ == "__main__":
    main()
