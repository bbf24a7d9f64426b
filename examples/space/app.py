"""The page as a Hugging Face Space: README.md beside this file says how to set it up."""

import os
import sys

from modeling_mamba_ema.demo import ModelLoadError, launch

if __name__ == "__main__":
    try:
        # A Space sets GRADIO_SERVER_NAME so that its proxy reaches the page; elsewhere it is loopback only.
        launch(os.environ.get("MODEL", "model"), revision=os.environ.get("MODEL_REVISION", "main"))
    except ModelLoadError as error:
        sys.exit(f"app: {error}; name a model in the variables MODEL and MODEL_REVISION")
