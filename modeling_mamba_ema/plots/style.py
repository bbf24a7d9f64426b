"""What the pictures share: colours, reading arrays, writing files.

Colours are those of Okabe & Ito, which colour-blind readers can tell apart; no picture tells things apart by colour
alone.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#999999"
SPEAKER_MARKERS = "osD^vP"
STYLES = ("-", "-.", ":")  # of lines, one a label


def as_array(values: Any, name: str, *dimensions: int) -> np.ndarray:
    """Arrays, lists or tensors of any device and type as float64; `ValueError` for other dimensions, or nothing in
    it."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in dimensions or array.size == 0:
        allowed = " or ".join(map(str, dimensions))
        raise ValueError(f"{name} has shape {array.shape}; it needs {allowed} dimension(s) and something in it")
    return array


def unit_limits(*values: Any, margin: float = 0.02) -> tuple[float, float]:
    """Limits of an axis on the unit scale, wider where values lie outside it, as unbounded predictions may."""
    shown = np.concatenate([np.array([0.0, 1.0]), *(np.ravel(np.asarray(some, dtype=np.float64)) for some in values)])
    return float(np.nanmin(shown)) - margin, float(np.nanmax(shown)) + margin


def interval_patch() -> Patch:
    """What stands for the bars of intervals in a legend."""
    return Patch(color=GREY, alpha=0.3, linewidth=0, label="interval")


def short_name(name: str, longest: int = 24) -> str:
    """A name for a legend: matplotlib hides those that begin with an underscore, and reads $ as mathematics."""
    shown = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return shown.replace("$", r"\$").replace("_", "\u02cd") if shown.startswith("_") else shown.replace("$", r"\$")


def write_picture(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write a figure as `<stem>.png` and `<stem>.svg`, the two paths that are returned; folders are made."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    figure.savefig(png, dpi=130)
    # The same outputs give the same file: no date, and ids that do not change from run to run.
    with matplotlib.rc_context({"svg.hashsalt": "mamba-ema", "svg.fonttype": "none"}):
        figure.savefig(svg, metadata={"Date": None})
    return png, svg
