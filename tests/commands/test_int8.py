"""`--int8`: every command that runs a model takes it, and gives nearly the same numbers."""

import json

import pandas as pd
import pytest

from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.inference.tracker import TurnEmotion
from modeling_mamba_ema.sample import load_sample_conversation
from tests.support.models import tiny_model
from tests.support.programs import call_command


def values(rows):
    return [[row[label] for label in ("valence", "arousal")] for row in rows]


def test_predict_and_score_in_8_bits_give_nearly_the_numbers_of_float32(saved_model, corpus, tmp_path, capsys):
    assert call_command("predict", "--model", saved_model, "--sample", "--json") == 0
    whole = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert call_command("predict", "--model", saved_model, "--sample", "--json", "--int8") == 0
    small = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert values(small) != values(whole)
    for got, wanted in zip(values(small), values(whole), strict=True):
        assert got == pytest.approx(wanted, abs=0.05)

    for folder, options in (("whole", ()), ("small", ("--int8",))):
        assert call_command("score", "--model", saved_model, corpus, "--output", tmp_path / folder, *options) == 0
    whole, small = (pd.read_parquet(tmp_path / folder).to_dict("records") for folder in ("whole", "small"))
    assert values(small) != values(whole)
    for got, wanted in zip(values(small), values(whole), strict=True):
        assert got == pytest.approx(wanted, abs=0.05, nan_ok=True)
    capsys.readouterr()
    # a folder is of one precision
    assert call_command("score", "--model", saved_model, corpus, "--output", tmp_path / "whole", "--int8") == 1
    assert "int8 False then, True now" in capsys.readouterr().err


def test_evaluate_measures_the_encoder_in_8_bits(corpus, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    ccc = []
    for options in ((), ("--int8",)):
        arguments = ("--model", tmp_path / "model", corpus, "--split", "train", "--output", tmp_path)
        assert call_command("evaluate", *arguments, *options) == 0
        ccc.append(json.loads((tmp_path / "metrics.json").read_text())["ccc"])
    assert ccc[1] != ccc[0]
    assert ccc[1] == pytest.approx(ccc[0], abs=0.1)


def test_the_tracker_hears_the_same_in_8_bits(saved_model):
    turn = load_sample_conversation()[0]["waveform"]
    heard: list[TurnEmotion] = [
        EmotionTracker.from_pretrained(saved_model, int8=int8).update(turn, 16_000) for int8 in (False, True)
    ]
    assert heard[1].values == pytest.approx(heard[0].values, abs=0.05)
