"""python -m modeling_mamba_ema.demo MODEL_FOLDER"""

from __future__ import annotations

import argparse
import sys

from .server import ModelLoadError, launch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m modeling_mamba_ema.demo", description="A page over a saved model.")
    parser.add_argument("model", help="folder or Hub name of a saved Mamba-EMA model; none of its code is run")
    parser.add_argument("--revision", default="main", help="commit, tag or branch of a Hub model")
    parser.add_argument("--port", type=int, help="port on the loopback address; default: the first free one from 7860")
    arguments = parser.parse_args()
    try:
        launch(arguments.model, revision=arguments.revision, server_port=arguments.port)
    except ModelLoadError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
