"""What the fine-tuning program is given and saves: configurations, windows, batches, optimizer groups, the model."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel

from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.training import (
    ConversationCollator,
    MambaEMATrainingArguments,
    load_run_configuration,
)
from modeling_mamba_ema.training.optimizer import parameter_groups
from modeling_mamba_ema.training.run_configuration import _checked_values, _known_names
from tests.support.models import tiny_model
from tests.support.tiny_corpus import LABELS, call_program, write_run

REPOSITORY = Path(__file__).parents[2]


def test_the_model_is_saved_before_the_test_split_is_touched_and_may_have_other_labels(corpus, tmp_path, monkeypatch):
    lines = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    rows = [{**line, "file_name": str(corpus / line["file_name"]), "dominance": line["valence"]} for line in lines]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = write_run(tmp_path / "run.yaml", tmp_path, tmp_path / "run")
    read = ConversationDataset.__getitem__

    def fail_on_the_test_split(self, index):
        if str(self.rows[0]["file_name"]).startswith(str(corpus / "test")):
            raise OSError("the disk with the test split is gone")
        return read(self, index)

    monkeypatch.setattr(ConversationDataset, "__getitem__", fail_on_the_test_split)
    options = ["training.num_train_epochs=1", "model.params.id2label={0: dominance, 1: arousal}"]
    assert call_program("examples/run_finetune.py", str(run), *options) == 1
    assert not (tmp_path / "run" / "results.json").exists()
    assert AutoModel.from_pretrained(tmp_path / "run" / "model").config.labels == ["dominance", "arousal"]


def test_every_trainable_parameter_is_in_exactly_one_optimizer_group():
    model = tiny_model(speech_encoder_layers=[0, 1], ema_decay_learnable=True)
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=1e-3, encoder_learning_rate=1e-5)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates[id(model.speech_encoder.attention.weight)] == (1e-3, 0.1)
    assert rates[id(model.speech_encoder.backbone.encoder.layers[0].feed_forward.output_dense.weight)] == (1e-5, 0.1)
    mixer = model.mamba_ema.conversation_encoder.layers[0].mixer
    assert all(rates[id(p)] == (1e-3, 0.0) for p in (mixer.A_log, mixer.D, mixer.dt_bias))


def test_a_frozen_encoder_is_in_no_optimizer_group_and_a_model_without_anything_to_train_is_refused():
    model = tiny_model(freeze_speech_encoder=True)
    options = {"weight_decay": 0.0, "learning_rate": 1e-3, "encoder_learning_rate": 1e-3}
    grouped = {id(p) for group in parameter_groups(model, **options) for p in group["params"]}
    assert not grouped & {id(p) for p in model.speech_encoder.backbone.parameters()}
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), **options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1e-5", "unknown key training.learning_rat; did you mean training.learning_rate?"),
        ("dta.source=x", "unknown key dta; did you mean data?"),
        ("model.params.speech_encoder_poling=mean", "did you mean model.params.speech_encoder_pooling?"),
        ("model.params.speech_encoder_config.hiden_dropout=0", "model.params.speech_encoder_config.hidden_dropout?"),
        ("training.epochs=3", "unknown key training.epochs; did you mean training.num_train_epochs?"),
        ("training.num_train_epochs=many", "training.num_train_epochs is 'many', but must be float"),
        ("training.num_train_epochs=true", "training.num_train_epochs is True, but must be float"),
        ("training.bf16=3", "training.bf16 is 3, but must be bool"),
        ("training.early_stopping_patience=1.5", "training.early_stopping_patience is 1.5, but must be int or null"),
        ("training.report_to={a: b}", "training.report_to is {'a': 'b'}, but must be null or str or list"),
        ("training.lr_scheduler_type=cosin", "lr_scheduler_type is 'cosin', but must be linear or cosine or"),
        ("training.optim=adamwtorch", "did you mean adamw_torch?"),
        ("training.lr_scheduler_type=cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"),
        ("training.report_to=tensorbord", "training: report_to names tensorbord; the trackers installed here are"),
        ("training.eval_steps=50", "training.eval_steps needs training.eval_strategy=steps"),
        ("training.mixup_alpha=-1", "mixup_alpha is -1, but must be at least 0"),
        ("training.neftune_noise_alpha=5", "neftune_noise_alpha is for models of classes or of tokens; leave it out"),
        ("training.output_dir=null", "training.output_dir is None, but must be str"),
        ("model.params.hidden_size=1.5", "model.params.hidden_size is 1.5, but must be int"),
        ("model.params.speech_encoder_config.layerdrop=x", "speech_encoder_config.layerdrop is 'x', but must be float"),
        ("data.validation_split=null", "a validation split chooses the best weights"),
        ("data.noise_snr_db=[low, high]", "data.noise_snr_db is ['low', 'high'], but must be list[float] or null"),
        ("data.columns={valence: 3}", "data.columns is {'valence': 3}, but must be dict[str, str]"),
        ("data.noise_snr_db=[5, 30]", "data.cache_frames trains from frames; leave out one"),
        ("model=5", "model must be a section, got 5"),
        ("learning_rate", "'learning_rate' is no override"),
        ("training.seed=*a", "is no plain YAML"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_with_name_value_and_what_is_allowed(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_run_configuration(REPOSITORY / "configuration" / "finetune.yaml", [override])


def test_every_argument_of_transformers_is_taken_and_the_two_lines_for_another_label():
    overrides = ["training.optim=adafactor", "training.fp16=true", "training.torch_compile=false"]
    overrides += ["training.eval_strategy=steps", "training.eval_steps=20", "training.save_strategy=steps"]
    overrides += ["training.save_steps=40", "training.lr_scheduler_type=cosine_with_min_lr"]
    overrides += ["training.lr_scheduler_kwargs={min_lr: 1e-6}", "training.load_best_model_at_end=false"]
    overrides += ["model.params.id2label={0: valence, 1: arousal, 2: dominance}"]
    overrides += ["model.params.label_ranges={valence: [1, 5], arousal: [1, 5], dominance: [1, 5]}"]
    run = load_run_configuration(REPOSITORY / "configuration" / "finetune.yaml", overrides)
    arguments = run.training_arguments()
    assert (arguments.optim, arguments.fp16, arguments.eval_steps) == ("adafactor", True, 20)
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert MambaEMAConfig(**run.model.params).labels == ["valence", "arousal", "dominance"]


@pytest.mark.parametrize("value", [object(), 3, 3.5, "x", True, None, [1], {"a": 1}])
def test_a_value_of_any_type_is_taken_or_refused_in_a_sentence_for_every_argument(tmp_path, value):
    for argument in dataclasses.fields(MambaEMATrainingArguments):
        if argument.init and argument.name not in ("output_dir",):
            try:
                _checked_values({argument.name: value}, _known_names(MambaEMATrainingArguments), "training.")
            except ValueError as error:
                assert str(error).startswith(f"training.{argument.name} is ")  # noqa: PT017


def test_lower_is_better_for_errors_and_higher_for_correlations():
    better = {
        name: MambaEMATrainingArguments(metric_for_best_model=name).greater_is_better
        for name in ("ccc", "pearson_arousal", "eval_ccc", "rmse", "mae_valence", "eval_rmse", "loss")
    }
    assert [name for name, higher in better.items() if higher] == ["ccc", "pearson_arousal", "eval_ccc"]


def test_overrides_reach_every_section():
    run = load_run_configuration(
        REPOSITORY / "configuration" / "finetune.yaml",
        ["training.learning_rate=1e-5", "model.params.context=ema", "data.test_split=null"],
    )
    assert run.training_arguments().learning_rate == 1e-5
    assert run.model.params["context"] == "ema"
    assert run.data.test_split is None


def test_yaml_that_builds_objects_is_refused(tmp_path):
    (tmp_path / "evil.yaml").write_text("model: !!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="no plain YAML"):
        load_run_configuration(tmp_path / "evil.yaml")


@pytest.mark.parametrize("name", ["demo", "finetune", "finetune_full"])
def test_the_configurations_in_the_repository_are_valid(name):
    run = load_run_configuration(REPOSITORY / "configuration" / f"{name}.yaml")
    assert run.model.params["speech_encoder_pooling"] == "attention"


def test_windows_cut_conversations_in_order_and_lose_no_turn(corpus):
    rows = load_emotion_dataset(corpus, LABELS)["train"]
    windows = ConversationDataset(rows, LABELS, turns_per_item=3)
    assert [index for item in windows.items for index in item] == list(range(len(rows)))
    assert max(len(item) for item in windows.items) == 3
    for item in windows.items:
        assert len({rows[index]["conversation_id"] for index in item}) == 1


def test_a_batch_is_padded_with_missing_labels(corpus):
    conversations = ConversationDataset(load_emotion_dataset(corpus, LABELS)["train"], LABELS)
    lengths = [len(item) for item in conversations.items]
    pair = [conversations[lengths.index(min(lengths))], conversations[lengths.index(max(lengths))]]
    batch = ConversationCollator(MambaEMAFeatureExtractor())(pair)
    assert batch["turn_mask"].sum(1).tolist() == [min(lengths), max(lengths)]
    assert (batch["labels"][0, min(lengths) :] == -100).all()
    torch.testing.assert_close(batch["labels"][1], torch.from_numpy(pair[1]["labels"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{k: v for k, v in row.items() if k != "arousal"} for row in rows], "no column 'arousal'"),
        (lambda rows: [{("Valence" if k == "valence" else k): v for k, v in row.items()} for row in rows], "'Valence'"),
        (lambda rows: [{**row, "turn": 0} for row in rows], "turn 0 of conversation 'a' twice"),
        (
            lambda rows: [{**row, "valence": 4.0} for row in rows],
            r"valence of turn 0 .* is 4, outside its scale \[0, 1\]",
        ),
    ],
)
def test_a_corpus_that_is_not_in_the_normal_form_is_refused(tmp_path, change, message):
    rows = [
        {"file_name": f"{turn}.wav", "conversation_id": "a", "turn": turn, "valence": 0.5, "arousal": 0.5}
        for turn in range(2)
    ]
    Dataset.from_list(change(rows)).to_json(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match=message):
        load_emotion_dataset(tmp_path, LABELS)


def test_labels_are_brought_to_the_unit_scale_and_missing_ones_marked(tmp_path):
    rows = [
        {"file_name": "a.wav", "conversation_id": "a", "turn": 0, "valence": 1.0, "arousal": None},
        {"file_name": "b.wav", "conversation_id": "a", "turn": 1, "valence": 4.0, "arousal": 7.05},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    loaded = load_emotion_dataset(tmp_path, LABELS, {"valence": (1, 7), "arousal": (1, 7)})["train"]
    assert list(loaded["valence"]) == [0.0, 0.5]
    assert list(loaded["arousal"]) == [-100.0, 1.0]
