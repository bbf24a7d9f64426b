"""The comparison of poolings: its statistics on planted results, its words, and the program on a tiny corpus."""

import json
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState

from modeling_mamba_ema import MambaEMAForRegression
from modeling_mamba_ema.comparison import Cell, PoolingResult, check_comparable
from modeling_mamba_ema.comparison.costs import Cost, encoder_cost, pooling_costs
from modeling_mamba_ema.comparison.report import ENCODER, Measured, comparison_page, verdict
from modeling_mamba_ema.comparison.statistics import MEAN, Difference, cell_ccc, compare_poolings
from modeling_mamba_ema.metrics import concordance_cc, paired_bootstrap_difference
from modeling_mamba_ema.pooling import POOLINGS
from modeling_mamba_ema.training import KeepBestWeights, load_run_configuration
from tests.support.models import tiny_config, tiny_model
from tests.support.programs import Forked, call_command, call_program, wait_until
from tests.support.tiny_corpus import LABELS, write_corpus, write_run

# statistics


def planted_tables(quality, seeds=2, folds=(None,), conversations=20, turns=6):
    """Tables of every cell; `quality` is the share of the truth in each pooling's predictions."""
    tables = {}
    for seed, fold, (pooling, share) in product(range(seeds), folds, quality.items()):
        truth = np.random.default_rng(len(fold or "")).uniform(size=(conversations * turns, 2))
        noise = np.random.default_rng([seed, 7, len(fold or "")]).uniform(size=truth.shape)  # the same for all poolings
        predictions = share * truth + (1 - share) * noise
        rows = [
            (f"c{i // turns:02d}", i % turns, label, truth[i, column], predictions[i, column])
            for i in range(len(truth))
            for column, label in enumerate(LABELS)
        ]
        tables[Cell(pooling, "none", seed, fold)] = pd.DataFrame(
            rows, columns=["conversation_id", "turn", "label", "reference", "prediction"]
        )
    return tables


def test_a_pooling_that_is_better_is_found_and_an_equal_one_is_not():
    mean, better, equal = compare_poolings(planted_tables({"mean": 0.5, "attention": 0.6, "statistics": 0.5}), LABELS)
    assert mean.difference is None
    difference = better.difference[MEAN]
    assert difference.corrected_low < difference.low < difference.value < difference.high < difference.corrected_high
    assert difference.value == pytest.approx(better.ccc[MEAN] - mean.ccc[MEAN])
    assert difference.excludes_zero
    assert difference.excludes_zero_corrected
    assert equal.difference[MEAN] == Difference(0, 0, 0, 0, 0)
    assert not equal.difference[MEAN].excludes_zero


def test_scopes_are_compared_with_that_of_the_conversation_by_pooling():
    planted = planted_tables({"conversation": 0.5, "speaker": 0.6, "both": 0.5})
    tables = {Cell("mean", "ema", cell.seed, None, cell.pooling): table for cell, table in planted.items()}
    conversation, better, equal = compare_poolings(tables, LABELS)
    assert (conversation.difference, conversation.scope_difference, better.difference) == (None, None, None)
    assert (
        better.scope_difference
        == compare_poolings(
            {
                Cell({"conversation": "mean"}.get(cell.pooling, cell.pooling), "none", cell.seed): table
                for cell, table in planted.items()
            },
            LABELS,
        )[1].difference
    )
    assert not equal.scope_difference[MEAN].excludes_zero
    first, *_ = verdict([conversation, better, equal], measured())
    assert first.startswith(
        "With pooling `mean` and context `ema`, `speaker` is better than the scope `conversation` by"
    )
    assert "Not distinguishable from the scope `conversation`: `both`" in first
    page = comparison_page(
        [conversation, better, equal], {"mean": Cost(0, 1, 0.1), ENCODER: Cost(1, 1, 1.0)}, measured(), 2.0, "x"
    )
    assert "## context `ema` of the scope `speaker`" in page
    assert page.startswith("# Scopes compared")
    assert "| mean CCC | minus scope `conversation` |" in page  # no pooling is compared


