"""Where in time the model listened: pooling weights over the waveform and the spectrogram of an utterance.

The functions take a waveform and `pooling_attentions` as arrays and return a matplotlib `Figure`; `write_picture`
writes it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import COLOURS, GREY, as_array

HOP_SECONDS = 0.02  # between two of WavLM's frames: 320 samples at 16 kHz
FRAME_SECONDS = 0.025  # that a frame sees: 400 samples at 16 kHz


def plot_attention(
    waveform: Any,
    attention: Any,
    sampling_rate: int = 16_000,
    salient: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Pooling weights over the waveform and the spectrogram of an utterance; several heads get a panel of their own.

    Args:
        waveform: (samples,) at `sampling_rate` Hz.
        attention: (heads, frames) or (frames,): one utterance of `pooling_attentions`. Frames of padding behind the end
            of the waveform are left out.
        salient: start and end in seconds of a stretch to mark.

    Raises:
        ValueError: the waveform is not (samples,), or the weights are not those of an utterance of its length.
    """
    waveform = as_array(waveform, "waveform", 1)
    seconds = waveform.size / sampling_rate
    times, weights = _weights_over_time(attention, seconds, "attention")  # (frames,), (heads, frames)
    heads = len(weights)

    figure = Figure(figsize=(9, 5.2 if heads == 1 else 6.2 + 0.12 * heads), layout="constrained")
    heights = (3, 2) if heads == 1 else (3, 0.6 + 0.2 * min(heads, 16), 2)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    wave_axes, spectrum_axes = panels[0], panels[-1]
    weight_axes = _draw_wave(wave_axes, waveform, seconds, times, weights)
    wave_axes.set_title(title, fontsize=12)
    weight_axes.set_ylabel("weight of a frame (%)")
    if salient is not None:
        wave_axes.axvspan(*salient, color=COLOURS[4], alpha=0.25, linewidth=0, label="stretch that carries the emotion")
    if heads > 1:
        _draw_heads(figure, panels[1], weights, times)
    _draw_spectrogram(spectrum_axes, waveform, sampling_rate)
    spectrum_axes.set_xlabel("time (s)")
    spectrum_axes.set_xlim(0, seconds)
    handles = [*weight_axes.get_legend_handles_labels()[0], *wave_axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def plot_poolings(
    waveform: Any,
    attentions: Mapping[str, Any],
    sampling_rate: int = 16_000,
    predictions: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "",
) -> Figure:
    """Several poolings on one utterance, side by side on the same axes.

    Args:
        waveform: (samples,) at `sampling_rate` Hz.
        attentions: for each pooling, by name, its weights as in [`plot_attention`].
        predictions: for each pooling the predicted values by label, written under its name.

    Raises:
        ValueError: fewer than two poolings, or shapes that do not belong to the utterance.
    """
    if len(attentions) < 2:
        raise ValueError(f"attentions holds {len(attentions)} poolings; at least two are needed to compare")
    waveform = as_array(waveform, "waveform", 1)
    seconds = waveform.size / sampling_rate
    figure = Figure(figsize=(5.2 * len(attentions), 5.2), layout="constrained")
    panels = figure.subplots(2, len(attentions), sharex=True, sharey="row", height_ratios=(3, 2))
    figure.suptitle(title, fontsize=12)
    weight_panels = []
    for column, (name, attention) in enumerate(attentions.items()):
        times, weights = _weights_over_time(attention, seconds, name)
        weight_panels.append(_draw_wave(panels[0, column], waveform, seconds, times, weights))
        values = (predictions or {}).get(name, {})
        written = ", ".join(f"{label} {value:.2f}" for label, value in values.items())
        panels[0, column].set_title(f"{name}\n{written}" if written else name, fontsize=11)
        _draw_spectrogram(panels[1, column], waveform, sampling_rate)
        panels[1, column].set_xlabel("time (s)")
        panels[1, column].set_xlim(0, seconds)
    # One scale for all weights, or a flat pooling looks as peaked as a sharp one.
    top = max(axes.get_ylim()[1] for axes in weight_panels)
    for axes in weight_panels:
        axes.set_ylim(0, top)
        axes.tick_params(labelright=axes is weight_panels[-1])
    weight_panels[-1].set_ylabel("weight of a frame (%)")
    for row in panels:
        for axes in row[1:]:
            axes.set_ylabel("")
    handles = weight_panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def _weights_over_time(attention: Any, seconds: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """-> times of the frames' middles (frames,) in seconds, weights (heads, frames); padding cut off."""
    weights = np.atleast_2d(as_array(attention, name, 1, 2))
    if seconds < FRAME_SECONDS:
        raise ValueError(f"the waveform lasts {seconds:.4f} s; a frame needs {FRAME_SECONDS} s")
    expected = int((seconds - FRAME_SECONDS) / HOP_SECONDS + 1e-6) + 1
    sums = weights[:, : expected + 1].sum(axis=1)
    # A frame more or less is a matter of rounding at another sampling rate than the model's.
    if weights.shape[1] < expected - 1 or not np.allclose(sums, 1, atol=1e-2):
        raise ValueError(
            f"{name} has shape {weights.shape} and sums over the utterance of {np.round(sums[:4], 3).tolist()}; an "
            f"utterance of {seconds:.2f} s has (heads, {expected}) weights that sum to 1 for each head"
        )
    weights = weights[:, :expected]
    return np.arange(weights.shape[1]) * HOP_SECONDS + FRAME_SECONDS / 2, weights


def _draw_wave(axes: Axes, waveform: np.ndarray, seconds: float, times: np.ndarray, weights: np.ndarray) -> Axes:
    """The waveform, and on a second axis the weights (several heads: their mean); returns the second axis."""
    axes.plot(np.linspace(0, seconds, waveform.size, endpoint=False), waveform, color=GREY, linewidth=0.5)
    axes.set_ylabel("amplitude")
    peak = float(np.abs(waveform).max()) or 1.0
    axes.set_ylim(-1.1 * peak, 1.1 * peak)
    weight_axes: Axes = axes.twinx()
    name = "attention" if len(weights) == 1 else f"attention, mean of {len(weights)} heads"
    weight_axes.plot(times, 100 * weights.mean(axis=0), color=COLOURS[0], linewidth=1.8, label=name)
    even = 100 / weights.shape[1]
    weight_axes.axhline(even, color="black", linestyle=":", linewidth=1.2, label="every frame alike (mean pooling)")
    weight_axes.set_ylim(0, 1.08 * max(2 * even, 100 * float(weights.mean(axis=0).max())))
    return weight_axes


def _draw_heads(figure: Figure, axes: Axes, weights: np.ndarray, times: np.ndarray) -> None:
    """A row a head, dark where it listens."""
    left, right = times[0] - HOP_SECONDS / 2, times[-1] + HOP_SECONDS / 2
    image = axes.imshow(
        100 * weights,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        interpolation="nearest",
        extent=(left, right, len(weights) - 0.5, -0.5),
    )
    step = 1 + (len(weights) - 1) // 8
    axes.set_yticks(range(0, len(weights), step))
    axes.set_ylabel("head")
    figure.colorbar(image, ax=axes, label="weight (%)", pad=0.01)


def _draw_spectrogram(axes: Axes, waveform: np.ndarray, sampling_rate: int) -> None:
    """Power over 25 ms every 10 ms, the 80 dB below its peak."""
    window = min(round(FRAME_SECONDS * sampling_rate), waveform.size // 2)
    overlap = round(0.6 * window)
    power, _, _, image = axes.specgram(
        waveform + 1e-8, NFFT=window, noverlap=overlap, Fs=sampling_rate, cmap="cividis", rasterized=True
    )
    peak = max(10 * float(np.log10(power.max())), -60.0)  # silence stays dark
    image.set_clim(peak - 80, peak)
    axes.set_facecolor(colormaps["cividis"](0.0))  # the last half window has no column of its own
    axes.set_ylim(0, sampling_rate / 2)
    step = 2000 if sampling_rate <= 24_000 else 5000
    ticks = np.arange(0, sampling_rate / 2 + 1, step)
    axes.set_yticks(ticks, [f"{tick / 1000:g}" for tick in ticks])
    axes.set_ylabel("frequency (kHz)")
