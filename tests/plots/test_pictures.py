"""The pictures show what they were given, on named axes, and refuse what does not belong together."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from matplotlib.legend import Legend

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.plots import (
    plot_attention,
    plot_by_row,
    plot_circumplex,
    plot_poolings,
    plot_timeline,
    plot_trajectory,
    write_picture,
)
from modeling_mamba_ema.plots.style import COLOURS
from modeling_mamba_ema.plots.training_pictures import (
    plot_error_by_position,
    plot_learning_curve,
    plot_predictions,
    plot_risk_against_coverage,
)
from modeling_mamba_ema.sample import load_sample_conversation
from tests.support.models import tiny_model

RANDOM = np.random.default_rng(0)
SECOND = RANDOM.normal(0, 0.1, 16_000)  # 49 frames
WEIGHTS = RANDOM.dirichlet(np.ones(49), size=4)
SEGMENTS = [
    {"start": 0.0, "end": 2.0, "speaker": "a", "valence": 0.25, "arousal": 0.5},
    {"start": 2.5, "end": 4.0, "speaker": "b", "valence": 0.75, "arousal": None, "low_level": True},
]


ROWS = {name: [{"label": label, "ccc": 0.5, "low": 0.0, "high": 1.0} for label in "va"] for name in ("clean", "noise")}
RISK = pd.DataFrame({"label": ["valence", "arousal"], "kept": [1.0, 0.5], "wrong_side": [0.3, 0.1], "mae": [0.2, 0.1]})


def line(axes, label):
    return next(drawn for drawn in axes.get_lines() if drawn.get_label() == label)


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_attention_is_drawn_in_percent_over_seconds():
    figure = plot_attention(SECOND, WEIGHTS[0])
    drawn = next(line(axes, "attention") for axes in figure.axes if axes.get_ylabel() == "weight of a frame (%)")
    np.testing.assert_allclose(drawn.get_ydata(), 100 * WEIGHTS[0])
    np.testing.assert_allclose(drawn.get_xdata(), 0.0125 + 0.02 * np.arange(49))
    assert figure.axes[0].get_xlim() == (0, 1)
    assert "time (s)" in words(figure)
    assert "frequency (kHz)" in words(figure)


def test_each_head_is_a_row_of_its_own():
    figure = plot_attention(SECOND, WEIGHTS)
    (image,) = [image for axes in figure.axes if axes.get_ylabel() == "head" for image in axes.get_images()]
    np.testing.assert_allclose(image.get_array(), 100 * WEIGHTS)
    mean = next(
        line(axes, "attention, mean of 4 heads") for axes in figure.axes if "weight of a frame" in axes.get_ylabel()
    )
    np.testing.assert_allclose(mean.get_ydata(), 100 * WEIGHTS.mean(axis=0))


@pytest.mark.parametrize("pooling", ["mean", "attention", "multihead_attention"])
def test_a_models_output_is_drawn_as_it_is_returned_also_from_a_padded_batch(pooling):
    turns = [turn["waveform"] for turn in load_sample_conversation()[:3]]
    model = tiny_model(speech_encoder_pooling=pooling)
    inputs = MambaEMAFeatureExtractor()(turns, sampling_rate=16_000, return_tensors="pt")
    attentions = model(**inputs).pooling_attentions.to(torch.bfloat16)  # with its graph, in half precision
    for waveform, attention in zip(turns, attentions):
        assert plot_attention(waveform, attention).axes


def test_weights_are_placed_in_seconds_whatever_the_rate_of_the_waveform():
    figure = plot_attention(RANDOM.normal(0, 0.1, 44_100), WEIGHTS[0], sampling_rate=44_100)
    assert figure.axes[0].get_xlim() == (0, 1)


@given(samples=st.integers(400, 40_000), heads=st.integers(1, 17))
@settings(max_examples=15, deadline=None)
def test_every_length_an_utterance_can_have_is_drawn(samples, heads):
    frames = (samples - 400) // 320 + 1
    waveform = np.random.default_rng(samples).normal(0, 0.1, samples)
    assert plot_attention(waveform, np.full((heads, frames), 1 / frames)).axes


def test_silence_is_drawn(tmp_path):
    png, _ = write_picture(plot_attention(np.zeros(400), [1.0]), tmp_path / "silence")
    assert png.stat().st_size > 1_000


def test_poolings_stand_side_by_side_on_one_scale():
    even = np.full(49, 1 / 49)
    figure = plot_poolings(
        SECOND, {"mean": even, "attention": WEIGHTS[0]}, predictions={"attention": {"valence": 0.25}}, title="turn 3"
    )
    panels = [axes for axes in figure.axes if any(x.get_label() == "attention" for x in axes.get_lines())]
    assert len(panels) == 2
    assert panels[0].get_ylim() == panels[1].get_ylim()
    np.testing.assert_allclose(line(panels[0], "attention").get_ydata(), 100 * even)
    np.testing.assert_allclose(line(panels[1], "attention").get_ydata(), 100 * WEIGHTS[0])
    assert "attention\nvalence 0.25" in words(figure)


@pytest.mark.parametrize(
    ("waveform", "attention", "message"),
    [
        (SECOND[None], WEIGHTS[0], r"waveform has shape \(1, 16000\)"),
        (SECOND, WEIGHTS[None], r"attention has shape \(1, 4, 49\)"),
        (SECOND, WEIGHTS[:, :20], "an utterance of 1.00 s has"),
        (SECOND[:6_000], WEIGHTS, "an utterance of 0.38 s has"),
        (SECOND, WEIGHTS * 2, "weights that sum to 1"),
        (SECOND, np.full(49, np.nan), "weights that sum to 1"),
        ([], WEIGHTS, "waveform has shape"),
        (SECOND[:399], [1.0], "a frame needs 0.025 s"),
    ],
)
def test_weights_of_another_utterance_are_refused(waveform, attention, message):
    with pytest.raises(ValueError, match=message):
        plot_attention(waveform, attention)
    if "waveform" in message:
        with pytest.raises(ValueError, match=message):
            plot_poolings(waveform, {"a": attention, "b": attention})


def test_one_pooling_is_no_comparison():
    with pytest.raises(ValueError, match="at least two"):
        plot_poolings(SECOND, {"mean": WEIGHTS[0]})


def test_the_trajectory_shows_values_speakers_and_labels():
    figure = plot_trajectory(
        {"valence": [0.1, np.nan, 0.9], "arousal": torch.tensor([0.3, 0.4, 0.5])},
        ["anna", "_ben$", "anna"],
        {"valence": [0.2, 0.2, 0.2]},
        title="call",
    )
    valence, arousal = figure.axes
    for axes, anna, ben in ((valence, [0.1, 0.9], [np.nan]), (arousal, [0.3, 0.5], [0.4])):
        of_anna, of_ben = axes.lines[:2]
        np.testing.assert_allclose(of_anna.get_ydata(), anna)
        np.testing.assert_array_equal(of_anna.get_xdata(), [1, 3])
        np.testing.assert_allclose(of_ben.get_ydata(), ben)
    np.testing.assert_allclose(line(valence, "label of the corpus").get_ydata(), 0.2)
    anna, ben, truth = (text.get_text() for text in figure.legends[0].get_texts())
    assert (anna, truth) == ("anna", "label of the corpus")
    assert "ben" in ben
    assert valence.get_ylabel().startswith("valence")
    assert arousal.get_xlabel() == "turn"


LABELS = ("valence", "arousal", "dominance")
LOG = [
    {"epoch": epoch, "step": epoch, "loss": 1 / epoch, "eval_ccc": 0.5} | {f"eval_ccc_{label}": 0.6 for label in LABELS}
    for epoch in range(1, 5)
]
TABLE = pd.DataFrame(
    [{"label": label, "reference": turn / 9, "prediction": 0.9 * turn / 9} for label in LABELS for turn in range(10)]
)
PATHS = {label: RANDOM.uniform(size=10) for label in LABELS}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_learning_curve(LOG, LABELS, best_step=3),
        lambda: plot_predictions(TABLE),
        lambda: plot_predictions(TABLE[TABLE["label"] == "valence"]),
        lambda: plot_trajectory(PATHS, ["anna", "ben"] * 5, PATHS, title="call"),
    ],
    ids=["learning curve", "predictions", "predictions of one label", "trajectory"],
)
def test_all_words_are_inside_the_picture(draw):
    figure = draw()
    figure.draw_without_rendering()
    for axes in figure.axes:  # with titles and the words at their edges
        box = axes.get_tightbbox()
        assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) >= 2


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_learning_curve(LOG, LABELS),
        lambda: plot_trajectory(PATHS, ["anna", "ben"] * 5, PATHS),
        lambda: plot_by_row(ROWS, "ccc", "CCC", origin=True),
        lambda: plot_error_by_position(TABLE.assign(position=0)),
        lambda: plot_risk_against_coverage(RISK),
    ],
    ids=["learning curve", "trajectory", "by row", "error by position", "risk against coverage"],
)
def test_legends_are_beside_the_lines(draw):
    figure = draw()
    figure.draw_without_rendering()
    legends = [legend for legend in figure.findobj(Legend) if legend.get_texts()]
    assert len(legends) == 1
    assert not any(legends[0].get_window_extent().overlaps(axes.bbox) for axes in figure.axes)


def test_predictions_are_drawn_with_their_ccc():
    assert "valence: CCC 0.981, 10 turns" in words(plot_predictions(TABLE))


def test_values_outside_the_unit_scale_are_inside_the_picture():
    values = [-0.3, 0.5, 1.4]
    trajectory, plane = (
        plot_trajectory({"valence": values, "arousal": [0.1, 0.2, 0.3]}),
        plot_circumplex(values, values),
    )
    timeline = plot_timeline(
        [{"start": n, "end": n + 1, "valence": value} for n, value in enumerate(values)], ["valence"]
    )
    limits = [trajectory.axes[0].get_ylim(), plane.axes[0].get_xlim(), plane.axes[0].get_ylim()]
    for low, high in (*limits, timeline.axes[0].get_ylim()):
        assert low < -0.3
        assert high > 1.4
    assert plot_trajectory({"valence": [0.1, 0.9]}).axes[0].get_ylim() == (-0.02, 1.02)


def test_the_circumplex_has_a_path_a_speaker():
    figure = plot_circumplex([0.1, 0.5, 0.9], [0.2, 0.6, 0.8], ["a", "b", "a"])
    (axes,) = figure.axes
    np.testing.assert_allclose(line(axes, "a").get_xydata(), [[0.1, 0.2], [0.9, 0.8]])
    np.testing.assert_allclose(line(axes, "b").get_xydata(), [[0.5, 0.6]])
    assert axes.get_xlabel().startswith("valence")
    assert axes.get_ylabel().startswith("arousal")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_trajectory({}),
        lambda: plot_trajectory({"valence": [0.1, 0.2], "arousal": [0.1]}),
        lambda: plot_trajectory({"valence": [0.1, 0.2]}, ["a"]),
        lambda: plot_trajectory({"valence": [0.1, 0.2]}, references={"valence": [0.1]}),
        lambda: plot_trajectory({"valence": [[0.1, 0.2]]}),
        lambda: plot_circumplex([0.1, 0.2], [0.1]),
        lambda: plot_circumplex([0.1, 0.2], [0.1, 0.2], ["a"]),
        lambda: plot_circumplex([], []),
        lambda: plot_timeline([], ["valence"]),
        lambda: plot_timeline(SEGMENTS, ["dominance"]),
        lambda: plot_timeline([{**SEGMENTS[0], "end": 0.0}], ["valence"]),
    ],
)
def test_turns_that_do_not_fit_together_are_refused(draw):
    with pytest.raises(ValueError, match="turn|dimension|segment"):
        draw()


def test_intervals_are_named_in_the_legend():
    path = plot_trajectory({"valence": [0.2, 0.4]}, intervals={"valence": [[0.1, 0.3], [0.2, 0.6]]})
    assert [text.get_text() for text in path.legends[0].get_texts()] == ["prediction", "interval"]
    segment = {"start": 0, "end": 1, "valence": 0.5, "valence_low": 0.4, "valence_high": 0.6}
    timeline = plot_timeline([segment], ["valence"])
    assert [text.get_text() for text in timeline.axes[0].get_legend().get_texts()] == ["interval"]


def test_the_timeline_places_segments_in_time_and_by_speaker():
    figure = plot_timeline(SEGMENTS, ["valence", "arousal"], title="call.wav")
    valence, arousal, lanes = figure.axes

    def bars(axes):
        return {tuple(map(tuple, path)) for lines in axes.collections for path in lines.get_segments()}

    assert bars(valence) == {((0.0, 0.25), (2.0, 0.25)), ((2.5, 0.75), (4.0, 0.75))}
    assert bars(arousal) == {((0.0, 0.5), (2.0, 0.5))}
    assert [text.get_text() for text in valence.get_legend().get_texts()] == ["a", "b"]
    assert [text.get_text() for text in lanes.get_yticklabels()] == ["a", "b"]
    assert lanes.get_xlabel() == "time (s)"


def test_each_speaker_of_a_timeline_has_a_line_with_gaps_where_nobody_speaks():
    turns = [(0, 2, "a"), (2, 5, "b"), (4, 6, "a"), (6.5, 8, "b"), (20, 22, "a"), (22, 24, "a"), (24, 25, "b")]
    segments = [
        {"start": start, "end": end, "speaker": speaker, "valence": 0.1 * number}
        for number, (start, end, speaker) in enumerate(turns)
    ]
    axes = plot_timeline(list(reversed(segments)), ["valence"]).axes[0]
    lines = {
        (line.get_color(), tuple(line.get_xdata()))
        for line in axes.get_lines()
        if line.get_linestyle() == "-" and len(line.get_xdata())
    }
    a, b = COLOURS[:2]
    assert lines == {(a, (1.0, 5.0)), (b, (3.5, 7.25)), (a, (21.0, 23.0)), (b, (24.5,))}


def test_an_hour_reads_as_hours_and_a_recording_without_speakers_has_no_lanes():
    segments = [{"start": 10.0 * i, "end": 10.0 * i + 9, "valence": 0.5} for i in range(400)]
    figure = plot_timeline(segments, ["valence"])
    (axes,) = figure.axes
    assert axes.get_xlabel() == "time (h:mm:ss)"
    figure.draw_without_rendering()
    assert "0:10:00" in [text.get_text() for text in axes.get_xticklabels()]


def test_png_and_svg_are_written_and_the_same_outputs_give_the_same_files(tmp_path):
    drawn = {
        "attention": lambda: plot_attention(SECOND, WEIGHTS, salient=(0.2, 0.5), title="a"),
        "trajectory": lambda: plot_trajectory({"valence": [0.1, 0.5]}, ["a", "b"]),
        "circumplex": lambda: plot_circumplex([0.1, 0.5], [0.1, 0.5]),
        "timeline": lambda: plot_timeline(SEGMENTS, ["valence"]),
    }
    for name, draw in drawn.items():
        png, svg = write_picture(draw(), tmp_path / "new" / name)
        assert imread(png).std() > 0.05
        assert re.search(r"<svg[^>]*viewBox", svg.read_text())
        again = write_picture(draw(), tmp_path / "again" / name)
        assert (png.read_bytes(), svg.read_bytes()) == (again[0].read_bytes(), again[1].read_bytes())


def test_intervals_are_drawn_and_stay_inside_the_picture():
    figure = plot_trajectory({"valence": [0.1, 0.9]}, intervals={"valence": [[-0.2, 0.3], [0.7, 1.2]]})
    (bars,) = list(figure.axes[0].collections)
    np.testing.assert_allclose([path[:, 1] for path in bars.get_segments()], [[-0.2, 0.3], [0.7, 1.2]])
    assert figure.axes[0].get_ylim()[0] < -0.2
    with pytest.raises(ValueError, match="interval of valence"):
        plot_trajectory({"valence": [0.1, 0.9]}, intervals={"valence": [0.1, 0.2]})
    segments = [{"start": 0, "end": 2, "valence": 0.5, "valence_low": 0.25, "valence_high": 0.75}]
    axes = plot_timeline([*segments, {"start": 3, "end": 4, "valence": None}], ["valence"]).axes[0]
    bounds = [artist.get_datalim(axes.transData).bounds for artist in axes.collections]
    assert any(found == pytest.approx((0, 0.25, 2, 0.5)) for found in bounds)