def test_means_and_spreads_are_those_of_single_trainings():
    folds = ("split_1", "split_10")
    tables = planted_tables({"mean": 0.5, "attention": 0.6}, seeds=3, folds=folds)
    single = np.array(
        [
            [cell_ccc(tables[Cell("attention", "none", seed, fold)], LABELS)["valence"] for fold in folds]
            for seed in range(3)
        ]
    )
    result = compare_poolings(tables, LABELS)[1]
    assert result.ccc["valence"] == pytest.approx(single.mean())
    assert result.by_seed["valence"] == pytest.approx(single.mean(axis=1).tolist())
    assert result.std_over_seeds["valence"] == pytest.approx(single.mean(axis=1).std(ddof=1))
    assert result.std_over_folds["valence"] == pytest.approx(single.mean(axis=0).std(ddof=1))


def test_missing_references_are_left_out():
    tables = planted_tables({"mean": 0.5, "attention": 0.6}, seeds=1)
    for table in tables.values():
        table.loc[table["label"].eq("valence") & table["turn"].eq(0), "reference"] = np.nan
    table = tables[Cell("attention", "none", 0)]
    rows = table[table["label"].eq("valence") & table["turn"].gt(0)]
    result = compare_poolings(tables, LABELS)[1]
    assert result.ccc["valence"] == pytest.approx(concordance_cc(rows["prediction"], rows["reference"]))
    assert result.difference["valence"].excludes_zero


def test_a_comparison_without_mean_pooling_a_cell_or_the_same_turns_is_refused():
    tables = planted_tables({"mean": 0.5, "attention": 0.6}, folds=("a", "bb"))
    with pytest.raises(ValueError, match="compared with 'mean'"):
        compare_poolings({cell: table for cell, table in tables.items() if cell.pooling != "mean"}, LABELS)
    lacking = {cell: table for cell, table in tables.items() if cell.name != "attention-none-seed1-bb"}
    with pytest.raises(ValueError, match="lacks attention-none-seed1-bb"):
        compare_poolings(lacking, LABELS)
    other = {
        cell: table.assign(reference=1 - table["reference"]) if cell.pooling == "attention" else table
        for cell, table in tables.items()
    }
    with pytest.raises(ValueError, match="different turns"):
        compare_poolings(other, LABELS)


def runs_of_noise(runs, spread, seed=0):
    """Predictions (runs, turns) that follow the truth, each run off by a gain of its own."""
    random = np.random.default_rng(seed)
    truth = random.uniform(size=120)
    gains = 1 + random.normal(0, spread, size=(runs, 1))
    return (0.5 + gains * (truth - 0.5) + random.normal(0, 0.1, truth.size))[..., None], truth[:, None]


def test_one_run_or_equal_runs_give_the_interval_of_one():
    a, truth = runs_of_noise(1, 0.0)
    b = 0.5 + 0.8 * (a - 0.5)
    ids = np.repeat(np.arange(20), 6)
    plain = paired_bootstrap_difference(a[0], b[0], truth, ids)
    np.testing.assert_array_equal(paired_bootstrap_difference(a, b, truth, ids), plain)
    np.testing.assert_allclose(
        paired_bootstrap_difference(np.repeat(a, 4, 0), np.repeat(b, 4, 0), truth, ids), plain, rtol=1e-12
    )


def test_the_interval_covers_chance_between_runs_around_their_mean():
    a, truth = runs_of_noise(5, 0.4)
    b = np.repeat(a.mean(axis=0)[None], 5, axis=0)
    differences = [concordance_cc(run, truth) - concordance_cc(b[0], truth) for run in a]
    low, high = paired_bootstrap_difference(a, b, truth, np.repeat(np.arange(20), 6))
    # 95 % of a normal distribution lie within 1.96 standard errors; conversations add to that.
    standard_error = np.std(differences) / np.sqrt(5)
    assert high[0] - low[0] > 0.9 * 2 * 1.96 * standard_error
    assert abs((high[0] + low[0]) / 2 - np.mean(differences)) < standard_error


