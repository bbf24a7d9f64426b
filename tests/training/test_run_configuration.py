"""Configurations of runs: what is taken, what is refused and how, what is saved."""

import dataclasses
import re

import pytest
import torch

from modeling_mamba_ema import MambaEMAConfig, MambaEMAForRegression
from modeling_mamba_ema.training import MambaEMATrainingArguments, differences, load_run_configuration
from modeling_mamba_ema.training.run_configuration import _checked_values, _known_names
from tests.support.programs import ROOT


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run_configuration(path, overrides)


def test_two_starting_points_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"leave out model.pretrained_speech_encoder"):
        load(tmp_path, "model: {pretrained_model: a, pretrained_speech_encoder: b}")


def test_random_convolutions_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match=r"freeze_feature_encoder .* name model.pretrained_speech_encoder"):
        load(tmp_path, "model: {freeze_feature_encoder: true}")


def test_what_is_saved_loads_as_the_same_run(tmp_path):
    run = load(tmp_path, "model: {params: {context: ema}}", "training.learning_rate=1e-5", "data.source=a")
    run.save(tmp_path / "saved.yaml")
    loaded = load_run_configuration(tmp_path / "saved.yaml")
    assert loaded.to_dict() == run.to_dict()
    assert loaded.training_arguments() == run.training_arguments()


def test_a_run_differs_from_a_saved_one_only_in_what_changes_its_weights(tmp_path):
    load(tmp_path, "{}").save(tmp_path / "saved.yaml")
    same = load(tmp_path, "{}", "training.resume_from_checkpoint=null", "training.report_to=tensorboard")
    assert differences(tmp_path / "saved.yaml", same) == []
    other = load(tmp_path, "{}", "training.seed=5")
    assert differences(tmp_path / "saved.yaml", other) == ["training.seed: default -> 5"]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.promise("E-08", "hostile YAML is refused: objects, aliases, depth, size, unknown keys", "every case")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: !!python/object/apply:os.system ['touch witness']", "no plain YAML"),
        ("model: !!python/object/new:subprocess.Popen [['id']]", "no plain YAML"),
        ("model: !!python/name:os.system", "no plain YAML"),
        ("model: !!python/module:os", "no plain YAML"),
        (BOMB + "model: *i", "aliases are not allowed, found one in line 2"),
        ("model: &m {params: *m}", "aliases are not allowed"),
        ("[" * 100_000, "no plain YAML"),
        ("model: " + "x" * 1_000_001, "larger than 1000000 bytes"),
        ("model: " + "x" * 100_000, "model must be a section"),
        ("modle: {}", "unknown key modle; did you mean model?"),
        ("training: {learning_rat: 1}", "did you mean training.learning_rate?"),
        ("training: {seed: [1, 2]}", "training.seed is"),
        ("\x00", "no plain YAML"),
        ("training: {seed: 1}\ndata: {}\ntraining: {seed: 2}", "'training' is given twice, the second time in line 3"),
    ],
    ids=range(14),
)
def test_hostile_yaml_is_refused_in_a_short_sentence(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        load_run_configuration("run.yaml")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


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
        ("training.mixup_alpha=.inf", "mixup_alpha is inf, but must be a finite number"),
        ("training.weight_decay=.nan", "weight_decay is nan, but must be a finite number"),
        ("training.encoder_learning_rate=-1", "encoder_learning_rate is -1, but must be at least 0"),
        ("training.num_train_epochs=0", "num_train_epochs is 0, but must be above 0"),
        ("training.per_device_train_batch_size=0", "per_device_train_batch_size is 0, but must be at least 1"),
        ("training.save_total_limit=0", "save_total_limit is 0, but must be at least 1"),
        ("training.data_seed=-1", "data_seed is -1, but must be at least 0"),
        ("training.eval_delay=5", "eval_delay is 5, so that none of 5 epochs is evaluated"),
        ("training.ddp_timeout=-1", "ddp_timeout is -1, but must be at least 1"),
        ("training.max_steps=0", "max_steps is 0; allowed are whole numbers from 1"),
        ("training.do_train=false", "do_train is false, which nothing reads"),
        ("training.train_sampling_strategy=group_by_length", "allowed are random, and without max_seconds_per_batch"),
        ("training.train_sampling_strategy=sequential", "train_sampling_strategy is sequential; allowed are random"),
        ("training.optim_args=momentum", "optim_args is 'momentum', but must be name=value"),
        ("training.optim_args=foo=3", "optim adamw_torch_fused, optim_args 'foo=3': foo would be ignored; of this"),
        (
            "training.optim_args=eps=1e-6",
            "nothing can be set here. weight_decay, adam_beta1, adam_beta2 and adam_epsilon",
        ),
        ("training.optim=lomo", "optim lomo groups parameters itself"),
        ("training.optim_target_modules=all-linear", "optim adamw_torch_fused does not read optim_target_modules"),
        ("training.fsdp_config={version: 2}", "fsdp_config is {'version': 2}, but without fsdp nothing reads it"),
        ("training.gradient_checkpointing_kwargs={a: 1}", "checkpointing_kwargs is {'a': 1}, but without"),
        ("training.accelerator_config={foo: 3}", "unexpected keyword argument 'foo'"),
        ("training.remove_unused_columns=true", "remove_unused_columns would take away what training and evaluation"),
        ("training.batch_eval_metrics=true", "batch_eval_metrics would take away what training and evaluation need"),
        ("training.label_names=[a]", "label_names would take away what training and evaluation need"),
        ("training.lr_scheduler_kwargs={num_cycles: x}", "lr_scheduler_kwargs {'num_cycles': 'x'}: could not convert"),
        ("training.eval_accumulation_steps=0", "eval_accumulation_steps is 0, but must be at least 1"),
        ("model.params.id2label={0: valence, 0: arousal}", "0 is given twice, the second time in line 1"),
        ("data.train_split=train+train", "data.train_split is 'train+train'; allowed are a split, or several such as"),
        ("data.test_split=test+", "data.test_split is 'test+'; allowed are a split"),
        ("training.neftune_noise_alpha=5", "neftune_noise_alpha is for models of classes or of tokens; leave it out"),
        ("training.output_dir=null", "training.output_dir is None, but must be str"),
        ("model.params.hidden_size=1.5", "model.params.hidden_size is 1.5, but must be int"),
        ("model.params.speech_encoder_config.layerdrop=x", "speech_encoder_config.layerdrop is 'x', but must be float"),
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
        load_run_configuration(ROOT / "configuration" / "finetune.yaml", [override])


@pytest.mark.parametrize(
    ("optim", "given", "message"),
    [
        (
            "sgd",
            "momentum=0.9,foo=3",
            "foo would be ignored; of this optimizer's arguments, momentum, dampening, nesterov",
        ),
        ("sgd", "weight_decay=0.1", "weight_decay would be ignored"),
        ("sgd", "momentum=x", "could not convert string to float: 'x'"),
        ("sgd", "nesterov=true", "Nesterov momentum requires a momentum"),
        ("rmsprop", "momentum=0.9,alpha=0.9,eps=1e-6,centered=true", None),
        ("adagrad", "lr_decay=0.1, eps=1e-6", None),
        ("adafactor", "beta1=0.9", "beta1 would be ignored"),
    ],
)
def test_an_option_of_an_optimizer_is_read_or_refused(tmp_path, optim, given, message):
    overrides = [f"training.optim={optim}", f"training.optim_args={given}"]
    if message is None:
        assert load(tmp_path, "{}", *overrides).training_arguments().optim_args == given
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, "{}", *overrides)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_options_of_a_schedule_that_has_none_are_refused(tmp_path, schedule):
    overrides = [f"training.lr_scheduler_type={schedule}", "training.lr_scheduler_kwargs={num_cycles: 2}"]
    with pytest.raises(ValueError, match=f"lr_scheduler_type {schedule} takes no lr_scheduler_kwargs"):
        load(tmp_path, "{}", *overrides)


