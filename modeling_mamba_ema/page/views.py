"""What a visitor sees of their conversation, as HTML. Everything a visitor wrote is escaped."""

import base64
import gc
import io
import threading
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import soundfile as sf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from ..feature_extraction_mamba_ema import SAMPLING_RATE
from ..inference import TurnEmotion
from ..inference.reading import summarise
from ..plots import plot_attention, plot_circumplex, plot_trajectory

NOTHING_YET = "<p>Nothing heard yet: add a turn, or hear the shipped conversation.</p>"

# matplotlib shares font caches between figures and makes no promise for several threads.
_drawing = threading.Lock()

CSS = """
table { width: 100%; border-collapse: collapse; } th, td { padding: 4px 8px; text-align: right; }
th { position: sticky; top: 0; background: var(--background-fill-primary); }
th:nth-child(2), td:nth-child(2) { text-align: left; } tbody tr:last-child { font-weight: 600; }
small { font-weight: normal; }
@media (min-width: 700px) { small { white-space: nowrap; } }
img { width: 100%; background: white; } audio { width: 100%; }
.listen { position: relative; } .listen img { cursor: pointer; display: block; }
.cursor { position: absolute; top: 0; bottom: 0; width: 2px; background: #D55E00; pointer-events: none; }
"""

# The line over the picture follows the player, and a click on the picture moves the player.
JAVASCRIPT = """
const place = (audio) => {
  const line = element.querySelector('.cursor');
  if (!line || !audio.duration) return;
  const [left, right] = [Number(line.dataset.left), Number(line.dataset.right)];
  line.style.left = left + (right - left) * audio.currentTime / audio.duration + '%';
};
element.addEventListener('play', (event) => {
  const step = () => { place(event.target); if (!event.target.paused) requestAnimationFrame(step); };
  step();
}, true);
element.addEventListener('seeking', (event) => place(event.target), true);
element.addEventListener('click', (event) => {
  if (event.target.tagName !== 'IMG') return;
  const [audio, line] = [element.querySelector('audio'), element.querySelector('.cursor')];
  const box = event.target.getBoundingClientRect();
  const percent = 100 * (event.clientX - box.left) / box.width;
  const share = (percent - line.dataset.left) / (line.dataset.right - line.dataset.left);
  audio.currentTime = Math.min(1, Math.max(0, share)) * audio.duration;
});
"""


def numbers(
    turns: Sequence[TurnEmotion],
    scales: dict[str, tuple[float, float]],
    references: Sequence[Mapping[str, float]] = (),
) -> str:
    """A table of the turns, and the call in words. Values are on the unit scale, with their intervals, and beside
    it on the label's own scale, of `scales`, where that differs; then what is known of each turn's labels, on the
    unit scale."""
    if not turns:
        return NOTHING_YET
    own = [name for name, scale in scales.items() if scale != (0.0, 1.0)]
    header = ["turn", "speaker", "seconds", *(f"{name}<br>0 to 1" for name in map(escape, scales))]
    header += [f"{escape(name)}<br>{scales[name][0]:g} to {scales[name][1]:g}" for name in own]
    labelled = [name for name in scales if references and name in references[0]]
    header += [f"{escape(name)}<br>label" for name in labelled]
    rows = []
    for number, turn in enumerate(turns):
        speaker = escape(turn.speaker or "") + (" (near silence)" if turn.low_level else "")
        cells = [str(turn.turn), speaker, f"{turn.seconds:.2f}", *(_value(turn, name) for name in scales)]
        cells += [f"{turn.label_values[name]:.2f}" for name in own]
        cells += [f"{references[number][name]:.2f}" for name in labelled]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f"<th scope='col'>{name}</th>" for name in header)
    words = summarise(turns, [f"turn {turn.turn}" for turn in turns])
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"
        f"<p>{escape(words)}</p>"
    )


def _value(turn: TurnEmotion, label: str) -> str:
    ends = "" if turn.intervals is None else "<br><small>{:.2f} to {:.2f}</small>".format(*turn.intervals[label])
    return f"{turn.values[label]:.3f}{ends}"


def attention(waveform: np.ndarray, turn: TurnEmotion) -> str:
    """The attention over a turn's waveform, (samples,) at 16 kHz, with a player whose position is shown on the
    picture."""
    with _drawing:
        figure = plot_attention(waveform, turn.attention, title=f"Where the model listened: turn {turn.turn}")
        picture = _image(figure, f"Attention over the waveform and spectrogram of turn {turn.turn}")
        box = figure.axes[0].get_position()  # where the time axis begins and ends, in shares of the picture's width
    left, right = 100 * box.x0, 100 * box.x1
    sound = io.BytesIO()
    sf.write(sound, np.clip(waveform, -1, 1), SAMPLING_RATE, format="WAV", subtype="PCM_16")
    return (
        f"<div class='listen'>{picture}<div class='cursor' data-left='{left:.2f}' data-right='{right:.2f}' "
        f"style='left:{left:.2f}%'></div></div>"
        f"<audio controls aria-label='turn {turn.turn}' src='data:audio/wav;base64,{_base64(sound)}'></audio>"
    )


def trajectory(turns: Sequence[TurnEmotion]) -> str:
    """The path of emotion over the turns, and on the plane of valence and arousal where the model has both."""
    values = {name: [turn.values[name] for turn in turns] for name in turns[0].values}
    speakers = [turn.speaker or "" for turn in turns]
    known = [turn.intervals for turn in turns if turn.intervals is not None]
    intervals = {name: [ends[name] for ends in known] for name in (known[0] if known else ())}
    with _drawing:
        path = plot_trajectory(values, speakers, title="Turn by turn", intervals=intervals)
        html = _image(path, "Values over the turns, by speaker")
        if {"valence", "arousal"} <= set(values):
            plane = plot_circumplex(values["valence"], values["arousal"], speakers, title="Valence and arousal")
            html += _image(plane, "Path of each speaker on the plane of valence and arousal", width="62%")
    gc.collect()  # a figure is a cycle of some megabytes; left to themselves, a dozen turns of them pile up
    return html


def _image(figure: Figure, description: str, width: str = "100%") -> str:
    figure.set_dpi(100)  # independent of rcParams
    picture, canvas = io.BytesIO(), FigureCanvasAgg(figure)
    # savefig would draw a figure with a layout twice. Little compression: a tenth more bytes, a tenth less waiting.
    canvas.draw()
    imsave(picture, canvas.buffer_rgba(), format="png", pil_kwargs={"compress_level": 1})
    return (
        f"<img alt='{escape(description)}' style='width:{width}; margin:auto' "
        f"src='data:image/png;base64,{_base64(picture)}'>"
    )


def _base64(buffer: io.BytesIO) -> str:
    return base64.b64encode(buffer.getvalue()).decode()
