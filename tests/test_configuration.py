"""MambaEMAConfig: defaults, round trips, refused values."""

import json

import pytest
from transformers import AutoConfig, WavLMConfig

from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor, MambaEMAForRegression
from tests.support.models import tiny_config
from tests.support.programs import allocating_below


def test_the_default_encoder_is_wavlm_large_without_layer_drop_and_spec_augment():
    encoder = MambaEMAConfig().speech_encoder_config
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.num_attention_heads) == (1024, 24, 16)
    assert encoder.layerdrop == 0.0
    assert encoder.apply_spec_augment is False


def test_the_default_labels_are_valence_and_arousal_on_the_unit_scale():
    config = MambaEMAConfig()
    assert config.labels == ["valence", "arousal"]
    assert config.label2id == {"valence": 0, "arousal": 1}
    assert config.label_range("arousal") == (0.0, 1.0)
    assert config.problem_type == "regression"


def test_a_folder_gives_the_same_configuration_back(tmp_path):
    config = tiny_config(
        id2label={0: "valence", 1: "arousal", 2: "dominance"},
        label_ranges={"dominance": (1, 7)},
        speech_encoder_layers=[0, -1],
        ema_decay_learnable=True,
    )
    config.save_pretrained(tmp_path)
    loaded = MambaEMAConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.label_range("dominance") == (1.0, 7.0)
    assert loaded.encoder_layer_indices == [0, 2]
    assert WavLMConfig.from_pretrained(tmp_path).hidden_size == config.speech_encoder_config.hidden_size


def test_num_labels_may_be_given_instead_of_names():
    config = tiny_config(num_labels=3)
    assert len(config.labels) == 3
    assert config.label_range(config.labels[2]) == (0.0, 1.0)


def test_an_unknown_pooling_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="'max'.*'mean', 'attention', 'multihead_attention', 'statistics', 'attentive"):
        tiny_config(speech_encoder_pooling="max")


@pytest.mark.promise("E-07")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context", "lstm"),
        ("hidden_size", 10**9),
        ("hidden_size", 0),
        ("num_hidden_layers", 2.0),
        ("state_size", True),
        ("conv_kernel", 9),
        ("expand", "two"),
        ("head_dim", 7),
        ("ema_decay", 1.5),
        ("ema_decay", "0.8"),
        ("dropout", -0.1),
        ("loss_mse_weight", 2),
        ("speech_encoder_pooling_hidden_size", 0),
        ("speech_encoder_pooling_hidden_size", 10**9),
        ("speech_encoder_pooling_min_variance", 0.0),
        ("pooled_dropout", 1.0),
        ("projection_activation", "sin"),
        ("head_activation", None),
        ("head_hidden_layers", 2),
        ("activation_layer_norm", 1),
        ("bounded_predictions", "no"),
        ("freeze_speech_encoder", "no"),
        ("ema_decay_learnable", "no"),
        ("do_normalize", None),
        ("waveform_std", 0.1),
        ("waveform_mean", 0.0),
        ("speech_encoder_layers", 7),
        ("speech_encoder_layers", []),
        ("speech_encoder_layers", [-1, 2]),
        ("speech_encoder_layers", "last"),
        ("label_ranges", {"joy": (0, 1)}),
        ("label_ranges", {"valence": (1, 1)}),
        ("label_ranges", {"valence": [float("-inf"), float("inf")]}),
        ("loss_label_weights", {"valence": -1.0}),
        ("loss_label_weights", {"valence": 0, "arousal": 0}),
        ("id2label", {0: "valence", 2: "arousal"}),
        ("id2label", {0: "valence", 1: "valence"}),
        ("id2label", {0: "valence", 1: " "}),
        ("speech_encoder_config", "microsoft/wavlm-large"),
        ("speech_encoder_pooling", ["mean"]),
        ("context", None),
        ("label_ranges", [1, 7]),
        ("label_ranges", {"valence": 7}),
        ("label_ranges", {"valence": "17"}),
        ("loss_label_weights", [1, 2]),
        ("interval_radii", [0.1]),
        ("interval_radii", {"valence": 0.1, "arousal": 0.1}),
        ("id2label", ["valence", "arousal"]),
        ("id2label", {"valence": 0}),
        ("label2id", {0: "valence"}),
        ("num_labels", "3"),
        ("num_labels", 0),
        ("problem_type", "single_label_classification"),
    ],
)
def test_a_value_outside_its_range_is_named_with_what_is_allowed(field, value):
    with pytest.raises(ValueError, match=field):
        tiny_config(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 10**9),
        ("layer_norm_eps", -1.0),
        ("layerdrop", 1.5),
        ("hidden_dropout", 1.0),
        ("attention_dropout", -0.1),
        ("mask_time_prob", 2.0),
    ],
)
def test_numbers_of_the_encoder_are_bounded(field, value):
    with pytest.raises(ValueError, match=rf"speech_encoder_config.{field} is {value}; allowed are (whole )?numbers fr"):
        tiny_config(speech_encoder_config={field: value})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"speech_encoder_poolling": "mean"}, "no field 'speech_encoder_poolling'; did you mean 'speech_encoder_pool"),
        ({"label_range": {"valence": [1, 7]}}, "did you mean 'label_ranges'"),
        ({"num_label": 3}, "did you mean 'num_labels'"),
        ({"speech_encoder_config": {"hiden_dropout": 0.1}}, "hiden_dropout is no field of WavLMConfig; did you mean"),
        ({"speech_encoder_config": {"pooling": "mean"}}, "speech_encoder_config.pooling is no field of WavLMConfig"),
        ({"id2label": {0: "valence"}, "label2id": {"arousal": 0}}, "id2label is .*, but label2id is"),
        ({"speech_encoder_config": {"hidden_act": "gleu"}}, "speech_encoder_config.hidden_act is 'gleu'; allowed are"),
        ({"speech_encoder_config": {"conv_dim": [8]}}, "speech_encoder_config: .*conv_dim"),
        ({"num_labels": 3, "label2id": {"arousal": 0}}, "num_labels is 3, but 1 labels are named"),
    ],
)
def test_a_name_that_is_almost_a_field_and_maps_that_contradict_each_other_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        tiny_config(**fields)


