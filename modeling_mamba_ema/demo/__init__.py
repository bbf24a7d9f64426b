"""A web page over a trained model: record or upload turns, see the numbers, the attention and the path of emotion.

python -m modeling_mamba_ema.demo MODEL_FOLDER
"""

try:
    import gradio as _gradio  # noqa: F401
except ImportError as error:
    raise ImportError("the page needs gradio: pip install 'modeling-mamba-ema[page]'") from error

from .page import build_page
from .server import ModelLoadError, launch, load_model

__all__ = ["ModelLoadError", "build_page", "launch", "load_model"]