def test_folds_are_compared_within_themselves():
    # Predictions are off by a constant in the second fold, for both; within a fold they are equal.
    a, truth = runs_of_noise(1, 0.0)
    folds = np.repeat(["one", "two"], 60)
    b = a + 0.3 * (folds == "two")[:, None]
    ids = np.repeat(np.arange(20), 6)
    low, high = paired_bootstrap_difference(a, b, truth, ids, folds=folds)
    by_fold = [
        concordance_cc(a[0][folds == fold, 0], truth[folds == fold, 0])
        - concordance_cc(b[0][folds == fold, 0], truth[folds == fold, 0])
        for fold in ("one", "two")
    ]
    assert by_fold[0] == 0
    assert low[0] < np.mean(by_fold) < high[0]
    assert high[0] - low[0] < 0.2
    with pytest.raises(ValueError, match="same shape"):
        paired_bootstrap_difference(a, b[:, :-1], truth, ids)


# words


def result(pooling, value, context="none", half=0.05, corrected=0.08):
    difference = Difference(value, value - half, value + half, value - corrected, value + corrected)
    names = dict.fromkeys((*LABELS, MEAN), 0.5 + value)
    seeds = {name: [0.5, 0.5 + 2 * value] for name in names}
    own = None if pooling == "mean" else dict.fromkeys((*LABELS, MEAN), difference)
    return PoolingResult(pooling, context, names, dict.fromkeys(names, 0.01), None, seeds, own)


def measured(**changes):
    plain = {"split": "test", "chose_the_epoch": False, "turns": 900, "conversations": 90, "speakers": 40}
    return Measured(**{**plain, "seeds": 5, "folds": 1, **changes})


def test_the_verdict_names_which_differences_exclude_zero_and_which_still_do_when_corrected():
    results = [
        result("mean", 0),
        result("attention", 0.1),
        result("statistics", -0.06),
        result("attentive_statistics", 0),
    ]
    first, correction, caveat = verdict(results, measured())
    assert "`attention` is better than mean pooling by 0.100 (+0.050 to +0.150)" in first
    assert "`statistics` is worse than mean pooling by 0.060 (-0.110 to -0.010)" in first
    assert "Not distinguishable from mean pooling: `attentive_statistics` (-0.050 to +0.050)." in first
    assert "3 comparisons, of which 0.15 would exclude zero by chance" in correction
    assert "1 of 3 still does" in correction
    assert (
        "900 turns in 90 conversations of 40 speakers, with 5 seeds each. Intervals draw conversations and seeds"
        in caveat
    )


def test_the_verdict_says_so_when_nothing_can_be_told():
    sentences = verdict([result("mean", 0), result("attention", 0.01)], measured())
    assert sentences[0].startswith("With context `none`, no difference to mean pooling excludes zero.")
    assert "not shown to be equal" in sentences[1]
    assert len(sentences) == 2  # a single comparison needs no correction


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 1}, "with one seed, chance in training is not in them"),
        ({"conversations": 8}, "With only 8 conversations, the intervals are too narrow"),
        ({"speakers": 4}, "What holds for 4 speakers need not hold for others"),
        ({"speakers": None}, "speakers the corpus does not name"),
        ({"split": "validation", "chose_the_epoch": True}, "also chose each training's best epoch"),
        ({"folds": 5}, "5 seeds and 5 folds each"),
    ],
)
def test_the_verdict_says_what_limits_it(changes, words):
    assert words in " ".join(verdict([result("mean", 0), result("attention", 0.01)], measured(**changes)))


# costs