def test_other_names_are_kept_as_transformers_does_and_a_saved_file_of_another_version_loads(tmp_path):
    extras = {"note": "pilot", "torch_dtype": "float32", "architectures": ["MambaEMAForRegression"]}
    assert tiny_config(**extras).note == "pilot"
    tiny_config(speech_encoder_config={"torch_dtype": "float32"}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["speech_encoder_poolings"] = ["mean"]
    saved["speech_encoder_config"]["layer_drop"] = 0.0
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert AutoConfig.from_pretrained(tmp_path).speech_encoder_poolings == ["mean"]


@pytest.mark.parametrize(
    ("statistics", "match"),
    [
        ({"do_normalize": True, "waveform_mean": 0.0, "waveform_std": 0.1}, "either do_normalize alone, or both"),
        ({"do_normalize": False, "waveform_mean": 0.0, "waveform_std": 1e-4}, "waveform_std is 0.0001; allowed are"),
        ({"do_normalize": False, "waveform_mean": 2.0, "waveform_std": 0.1}, "waveform_mean is 2.0; allowed are"),
        ({"do_normalize": False, "waveform_mean": float("nan"), "waveform_std": 0.1}, "waveform_mean is nan"),
        ({"do_normalize": False, "waveform_mean": "0", "waveform_std": 0.1}, "waveform_mean is '0'"),
    ],
)
def test_statistics_of_the_corpus_that_cannot_be_meant_are_refused_by_model_and_feature_extractor(statistics, match):
    for build in (tiny_config, MambaEMAFeatureExtractor):
        with pytest.raises(ValueError, match=match):
            build(**statistics)


def test_heads_must_divide_the_hidden_layer_of_the_scorer():
    with pytest.raises(ValueError, match="number of pooling heads is 4, but must divide hidden_size 6"):
        tiny_config(speech_encoder_pooling="multihead_attention", speech_encoder_pooling_hidden_size=6)


def test_heads_must_divide_the_encoders_width():
    with pytest.raises(ValueError, match="number of pooling heads is 5, but must divide"):
        tiny_config(speech_encoder_pooling="multihead_attention", speech_encoder_pooling_heads=5)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_at_the_ends_of_its_range_is_refused_where_there_is_a_moving_average(decay):
    with pytest.raises(ValueError, match="both excluded"):
        tiny_config(ema_decay=decay)
    assert tiny_config(ema_decay=decay, context="mamba").ema_decay == decay


def test_the_width_of_heads_matters_only_where_there_is_a_mamba_block():
    assert tiny_config(head_dim=7, context="ema").head_dim == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speech_encoder_pooling", "atention"),
        ("speech_encoder_layers", 9),
        ("label_ranges", {"valense": [1, 7]}),
        ("label_ranges", {"valence": [7, 1]}),
        ("loss_mse_weight", 7.0),
    ],
)
def test_a_value_set_afterwards_is_refused_when_a_model_is_built_and_when_it_is_saved(tmp_path, field, value):
    config = tiny_config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        MambaEMAForRegression(config)
    with pytest.raises(ValueError, match=field):
        config.save_pretrained(tmp_path)
    model = MambaEMAForRegression(tiny_config())
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=field):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.promise("E-07", "sizes in a config.json are bounded", "refused under 50 MB")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**6),
        ("intermediate_size", 10**9),
        ("conv_dim", [10**6] * 7),
        ("conv_dim", [16] * 10_000),
        ("conv_kernel", [10**9] * 7),
        ("conv_stride", [10**9] * 7),
        ("num_conv_pos_embeddings", 10**9),
        ("num_conv_pos_embedding_groups", 10**9),
        ("num_buckets", 10**9),
        ("max_bucket_distance", 10**9),
        ("add_adapter", True),
    ],
)
def test_a_config_json_with_sizes_without_bounds_is_refused_before_memory_is_taken(tmp_path, field, value):
    tiny_config().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    encoder = config["speech_encoder_config"]
    encoder[field] = value
    if field == "conv_dim":
        encoder["num_feat_extract_layers"] = len(value)
        encoder["conv_kernel"], encoder["conv_stride"] = [2] * len(value), [1] * len(value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with allocating_below(50e6), pytest.raises(ValueError, match=field):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.promise("E-06", "a config.json cannot choose an attention kernel from a repository", "refused")
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_json_cannot_choose_an_attention_kernel(tmp_path, key, nested):
    tiny_config().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config["speech_encoder_config"] if nested else config)[key] = "someone/kernels"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no attention kernel from a repository"):
        AutoConfig.from_pretrained(tmp_path)
