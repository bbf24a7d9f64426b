"""Starting the page, with the limits of its server."""

import gc
from typing import Any

import gradio as gr
from gradio import processing_utils

from ..inference import EmotionTracker
from .page import QUEUE_SIZE, build_page

MAX_FILE_SIZE = 10 * 1024 * 1024  # bytes of an upload
MAX_SESSIONS = 64  # the one unused for longest is forgotten; a session holds its last pictures

# The page is reached on the loopback address only, reports to nobody that it runs, and loads nothing from elsewhere.
LAUNCH_OPTIONS: dict[str, Any] = {
    "share": False,
    "max_file_size": MAX_FILE_SIZE,
    "state_session_capacity": MAX_SESSIONS,
    "show_error": False,
    "enable_monitoring": False,
    "run_history": False,
    "ssr_mode": False,
    "mcp_server": False,
    "footer_links": ["api"],
}


async def _fetch_nothing(url: str) -> Any:
    raise ValueError("this page fetches no addresses; upload the file")


def launch(tracker: EmotionTracker, queue_size: int = QUEUE_SIZE, **options: Any) -> tuple[gr.Blocks, str]:
    """Serve the page over a new tracker's model until it is interrupted.

    The process belongs to the page from then on: gradio fetches no address that a request names, in this page or any
    other of the process, and what is in memory is no longer looked through for garbage.

    Args:
        options: of gradio's `launch`, such as `server_port` (default: the first free one from 7860) and
            `prevent_thread_lock=True`, with which the page is served in a thread. The address to listen on is that of
            `GRADIO_SERVER_NAME` (a Hugging Face Space sets it), else loopback, which no other machine reaches.

    Returns:
        The page and its address, once it is closed or, with `prevent_thread_lock=True`, started.
    """
    # Gradio fetches what a request names by URL before any handler sees it, asking a public name server first.
    processing_utils.async_ssrf_protected_get = _fetch_nothing
    page = build_page(tracker.model, tracker.feature_extractor, queue_size)
    gc.collect()
    gc.freeze()  # these objects live as long as the page: collecting the figures of a turn takes 25 ms
    # Gradio's own look with fonts that are on the visitor's machine, so that none is fetched.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, url, _ = page.launch(**{**LAUNCH_OPTIONS, "theme": theme, **options})
    return page, url
