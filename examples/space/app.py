"""The page as a Hugging Face Space: README.md beside this file says how to set it up."""

import os
import sys

from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.page import launch

if __name__ == "__main__":
    name, revision = os.environ.get("MODEL", "model"), os.environ.get("MODEL_REVISION", "main")
    try:
        tracker = EmotionTracker.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        sys.exit(f"app: {error}; name a model in the variables MODEL and MODEL_REVISION")
    # A Space sets GRADIO_SERVER_NAME so that its proxy reaches the page; elsewhere it is loopback only.
    launch(tracker)