@pytest.mark.parametrize("pooling", POOLINGS)
def test_operations_are_those_that_torch_counts_and_the_elementwise_ones_that_it_does_not(pooling):
    frames, hidden = 50, 32
    encoder = tiny_model(speech_encoder_pooling=pooling).speech_encoder
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.pool(torch.randn(1, 1, frames, hidden), torch.ones(1, frames, dtype=torch.bool))
    elementwise = 5 * frames * (4 if pooling == "multihead_attention" else 1)
    elementwise += 2 * frames * hidden if pooling == "multihead_attention" else 0  # its scores are no matrix product
    elementwise += 2 * frames * hidden if POOLINGS[pooling].sizes == 2 else 0  # difference and square
    assert POOLINGS[pooling].flops(frames, hidden, num_heads=4) == counter.get_total_flops() + elementwise


def test_costs_name_the_parameters_of_each_pooling():
    costs = pooling_costs(tiny_config(speech_encoder_layers=[0, 2]), POOLINGS, seconds=1.0, repeats=2)
    assert {name: cost.parameters for name, cost in costs.items()} == {
        "mean": 0,
        "attention": 33,
        "multihead_attention": 36,
        "statistics": 0,
        "attentive_statistics": 33,
    }
    assert all(cost.milliseconds > 0 and cost.flops > 0 for cost in costs.values())


