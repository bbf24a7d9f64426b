"""Import time: `import modeling_mamba_ema` against `import torch, transformers`, bare and with WavLM.

    python benchmarks/bench_import.py [--rounds 5] [--json FILE]

Each import is a fresh process; they run in turn.
"""

import subprocess
import sys

from measuring import argument_parser, interleaved, machine, report, table

STATEMENTS = {
    "torch, transformers": "import torch, transformers",
    "torch, transformers, WavLMModel": "import torch; from transformers import WavLMModel",
    "modeling_mamba_ema": "import modeling_mamba_ema",
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    arguments = parser.parse_args()
    functions = {
        name: lambda statement=statement: subprocess.run([sys.executable, "-c", statement], check=True)
        for name, statement in STATEMENTS.items()
    }
    times = interleaved(functions, arguments.rounds)
    ratio = times["modeling_mamba_ema"] / times["torch, transformers"]
    print(f"{machine()}\n")
    print(table(["import", "seconds"], [[name, f"{seconds:.2f}"] for name, seconds in times.items()]))
    print(f"\nmodeling_mamba_ema against the first line: {ratio:.2f}x")
    report(arguments, {"seconds": times, "ratio": ratio})


if __name__ == "__main__":
    main()
