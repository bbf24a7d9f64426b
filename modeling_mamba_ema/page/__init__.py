"""A web page over a trained model: record or upload turns, see the numbers, the attention and the path of emotion."""

try:
    import gradio as _gradio
except ImportError as error:
    raise ImportError("the page needs gradio: pip install 'modeling-mamba-ema[page]'") from error

from .page import build_page
from .server import launch
