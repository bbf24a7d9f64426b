"""Run the benchmarks that fit into a quarter of an hour on two idle cores, write their figures and one picture.

    python benchmarks/run.py [--output outputs/benchmarks] [--skip-runtimes]

Those of precisions, accuracy in 8 bits, LoRA, training beside a load, scoring, the service, the import and the start of
training are run by themselves. Each writes `<name>.json` with the machine's description; `encoder.png` and
`encoder.svg` show the encoders. Each prints its own command, so that a single one can be run again.
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt

from modeling_mamba_ema.commands.terminal import check_folder

HERE = Path(__file__).parent
BENCHMARKS = ["encoder", "busy", "turn", "training", "updater", "frame_cache", "checks"]


def draw(figures: dict, path: Path) -> None:
    """Bars: audio seconds a second of each encoder, ours in another colour; PNG and SVG."""
    variants = sorted(figures["variants"].items(), key=lambda item: item[1]["audio_per_second"])
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(variants) + 1.2), layout="constrained")
    values = [variant["audio_per_second"] for _, variant in variants]
    colours = ["#0072B2" if name.startswith("this package") else "#999999" for name, _ in variants]  # Okabe and Ito
    bars = axes.barh([name for name, _ in variants], values, color=colours)
    axes.bar_label(bars, [f"{variant['ratio']:.2f}x" for _, variant in variants], padding=4)
    axes.set_xlabel("seconds of audio encoded in a second;\nat the bars: against the padded batch in float32")
    axes.set_title(f"{figures['machine']['processor']}, {figures['machine']['threads']} threads")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xmargin(0.12)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/benchmarks"), help="folder for figures and picture"
    )
    parser.add_argument("--skip-runtimes", action="store_true", help="leave out onnxruntime and OpenVINO")
    arguments = parser.parse_args()
    check_folder(arguments.output)
    has_runtimes = all(importlib.util.find_spec(name) for name in ("onnxruntime", "openvino", "onnxscript", "nncf"))
    for name in BENCHMARKS:
        command = [sys.executable, str(HERE / f"bench_{name}.py"), "--json", str(arguments.output / f"{name}.json")]
        if name == "encoder" and not arguments.skip_runtimes:
            if has_runtimes:
                command.append("--runtimes")
            else:
                print("onnxruntime and OpenVINO are left out: pip install onnx onnxscript onnxruntime openvino nncf\n")
        print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
        started = time.perf_counter()
        subprocess.run(command, check=True)
        print(f"\n({time.perf_counter() - started:.0f} s)\n", flush=True)
    draw(json.loads((arguments.output / "encoder.json").read_text()), arguments.output / "encoder.png")
    print(f"figures and picture: {arguments.output}")


if __name__ == "__main__":
    main()
