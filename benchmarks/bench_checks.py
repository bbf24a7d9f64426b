"""What looking at the input costs: the checks of the feature extractor and of the model beside the model's own time.

    python benchmarks/bench_checks.py [--size large] [--utterances 4] [--rounds 5] [--json FILE]

The waveforms are float32 noise of realistic lengths. Reading them as float32, which the extractor does on the way, and
the masks that the model needs anyway count as checks here, so that the figure is an upper bound.
"""

import torch
from measuring import SAMPLE_RATE, argument_parser, interleaved, lengths_in_seconds, model_with, parsed, report

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.data.markdown_table import markdown_table
from modeling_mamba_ema.feature_extraction_mamba_ema import MIN_SAMPLES, level
from modeling_mamba_ema.speech_encoder import collect_utterances


def main() -> None:
    arguments = parsed(argument_parser(__doc__, size="base", utterances=8, rounds=5))
    generator = torch.Generator().manual_seed(0)
    seconds = lengths_in_seconds(arguments.utterances)
    waveforms = [0.1 * torch.randn(int(length * SAMPLE_RATE), generator=generator).numpy() for length in seconds]
    extractor = MambaEMAFeatureExtractor()
    model = model_with(arguments.size)
    inputs = extractor(waveforms, sampling_rate=SAMPLE_RATE, return_tensors="pt")

    def check_waveforms() -> None:
        for waveform in waveforms:
            level(extractor._as_checked_waveform(waveform, SAMPLE_RATE, "utterance"))

    def check_inputs() -> None:
        collect_utterances(inputs["input_values"], inputs["attention_mask"], None, MIN_SAMPLES)

    def run() -> None:
        with torch.inference_mode():
            model(**inputs)

    names = {"extractor's checks": check_waveforms, "model's checks": check_inputs, "the whole forward pass": run}
    times = interleaved(names, arguments.rounds)
    whole = times["the whole forward pass"]
    rows = [[name, f"{1e3 * time:.2f}", f"{100 * time / whole:.2f} %"] for name, time in times.items()]
    print(markdown_table(["", "ms", "of the forward pass"], rows))
    share = (times["extractor's checks"] + times["model's checks"]) / whole
    print(f"\nall checks: {100 * share:.2f} % of a forward pass, {sum(seconds):.0f} s of audio, WavLM-{arguments.size}")
    report(arguments, {"seconds": times, "share": share})


if __name__ == "__main__":
    main()
