"""eGeMAPS and a support vector regressor on any corpus, compared with a model's predictions."""

import re
import runpy
import sys

import numpy as np
import pandas as pd
import pytest

from modeling_mamba_ema.metrics import concordance_cc, paired_bootstrap_difference
from tests.support.programs import ROOT, call_program
from tests.support.tiny_corpus import write_corpus

sklearn_svm = pytest.importorskip("sklearn.svm", reason="scikit-learn: pip install '.[baseline]'")
PROGRAM = "examples/classical_baseline.py"
LABELS = ("valence", "arousal")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def baseline(corpus, tmp_path_factory):
    """The table that the program writes, and what it prints."""
    pytest.importorskip("opensmile", reason="openSMILE, for research only: pip install '.[baseline]'")
    path = tmp_path_factory.mktemp("baseline") / "predictions.csv"
    assert call_program(PROGRAM, str(corpus), "--output", str(path)) == 0
    return pd.read_csv(path), path


def by_label(table):
    return {label: table[table["label"] == label] for label in LABELS}


def test_it_predicts_the_test_split_and_hears_what_can_be_heard(corpus, baseline):
    table, _ = baseline
    rows = pd.read_json(corpus / "metadata.jsonl", lines=True)
    assert set(table["conversation_id"]) == set(rows[rows["split"] == "test"]["conversation_id"])
    assert len(table) == 2 * (rows["split"] == "test").sum()
    loudness = by_label(table)["arousal"]  # loudness carries arousal in this corpus, nothing carries valence
    assert concordance_cc(loudness["prediction"], loudness["reference"]) > 0.7


def test_the_difference_to_a_model_is_paired(corpus, baseline, tmp_path, capsys):
    table, _ = baseline
    random, paths, runs = np.random.default_rng(0), [], []
    for seed in range(2):
        model = table.assign(prediction=table["reference"] + random.normal(0, 0.1, len(table)))
        paths.append(str(tmp_path / f"{seed}.csv"))
        model.sample(frac=1.0, random_state=seed).to_csv(paths[-1], index=False)
        runs.append(np.stack([by_label(model)[label]["prediction"] for label in LABELS], axis=1))
    assert call_program(PROGRAM, str(corpus), "--predictions", *paths) == 0
    shown = capsys.readouterr().out
    printed = re.search(r"model - eGeMAPS.*valence (\S+) \[(\S+), (\S+)\], arousal", shown).groups()
    own = np.stack([by_label(table)[label]["prediction"] for label in LABELS], axis=1)
    references = np.stack([by_label(table)[label]["reference"] for label in LABELS], axis=1)
    conversations = by_label(table)["valence"]["conversation_id"].tolist()
    low, high = paired_bootstrap_difference(np.stack(runs), np.stack([own, own]), references, conversations)
    value = np.mean([concordance_cc(run[:, 0], references[:, 0]) for run in runs])
    value -= concordance_cc(own[:, 0], references[:, 0])
    assert [float(number) for number in printed] == pytest.approx([value, low[0], high[0]], abs=1e-3)
    ensemble = concordance_cc(np.mean(runs, axis=0)[:, 0], references[:, 0])
    assert float(re.search(r"ensemble of the models: CCC valence (\S+)", shown)[1]) == pytest.approx(ensemble, abs=1e-3)


def test_what_cannot_be_compared_is_refused(corpus, baseline, tmp_path, monkeypatch):
    def refused(*options):
        monkeypatch.setattr(sys, "argv", [PROGRAM, str(corpus), *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / PROGRAM), run_name="__main__")
        return ended.value.code

    table, _ = baseline
    table[5:].to_csv(tmp_path / "part.csv", index=False)
    assert "part.csv has no prediction for 5 of the" in refused("--predictions", tmp_path / "part.csv")
    table.drop(columns="turn").to_csv(tmp_path / "columns.csv", index=False)
    assert "columns.csv lacks the column turn" in refused("--predictions", tmp_path / "columns.csv")
    assert "has no split exam; there are test, train" in refused("--test-split", "exam")


def test_speakers_are_left_out_in_turn():
    program = runpy.run_path(str(ROOT / PROGRAM))
    speakers = np.array(["03", "08", "09", "10", "03", "08"])
    assert program["speaker_folds"](speakers, 2).tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="--leave-speakers-out is 3, but must divide the number of speakers, 4"):
        program["speaker_folds"](speakers, 3)
    # a turn is predicted by a model that has not seen its fold, on features standardised without it
    random = np.random.default_rng(0)
    features, references = random.normal(size=(6, 3)), random.random((6, 2))
    references[0, 1] = -100.0
    folds = np.array([0, 1, 0, 1, -1, -1])
    predicted = program["predict_folds"](features, references, folds)
    assert np.isnan(predicted[4:]).all()
    learnt = [1, 3, 4, 5]
    scaled = (features - features[learnt].mean(0)) / features[learnt].std(0)
    for column in (0, 1):
        model = sklearn_svm.SVR(C=1, epsilon=0.05).fit(scaled[learnt], references[learnt, column])
        assert predicted[[0, 2], column] == pytest.approx(model.predict(scaled[[0, 2]]))


@pytest.mark.slow
def test_on_emodb_it_gives_the_figures_of_others(emodb, capsys):
    pytest.importorskip("opensmile", reason="openSMILE, for research only: pip install '.[baseline]'")
    assert call_program(PROGRAM, emodb, "--label-range", 0, 100, "--leave-speakers-out", 2) == 0
    assert re.search(r"valence 0\.371 .*arousal 0\.797 ", capsys.readouterr().out)