@pytest.mark.parametrize("frozen", [True, False])
def test_operations_of_the_encoder_are_those_of_wavlm_whether_it_is_trained_or_not(frozen):
    model = tiny_model(freeze_speech_encoder=frozen).train()
    cost = encoder_cost(model, seconds=1.0, repeats=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.speech_encoder.backbone.eval()(torch.randn(1, 16_000))
    assert cost.flops == counter.get_total_flops()
    assert cost.milliseconds > 0
    assert model.speech_encoder.training


# best weights


def test_the_weights_of_the_best_evaluation_come_back():
    model, best = torch.nn.Linear(1, 1), KeepBestWeights()
    for weight, ccc in [(1.0, 0.1), (2.0, 0.5), (3.0, float("nan")), (4.0, 0.4)]:
        model.weight.data.fill_(weight)
        best.on_evaluate(None, TrainerState(), TrainerControl(), model=model, metrics={"eval_ccc": ccc})
    best.restore(model)
    assert model.weight.item() == 2.0


def test_without_a_ccc_that_is_a_number_there_are_no_best_weights():
    model, best = torch.nn.Linear(1, 1), KeepBestWeights()
    best.on_evaluate(None, TrainerState(), TrainerControl(), model=model, metrics={"eval_ccc": float("nan")})
    with pytest.raises(ValueError, match="no evaluation gave a CCC"):
        best.restore(model)


# program


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A corpus with two folds beside its split, an encoder, and a run configuration of one epoch."""
    folder = tmp_path_factory.mktemp("compare")
    corpus = write_corpus(folder / "corpus")
    lines = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    swapped = {"train": "train", "validation": "test", "test": "validation"}
    rows = [{**row, "split_fold1": row["split"], "split_fold2": swapped[row["split"]]} for row in lines]
    (corpus / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny_model(seed=3).save_pretrained(folder / "encoder")
    run = yaml.safe_load(write_run(folder / "run.yaml", corpus, folder / "unused").read_text())
    run["model"]["params"].pop("speech_encoder_config")
    run["model"]["params"].update(freeze_speech_encoder=True, speech_encoder_layers=[1, 2])
    run["model"]["pretrained_speech_encoder"] = str(folder / "encoder")
    run["data"]["cache_folder"] = str(folder / "cache")
    steps = [name for name in run["training"] if name.endswith(("_steps", "_strategy"))]
    run["training"] = {name: value for name, value in run["training"].items() if name not in steps}
    run["training"].update(num_train_epochs=2, learning_rate=2e-2, output_dir=str(folder / "run"))
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def options(prepared, output, *more, overrides=()):
    chosen = ("--poolings", "mean", "attention")
    return [
        "compare",
        str(prepared / "run.yaml"),
        *overrides,
        *chosen,
        *more,
        *(("--output", str(output)) if output else ()),
    ]


@pytest.fixture(scope="module")
def compared(prepared):
    assert call_command(*options(prepared, None, "--seeds", "2", "--contexts", "none", "mamba_ema")) == 0
    return prepared / "run" / "comparison"  # in the output folder of the configuration


def test_a_comparison_leaves_tables_words_and_pictures(compared):
    page = (compared / "comparison.md").read_text()
    content = json.loads((compared / "comparison.json").read_text())
    trainings = pd.read_csv(compared / "comparison.csv")
    assert len(trainings) == 2 * 2 * 2
    assert "## context `mamba_ema`" in page
    assert all(f"- {sentence}" in page for sentence in content["verdict"])
    assert "4 conversations of speakers the corpus does not name, with 2 seeds each" in page
    mean = trainings.query("pooling == 'attention' and context == 'none'")[MEAN].mean()
    assert content["results"][1]["ccc"][MEAN] == pytest.approx(mean)
    for suffix in (".png", ".svg"):
        assert (compared / f"comparison{suffix}").stat().st_size > 5_000


def test_a_training_of_the_comparison_is_that_of_the_training_program(prepared, compared, tmp_path):
    overrides = ["data.cache_frames=true", f"training.output_dir={tmp_path}", "training.seed=1"]
    overrides += ["model.params.context=none", "model.params.speech_encoder_pooling=attention"]
    assert call_program("examples/run_finetune.py", str(prepared / "run.yaml"), *overrides) == 0
    expected = pd.read_csv(tmp_path / "predictions_test.csv")
    found = pd.read_parquet(compared / "trainings" / "attention-none-seed1" / "test.parquet")
    np.testing.assert_allclose(found["prediction"], expected["prediction"], atol=1e-6)
    assert found["prediction"].std() > 1e-3


def test_without_a_validation_split_all_that_is_named_is_learnt_from_until_the_last_epoch(prepared, tmp_path):
    overrides = ["data.train_split=train+validation", "data.validation_split=null", "training.eval_strategy=no"]
    overrides += ["data.cache_frames=true"]
    compare = options(prepared, tmp_path / "compared", "--seeds", "1", "--contexts", "none", overrides=overrides)
    assert call_command(*compare) == 0
    overrides += [f"training.output_dir={tmp_path / 'run'}", "model.params.context=none"]
    assert call_program("examples/run_finetune.py", str(prepared / "run.yaml"), *overrides) == 0
    expected = pd.read_csv(tmp_path / "run" / "predictions_test.csv")
    found = pd.read_parquet(tmp_path / "compared" / "trainings" / "attention-none-seed0" / "test.parquet")
    np.testing.assert_allclose(found["prediction"], expected["prediction"], atol=1e-6)
    manifest = json.loads((tmp_path / "run" / "run_manifest.json").read_text())
    assert {name: part["turns"] for name, part in manifest["data"].items()} == {"train+validation": 34, "test": 10}
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())) == ["test"]
    model = MambaEMAForRegression.from_pretrained(tmp_path / "run" / "model")
    assert model.config.interval_radii is None


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(prepared, compared, tmp_path):
    more = ("--seeds", "2", "--contexts", "none", "mamba_ema")
    process = Forked("-m", "modeling_mamba_ema", *options(prepared, tmp_path, *more))
    wait_until(lambda: list(tmp_path.glob("trainings/*/finished.json")), process)
    process.kill()
    process.wait()
    done = list(tmp_path.glob("trainings/*/finished.json"))
    assert 0 < len(done) < 8
    times = {path: path.stat().st_mtime_ns for path in done}
    assert call_command(*options(prepared, tmp_path, *more)) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == times
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "comparison.csv"), pd.read_csv(compared / "comparison.csv"))


def test_folds_come_from_columns_that_hold_the_split(prepared, tmp_path, capsys):
    more = ("--seeds", "1", "--contexts", "none", "--folds", "split_fold1", "split_fold2")
    assert call_command(*options(prepared, tmp_path, *more)) == 0
    trainings = pd.read_csv(tmp_path / "comparison.csv")
    assert sorted(trainings["fold"]) == ["split_fold1"] * 2 + ["split_fold2"] * 2
    page = (tmp_path / "comparison.md").read_text()
    assert "9 conversations of speakers the corpus does not name, with 1 seed and 2 folds each" in page


def test_scopes_are_trained_with_the_speakers_of_the_corpus(prepared, tmp_path, capsys):
    more = ("--seeds", "1", "--poolings", "mean", "--scopes", "conversation", "speaker")
    assert call_command(*options(prepared, tmp_path / "none", *more)) == 1
    assert "has no column 'speaker'" in capsys.readouterr().err
    rows = [json.loads(line) for line in (prepared / "corpus" / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row.update(file_name=str(prepared / "corpus" / row["file_name"]), speaker="ab"[row["turn"] % 2])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert call_command(*options(prepared, tmp_path, *more, overrides=[f"data.source={tmp_path}"])) == 0
    tables = [
        pd.read_parquet(tmp_path / "trainings" / f"mean-mamba_ema{scope}-seed0" / "test.parquet")
        for scope in ("", "-speaker")
    ]
    later = tables[0]["turn"].ge(1).to_numpy()
    differences = (tables[0]["prediction"] - tables[1]["prediction"]).abs().to_numpy()
    assert differences[later].max() > 1e-3
    assert "minus scope `conversation`" in (tmp_path / "comparison.md").read_text()


def test_other_settings_or_another_corpus_in_the_same_folder_are_refused(prepared, compared, capsys):
    more = ("--seeds", "2", "--contexts", "none", "mamba_ema")
    assert call_command(*options(prepared, compared, *more, overrides=["training.num_train_epochs=1"])) == 1
    assert "other settings: training.num_train_epochs: 2 -> 1" in capsys.readouterr().err
    metadata = prepared / "corpus" / "metadata.jsonl"
    before = metadata.read_text()
    try:
        metadata.write_text(before.replace('"arousal": 0.', '"arousal": 0.0'))
        assert call_command(*options(prepared, compared, *more)) == 1
    finally:
        metadata.write_text(before)
    assert "was trained on another corpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "poolings", "message"),
    [
        (["model.params.freeze_speech_encoder=true"], ["mean", "attention"], "random weights"),
        (["data.test_split=null"], ["mean", "attention"], "test_split is null"),
        ([], ["attention", "statistics"], "compared with mean"),
        ([], ["mean", "mean"], "another one"),
        ([], ["attention"], "compared with mean"),
        (["model.pretrained_model=x", "model.params={}"], ["mean", "attention"], "needs a new head"),
        ([], ["mean", "atention"], "--poolings names atention; allowed are mean, attention"),
        ([], ["mean", "training.seed=1"], "settings stand directly behind the configuration"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_training(tmp_path, overrides, poolings, message):
    run = load_run_configuration(write_run(tmp_path / "run.yaml", tmp_path, tmp_path), overrides)
    with pytest.raises(ValueError, match=message):
        check_comparable(run, poolings, ["none"], "test")


def test_the_page_gives_costs_in_relation_to_the_encoder():
    costs = {"mean": Cost(0, 1_000_000, 0.1), "attention": Cost(1_025, 2_000_000, 0.2)}
    costs[ENCODER] = Cost(300_000_000, 1_000_000_000, 10.0)
    results = [result("mean", 0), result("attention", 0.1)]
    page = comparison_page(results, costs, measured(), 2.0, "the command")
    assert "| `attention` | 1,025 | 2.00 | 0.1000% | 0.200 | 1.00% |" in page
    assert "**+0.100 (+0.050 to +0.150)**" in page
