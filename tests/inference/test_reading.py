"""Values, trends and change points in words, and silence where the numbers do not say it."""

from dataclasses import replace

import numpy as np
import pytest

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.inference.reading import change_points, read_turn, summarise, trend
from modeling_mamba_ema.inference.tracker import TurnEmotion
from tests.support.models import tiny_model


def around(values, reach):
    return {label: (value - reach, value + reach) for label, value in values.items()}


def turn(number, speaker, valence, arousal, reach=0.1, low_level=False):
    values = {"valence": valence, "arousal": arousal}
    none = dict.fromkeys(("differences", "confidence", "spread", "label_spread"))
    plain = {"label_values": values, "baseline_turns": 0, "reading": "", **none}
    return TurnEmotion(
        turn=number,
        speaker=speaker,
        values=values,
        intervals=around(values, reach),
        attention=np.empty((0, 0)),
        seconds=2.0,
        low_level=low_level,
        **plain,
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"valence": 0.2, "arousal": 0.9}, "unpleasant and excited, 0.50 from neutral"),
        ({"valence": 0.8, "arousal": 0.5}, "pleasant, 0.30 from neutral"),
        ({"valence": 0.45, "arousal": 0.3}, "calm, 0.20 from neutral"),
        ({"valence": 0.41, "arousal": 0.59}, ""),
        ({"valence": 0.5, "arousal": 0.5, "dominance": 0.1, "anger": 0.9}, "submissive, 0.40 from neutral"),
    ],
)
def test_a_value_is_in_words_where_its_interval_lies_on_one_side_of_neutral(values, words):
    assert read_turn(values, around(values, 0.1)) == words
    assert read_turn(values, None) == ""  # without intervals nothing is sure


def test_the_interval_of_a_trend_is_that_of_least_squares():
    linregress = pytest.importorskip("scipy.stats").linregress
    student = pytest.importorskip("scipy.stats").t
    random = np.random.default_rng(0)
    for count in (5, 6, 7, 8, 20):
        values = random.normal(0.5, 0.1, count).tolist()
        last = values[-8:]
        expected = linregress(range(len(last)), last)
        reach = student.ppf(0.995, len(last) - 2) * expected.stderr
        found = trend(values)
        assert found == pytest.approx((expected.slope, expected.slope - reach, expected.slope + reach), abs=1e-4)
    assert trend(values[:4]) is None


def test_a_trend_is_said_where_its_interval_excludes_zero():
    noise = [0.002, -0.003, 0.001, 0.002, -0.002, 0.0, 0.003, -0.001]
    recent = [{"valence": 0.7 - 0.03 * n + e, "arousal": 0.5 + 0.1 * (-1) ** n} for n, e in enumerate(noise)]
    words = read_turn(recent[-1], None, recent)
    assert words.startswith("valence falling by 0.030 a turn (0.02")
    assert "arousal" not in words
    random = np.random.default_rng(0)
    said = [
        bool(read_turn(s[-1], None, s)) for s in ([{"valence": v} for v in random.normal(size=8)] for _ in range(400))
    ]
    assert np.mean(said) < 0.03  # 1 % of what stands still


def test_change_points_are_where_the_mean_shifts_and_nowhere_else():
    random = np.random.default_rng(0)
    values = np.concatenate([np.full(12, 0.3), np.full(9, 0.7), np.full(15, 0.45)]) + random.normal(0, 0.05, 36)
    assert change_points(values) == [12, 21]
    assert change_points(values[:5]) == change_points(np.full(30, 0.5) + 1e-3 * random.normal(size=30)) == []
    false = [change_points(random.normal(size=40)) for _ in range(100)]
    assert sum(map(bool, false)) <= 5


def test_a_call_in_a_paragraph():
    anna = [turn(n, "anna", 0.3 + 0.01 * (n % 3), 0.52) for n in range(1, 13)]
    anna += [turn(n, "anna", 0.7 + 0.01 * (n % 3), 0.52) for n in range(13, 25)]
    quiet = turn(25, "anna", 0.0, 0.0, low_level=True)
    ben = turn(26, None, 0.1, 0.2)
    turns = [*anna, quiet, ben]
    text = summarise(turns, [f"0:{number:02d}" for number in range(len(turns))])
    assert text == (
        "anna (24 turns, 48 s): valence 0.51, arousal 0.52 on average; surely unpleasant in 12; surely pleasant in 12. "
        "Valence rose from 0.31 to 0.71 at 0:12. Speakers without a name (1 turn, 2 s): valence 0.10, arousal 0.20 on "
        "average; surely unpleasant in 1; surely calm in 1."
    )
    assert summarise([quiet], ["0:00"]).startswith("All of it is near silence")
    assert summarise([], []) == "There are no values to sum up."


def test_the_tracker_reads_each_turn_with_the_last_turns_of_its_speaker():
    radii = {"0.9": 0.05}
    live = EmotionTracker(tiny_model(interval_radii={"valence": radii, "arousal": radii}), MambaEMAFeatureExtractor())
    random = np.random.default_rng(0)
    heard = [live.update(random.normal(0, 0.1, 3_000), 16_000, speaker="ab"[n % 2]) for n in range(14)]
    for place, result in enumerate(heard):
        own = [other.values for other in heard[: place + 1] if other.speaker == result.speaker][-8:]
        assert result.reading == read_turn(result.values, result.intervals, own)
    assert any("from neutral" in result.reading for result in heard)
    assert live.row(heard[-1])["reading"] == heard[-1].reading


def test_what_is_left_out_of_a_turn_is_in_neither_its_reading_nor_the_summary():
    whole = turn(1, "anna", 0.9, 0.2)
    assert whole.only(["valence", "arousal"]) is whole
    shown = replace(whole, reading=read_turn(whole.values, whole.intervals)).only(["valence"])
    assert "pleasant" in shown.reading
    assert "calm" not in shown.reading
    assert (shown.values, set(shown.label_values), shown.differences) == ({"valence": 0.9}, {"valence"}, None)
    summary = summarise([whole.only(["valence"]), whole, whole.only([])], ["turn 1", "turn 2", "turn 3"])
    assert "2 turns" in summary
    assert "surely pleasant in 2" in summary
    assert "surely calm in 1" in summary
    assert summarise([whole.only([])], ["turn 1"]) == "There are no values to sum up."
