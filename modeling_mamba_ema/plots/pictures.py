"""Attention over an utterance, and the path of emotion over a conversation.

The functions take outputs of the model as arrays and return a matplotlib `Figure`; `figure.savefig("x.png")` or
`"x.svg"` writes it. Colours are those of Okabe & Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#999999"
SPEAKER_MARKERS = "osD^vP"


def plot_attention(
    waveform: Any,
    attention: Any,
    sampling_rate: int = 16_000,
    salient: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Pooling weights over the waveform and the spectrogram of an utterance.

    Args:
        waveform: (samples,).
        attention: (heads, frames) or (frames,), the valid frames of `pooling_attentions`.
        sampling_rate: of the waveform, in Hz.
        salient: start and end in seconds of a stretch to mark.
        title: above the picture.
    """
    waveform = np.asarray(waveform, dtype=np.float64)
    weights = np.atleast_2d(np.asarray(attention, dtype=np.float64))  # (heads, frames)
    seconds = waveform.size / sampling_rate
    frame_times = (np.arange(weights.shape[1]) + 0.5) * seconds / weights.shape[1]

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    wave_axes, spectrum_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    wave_axes.plot(np.arange(waveform.size) / sampling_rate, waveform, color=GREY, linewidth=0.5)
    wave_axes.set_ylabel("amplitude")
    wave_axes.set_title(title, fontsize=12)
    if salient is not None:
        wave_axes.axvspan(*salient, color=COLOURS[4], alpha=0.25, linewidth=0, label="stretch that carries the emotion")
    weight_axes = wave_axes.twinx()
    for head, row in enumerate(weights):
        name = "attention" if len(weights) == 1 else f"attention, head {head}"
        weight_axes.plot(frame_times, 100 * row, color=COLOURS[head % len(COLOURS)], linewidth=1.8, label=name)
    weight_axes.axhline(100 / weights.shape[1], color="black", linestyle=":", linewidth=1, label="mean pooling")
    weight_axes.set_ylabel("weight of a frame (%)")
    weight_axes.set_ylim(bottom=0)
    handles = [*weight_axes.get_legend_handles_labels()[0], *wave_axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    spectrum_axes.specgram(
        waveform + 1e-8, NFFT=400, noverlap=240, Fs=sampling_rate, cmap="cividis", vmin=-120, scale="dB"
    )
    spectrum_axes.set_ylim(0, sampling_rate / 2)
    spectrum_axes.set_yticks(
        np.arange(0, sampling_rate / 2 + 1, 2000), np.arange(0, sampling_rate / 2000 + 1, 2).astype(int)
    )
    spectrum_axes.set_ylabel("frequency (kHz)")
    spectrum_axes.set_xlabel("time (s)")
    spectrum_axes.set_xlim(0, seconds)
    return figure


def plot_trajectory(
    predictions: Mapping[str, Sequence[float]],
    speakers: Sequence[str] | None = None,
    references: Mapping[str, Sequence[float]] | None = None,
    title: str = "",
) -> Figure:
    """Predicted emotion over the turns of a conversation.

    Args:
        predictions: for each label, one value a turn on the unit scale.
        speakers: one name a turn; each speaker gets a marker.
        references: true values of some labels, drawn dashed.
        title: above the picture.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    turns = np.arange(1, len(next(iter(predictions.values()))) + 1)
    names = list(dict.fromkeys(speakers or []))
    for index, (label, values) in enumerate(predictions.items()):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(turns, values, color=colour, linewidth=2, label=label, marker=None if names else "o")
        for marker, name in zip(SPEAKER_MARKERS, names):
            own = [turn for turn, speaker in enumerate(speakers or []) if speaker == name]
            axes.plot(turns[own], np.asarray(values)[own], marker, color=colour, markersize=8)
        if references and label in references:
            axes.plot(
                turns, references[label], "--", color=colour, linewidth=1.2, label=f"{label}, label of the corpus"
            )
    for marker, name in zip(SPEAKER_MARKERS, names):
        axes.plot([], [], marker, color="black", label=name)
    axes.set_xlabel("turn")
    axes.set_ylabel("0 = low, 1 = high")
    axes.set_xticks(turns)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=12)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    return figure