def test_every_argument_of_transformers_is_taken_and_the_two_lines_for_another_label():
    overrides = ["training.optim=adafactor", "training.fp16=true", "training.torch_compile=false"]
    overrides += ["training.eval_strategy=steps", "training.eval_steps=20", "training.save_strategy=steps"]
    overrides += ["training.save_steps=40", "training.lr_scheduler_type=cosine_with_min_lr"]
    overrides += ["training.lr_scheduler_kwargs={min_lr: 1e-6}", "training.load_best_model_at_end=false"]
    overrides += ["model.params.id2label={0: valence, 1: arousal, 2: dominance}"]
    overrides += ["model.params.label_ranges={valence: [1, 5], arousal: [1, 5], dominance: [1, 5]}"]
    run = load_run_configuration(ROOT / "configuration" / "finetune.yaml", overrides)
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
        ROOT / "configuration" / "finetune.yaml",
        ["training.learning_rate=1e-5", "model.params.context=ema", "data.test_split=null"],
    )
    assert run.training_arguments().learning_rate == 1e-5
    assert run.model.params["context"] == "ema"
    assert run.data.test_split is None


@pytest.mark.parametrize("name", ["demo", "finetune", "finetune_full", "finetune_lora"])
def test_the_configurations_in_the_repository_are_valid(name):
    run = load_run_configuration(ROOT / "configuration" / f"{name}.yaml")
    with torch.device("meta"):
        model = MambaEMAForRegression(MambaEMAConfig(**run.model.params))
    assert model.speech_encoder.pooling == "attention"
    assert model.speech_encoder.attention.out_features == 1


def test_a_new_encoder_may_be_of_another_kind_with_fields_of_its_own(tmp_path):
    encoder = "model.params.speech_encoder_config={model_type: wav2vec2, num_codevector_groups: 2}"
    run = load(tmp_path, "{}", encoder)
    assert MambaEMAConfig(**run.model.params).speech_encoder_config.model_type == "wav2vec2"
    with pytest.raises(ValueError, match=r"unknown key model.params.speech_encoder_config.num_buckets"):
        load(tmp_path, "{}", "model.params.speech_encoder_config={model_type: wav2vec2, num_buckets: 3}")
