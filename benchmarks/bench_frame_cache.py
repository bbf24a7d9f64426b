"""An epoch from cached frames, beside the same epoch with the frozen encoder running.

    python benchmarks/bench_frame_cache.py [--size large] [--utterances 24] [--json FILE]

Utterances of noise in lengths as in speech corpora (median 4 s, 1 to 15 s), four to a conversation, a random encoder.
Both epochs are those of the training program: reading, batches, forward, backward, optimizer; without evaluation and
saving.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from measuring import argument_parser, parsed, peak_of_process, report, resident_memory, wavlm_config, write_corpus
from transformers import TrainerCallback

from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor, MambaEMAForRegression
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.training import ConversationCollator, MambaEMATrainer, MambaEMATrainingArguments, cache_frames

LABELS = ["valence", "arousal"]
CACHED_EPOCHS = 6


class EpochTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *arguments, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, *arguments, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def epoch_costs(model, extractor, dataset, arguments: MambaEMATrainingArguments) -> tuple[list[float], float]:
    """Seconds of each epoch, and GiB that the process took beside what it had."""
    times = EpochTimes()
    trainer = MambaEMATrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=ConversationCollator(extractor),
        callbacks=[times],
    )
    before = resident_memory()
    trainer.train()
    return times.seconds, peak_of_process() - before


def main() -> None:
    arguments = parsed(argument_parser(__doc__, size="large", utterances=24))
    transformers.utils.logging.set_verbosity_error()
    disable_progress_bars()
    torch.manual_seed(0)
    config = MambaEMAConfig(speech_encoder_config=wavlm_config(arguments.size), freeze_speech_encoder=True)
    model, extractor = MambaEMAForRegression(config), MambaEMAFeatureExtractor()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        audio_seconds = write_corpus(folder / "corpus", arguments.utterances)
        rows = load_emotion_dataset(folder / "corpus", LABELS)["train"]

        def training(epochs: int) -> MambaEMATrainingArguments:
            return MambaEMATrainingArguments(
                output_dir=str(folder / "run"),
                num_train_epochs=epochs,
                per_device_train_batch_size=2,
                eval_strategy="no",
                save_strategy="no",
                logging_strategy="no",
                load_best_model_at_end=False,
                disable_tqdm=True,
            )

        (with_encoder,), memory = epoch_costs(model, extractor, ConversationDataset(rows, LABELS), training(1))
        started = time.perf_counter()
        cache = cache_frames(model, extractor, [rows], folder / "cache", training(1))
        filling = time.perf_counter() - started
        dataset = ConversationDataset(rows, LABELS, frame_cache=cache)
        # The first epoch warms up.
        epochs, cached_memory = epoch_costs(model, extractor, dataset, training(CACHED_EPOCHS))
        cached = statistics.median(epochs[1:])
        megabytes = sum(path.stat().st_size for path in cache.folder.rglob("*.safetensors")) / 1e6

    print(f"WavLM-{arguments.size}'s shape, {arguments.utterances} utterances, {audio_seconds:.0f} s of audio\n")
    rows_of_table = [
        ["epoch with the encoder running", f"{with_encoder:.2f}", "1.0", f"{memory:.2f}"],
        ["filling the cache, once", f"{filling:.2f}", "", ""],
        ["epoch from the cache", f"{cached:.3f}", f"{with_encoder / cached:.1f}", f"{cached_memory:.2f}"],
    ]
    print(markdown_table(["", "seconds", "times faster", "peak memory beside the weights, GiB"], rows_of_table))
    print(f"\nthe cache takes {megabytes:.0f} MB")
    report(
        arguments,
        {
            "size": arguments.size,
            "utterances": arguments.utterances,
            "audio_seconds": audio_seconds,
            "epoch_with_encoder_seconds": with_encoder,
            "filling_the_cache_seconds": filling,
            "epoch_from_cache_seconds": cached,
            "times_faster": with_encoder / cached,
            "epoch_with_encoder_gib": memory,
            "epoch_from_cache_gib": cached_memory,
            "cache_megabytes": megabytes,
        },
    )


if __name__ == "__main__":
    main()
