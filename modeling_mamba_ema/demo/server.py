"""Starting the page: the model from its folder, and the limits of the server."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import gradio as gr
from safetensors import SafetensorError

from ..inference import EmotionTracker
from .page import build_page

MAX_FILE_SIZE = 10 * 1024 * 1024  # bytes of an upload
MAX_SESSIONS = 64  # the one unused for longest is forgotten; a session holds its last pictures

# The page is reached on the loopback address only, tells nobody that it runs, and loads nothing from elsewhere.
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


class ModelLoadError(OSError):
    """The model of the page cannot be loaded; the message is one line."""


def load_model(model_folder: str | Path, revision: str = "main") -> EmotionTracker:
    """A saved model with its feature extractor; the code is this package's, none of the folder's is run.

    Raises:
        ModelLoadError: there is no such model or revision, or it is no complete Mamba-EMA model.
    """
    try:
        return EmotionTracker.from_pretrained(model_folder, revision=revision)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelLoadError(
            f"no model can be loaded from {str(model_folder)!r}, revision {revision!r}: {reason[:300]}"
        ) from error


def launch(
    model_folder: str | Path,
    revision: str = "main",
    server_name: str | None = None,
    server_port: int | None = None,
) -> None:
    """Serve the page over a saved model until it is interrupted.

    Args:
        model_folder: a folder or Hub name.
        revision: commit, tag or branch on the Hub.
        server_name: address to listen on; None: `GRADIO_SERVER_NAME` (a Hugging Face Space sets it), else the loopback
            address, which no other machine reaches.
        server_port: None: `GRADIO_SERVER_PORT`, else the first free port from 7860.

    Raises:
        ModelLoadError: the model cannot be loaded; no server has been started then.
    """
    tracker = load_model(model_folder, revision)
    page = build_page(tracker.model, tracker.feature_extractor)
    gc.freeze()  # what is there now stays for as long as the page: collecting the figures of a turn takes 25 ms
    page.launch(server_name=server_name, server_port=server_port, theme=theme(), **LAUNCH_OPTIONS)


def theme() -> gr.themes.Base:
    """Gradio's own look with fonts that are on the visitor's machine, so that none is fetched."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
