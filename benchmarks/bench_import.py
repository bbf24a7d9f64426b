"""Import time, and time to a first training step, of this package and of what it is built on.

    python benchmarks/bench_import.py [--rounds 3] [--json FILE]

Each is a fresh process; they run in turn. The models are tiny and saved in a temporary folder, so that what is timed is
code being loaded, not weights.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measuring import argument_parser, interleaved, machine, parsed, report
from transformers import WavLMConfig, WavLMForSequenceClassification

from modeling_mamba_ema import MambaEMAConfig, MambaEMAForRegression
from modeling_mamba_ema.data.markdown_table import markdown_table

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
THEIRS, OURS = "import torch, transformers and WavLMModel", "import modeling_mamba_ema"


def statements(folder: Path) -> dict[str, str]:
    """Name -> code of a process; saves the two models that are loaded."""
    torch.manual_seed(0)
    WavLMForSequenceClassification(WavLMConfig(**TINY, apply_spec_augment=False)).save_pretrained(folder / "wavlm")
    MambaEMAForRegression(MambaEMAConfig(speech_encoder_config=TINY)).save_pretrained(folder / "mamba_ema")
    step = "model(torch.randn(2, 16_000), labels=torch.{}).loss.backward()"
    return {
        "import torch, transformers": "import torch, transformers",
        THEIRS: "import torch; from transformers import WavLMModel",
        OURS: OURS,
        "first step of WavLMForSequenceClassification": (
            "import torch; from transformers import WavLMForSequenceClassification as Model; "
            f"model = Model.from_pretrained({str(folder / 'wavlm')!r}).train(); {step.format('tensor([0, 1])')}"
        ),
        "first step of MambaEMAForRegression": (
            "import torch; from modeling_mamba_ema import MambaEMAForRegression as Model; "
            f"model = Model.from_pretrained({str(folder / 'mamba_ema')!r}).train(); {step.format('rand(2, 2)')}"
        ),
    }


def main() -> None:
    arguments = parsed(argument_parser(__doc__, rounds=3))
    with tempfile.TemporaryDirectory() as folder:
        functions = {
            name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            for name, code in statements(Path(folder)).items()
        }
        times = interleaved(functions, arguments.rounds)
    print(f"{machine()}\n")
    print(markdown_table(["fresh process", "seconds"], [[name, f"{seconds:.2f}"] for name, seconds in times.items()]))
    print(f"\n{OURS}: {times[OURS] / times[THEIRS]:.2f}x of {THEIRS}")
    report(arguments, {"seconds": times, "ratio": times[OURS] / times[THEIRS]})


if __name__ == "__main__":
    main()
