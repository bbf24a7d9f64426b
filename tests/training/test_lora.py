"""LoRA: adapters in the speech encoder are trained, saved, resumed and merged, and every path honours them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel

from modeling_mamba_ema import MambaEMAForRegression
from modeling_mamba_ema.fast_speech_encoder import fast_hidden_states
from modeling_mamba_ema.speech_encoder import hidden_states_one_by_one, padded_hidden_states
from modeling_mamba_ema.training import add_lora, build_model, load_lora, load_run_configuration, merge_lora
from modeling_mamba_ema.training.lora import TARGETS
from tests.support.models import TINY_ENCODER, pretrained_model, tiny_model
from tests.support.programs import call_command, call_program, launch_two_processes
from tests.support.runs import FINETUNE, assert_same_run, start_interrupted
from tests.support.tiny_corpus import write_run

peft = pytest.importorskip("peft")

ENCODERS = {
    "wavlm": (WavLMModel, WavLMConfig),
    "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config),
    "hubert": (HubertModel, HubertConfig),
}
every_encoder = pytest.mark.parametrize("kind", ENCODERS)
NO_DROPOUT = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Folders of pretrained speech encoders, by their kind."""
    folder = tmp_path_factory.mktemp("encoders")
    for seed, (kind, (model, config)) in enumerate(ENCODERS.items()):
        torch.manual_seed(seed)
        model(config(**TINY_ENCODER)).save_pretrained(folder / kind)
    return folder


@pytest.fixture
def configure(corpus, encoders, tmp_path):
    """A run with LoRA in a tiny encoder, with overrides."""
    path = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")

    def load(*overrides, kind="wavlm", lora="{r: 4}"):
        base = f"model.pretrained_speech_encoder={encoders / kind}"
        dropped = "model.params.speech_encoder_config=null"
        return load_run_configuration(path, [base, dropped, f"training.lora={lora}", *overrides])

    return load


def adapted_layers(model):
    """(layer, linear layer) of each adapter."""
    names = [name.split(".") for name, _ in model.named_parameters() if "lora_A" in name]
    return {(int(parts[parts.index("layers") + 1]), parts[-4]) for parts in names}


# What is trained


@every_encoder
def test_by_default_the_feed_forward_part_of_every_layer_is_adapted_and_the_rest_of_the_encoder_frozen(configure, kind):
    model, _ = build_model(configure(kind=kind))
    assert adapted_layers(model) == {(layer, name) for layer in (0, 1) for name in TARGETS["feed_forward"]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".backbone." not in name.replace(kind, "backbone") or "lora_" in name), name
    dense = model.speech_encoder.backbone.encoder.layers[0].feed_forward.intermediate_dense
    assert (dense.r["default"], dense.scaling["default"]) == (4, 32 / 4)
    assert build_model(configure(kind=kind, lora="{}"))[0].config.lora["options"]["r"] == 16


def test_layers_and_targets_are_chosen_by_name(configure):
    model, _ = build_model(configure(lora="{r: 2, target_modules: [attention, output_dense], layers_to_transform: 1}"))
    assert adapted_layers(model) == {(1, name) for name in (*TARGETS["attention"], "output_dense")}
    model, _ = build_model(configure("model.params.speech_encoder_layers=1", lora="{target_modules: q_proj}"))
    assert adapted_layers(model) == {(0, "q_proj")}


@pytest.mark.parametrize(
    ("lora", "overrides", "message"),
    [
        ("{rank: 4}", [], r"unknown key training.lora.rank"),
        ("{lora_alfa: 4}", [], r"did you mean training.lora.lora_alpha\?"),
        ("{r: four}", [], "training.lora.r is 'four', but must be int"),
        ("{r: 0}", [], "training.lora: .*r"),
        ("{target_modules: [q_prj]}", [], r"target_modules names q_prj, .* did you mean q_proj\?"),
        ("{target_modules: feedforward}", [], r"did you mean feed_forward\?"),
        ("{layers_to_transform: [0, 2]}", [], r"layers_to_transform is \[0, 2\], but the model reads 2 layers"),
        ("{layers_to_transform: 1}", ["model.params.speech_encoder_layers=1"], "the model reads 1 layers"),
        ("{}", ["model.params.freeze_speech_encoder=true"], "set model.params.freeze_speech_encoder=false"),
        ("{}", ["model.pretrained_speech_encoder=null"], "a speech encoder that is trained"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_training(configure, lora, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(configure(*overrides, lora=lora))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["q_proj"], r"training.lora is \['q_proj'\]; allowed is a dict of r, lora_alpha"),
        ({"rank": 4}, r"training.lora is \{'rank': 4\}; allowed is a dict of r, lora_alpha"),
    ],
)
def test_adapters_are_added_once_and_by_options_that_are_known(options, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        add_lora(model, options, "base", "main")
    add_lora(model, {"r": 2}, "base", "main")
    with pytest.raises(ValueError, match="the model has adapters already"):
        add_lora(model, {"r": 2}, "base", "main")


# The same numbers on every path


@pytest.mark.promise(
    "B-24",
    "with LoRA each path of the encoder and the merged model give the same numbers",
    "1e-10 float64, 1e-5 float32",
)
@every_encoder
@pytest.mark.parametrize("dora", [False, True])
def test_the_fast_encoder_gives_the_numbers_of_the_plain_ones_and_of_the_merged_model(kind, dora, encoders):
    def make():
        return pretrained_model() if kind == "wavlm" else tiny_model(speech_encoder_config={"model_type": kind})

    model = make()
    options = {"r": 4, "target_modules": [*TARGETS], "use_dora": dora}
    add_lora(model, options, str(encoders / kind), "main")
    backbone = model.speech_encoder.backbone
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    waveforms = torch.randn(2, 8_000, generator=torch.Generator().manual_seed(0))
    lengths, layers = torch.tensor([8_000, 5_000]), [0, 1, 2]
    with torch.no_grad():
        logits = model(waveforms).logits
        backbone.double()
        fast, plain, padded = (
            torch.stack(function(backbone, waveforms.double(), lengths, layers))
            for function in (fast_hidden_states, hidden_states_one_by_one, padded_hidden_states)
        )
        merge_lora(model)
        merged = torch.stack(fast_hidden_states(backbone, waveforms.double(), lengths, layers))
        backbone.float()
    torch.testing.assert_close(plain, fast, atol=1e-10, rtol=0)
    torch.testing.assert_close(padded * (fast != 0), fast, atol=1e-10, rtol=0)  # padding holds anything
    torch.testing.assert_close(merged, fast, atol=1e-10, rtol=0)
    torch.testing.assert_close(model(waveforms).logits, logits, atol=1e-5, rtol=0)
    assert not any("lora" in name for name in model.state_dict())
    assert (make()(waveforms).logits - logits).abs().max() > 1e-3


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, encoders):
    """A finished run: its configuration's path, its overrides and its folder."""
    folder = tmp_path_factory.mktemp("lora")
    path = write_run(folder / "run.yaml", corpus, folder / "run")
    overrides = [
        f"model.pretrained_speech_encoder={shutil.copytree(encoders / 'wavlm', folder / 'base')}",
        "model.params.speech_encoder_config=null",
        "training.lora={r: 4}",
        "training.encoder_learning_rate=1e-2",
    ]
    assert call_program(FINETUNE, path, *overrides) == 0
    return path, overrides, folder / "run"


def test_checkpoints_and_adapters_hold_what_was_trained_and_the_model_is_merged(run):
    *_, folder = run
    for saved in (folder / "adapter", *folder.glob("checkpoint-*")):
        names = load_file(saved / "model.safetensors").keys()
        assert any("lora_A" in name for name in names)
        assert any(name.startswith("head.") for name in names)
        assert not any("base_layer" in name or "conv_layers" in name for name in names)
    base = WavLMModel.from_pretrained(folder.parent / "base").state_dict()
    model = AutoModel.from_pretrained(folder / "model")
    assert getattr(model.config, "lora", None) is None
    merged = model.speech_encoder.backbone.state_dict()
    changed = {name for name, weight in base.items() if not torch.equal(weight, merged[name])}
    targets = TARGETS["feed_forward"]
    assert changed == {f"encoder.layers.{i}.feed_forward.{name}.weight" for i in (0, 1) for name in targets}


def test_merge_makes_the_model_of_the_run_from_its_adapters_and_refuses_what_it_cannot_merge(run, tmp_path, capsys):
    *_, folder = run
    assert call_command("merge", folder / "adapter", tmp_path / "merged") == 0
    merged, expected = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", folder / "model"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())
    waveform = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    adapted, model = load_lora(folder / "adapter"), MambaEMAForRegression.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(adapted(waveform).logits, model(waveform).logits, atol=1e-5, rtol=0)

    assert call_command("merge", folder / "adapter", tmp_path / "merged") != 0
    assert "exists and is not empty" in capsys.readouterr().err
    assert call_command("merge", folder / "model", tmp_path / "again") != 0
    assert "nothing to merge" in capsys.readouterr().err
    with pytest.raises(ValueError, match="mamba-ema merge FOLDER OUTPUT"):
        MambaEMAForRegression.from_pretrained(folder / "adapter")


def test_a_checkpoint_is_merged_as_well_and_so_are_adapters_on_a_trained_model(run, saved_model, configure, tmp_path):
    *_, folder = run
    checkpoint = max(folder.glob("checkpoint-*"))
    assert call_command("merge", checkpoint, tmp_path / "of_checkpoint") == 0
    assert AutoModel.from_pretrained(tmp_path / "of_checkpoint").config.labels == ["valence", "arousal"]

    start = [f"model.pretrained_model={saved_model}", "model.pretrained_speech_encoder=null"]
    model, _ = build_model(configure(*start, "model.params={context: none}"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    assert call_command("merge", tmp_path / "adapter", tmp_path / "merged") == 0
    waveform = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(waveform).logits
        merged = MambaEMAForRegression.from_pretrained(tmp_path / "merged")(waveform).logits
        base = MambaEMAForRegression.from_pretrained(saved_model)(waveform).logits
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    assert (merged - base).abs().max() > 1e-3


def test_adapters_are_not_put_on_other_weights_than_those_they_were_trained_on(run, encoders, tmp_path):
    *_, folder = run
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "config.json").read_text())
    other = WavLMModel.from_pretrained(encoders / "wavlm")
    other.encoder.layers[0].feed_forward.output_dense.weight.data[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    config["lora"]["base"] = str(tmp_path / "other")
    (adapter / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="were trained on other weights"):
        load_lora(adapter)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_weights_of_one_that_was_never_stopped(run, tmp_path):
    path, overrides, folder = run
    options = [*overrides, f"training.output_dir={tmp_path / 'run'}"]
    start_interrupted(path, 5, "os.kill(os.getpid(), signal.SIGKILL)", *options).wait()
    assert call_program(FINETUNE, path, *options) == 0
    assert_same_run(tmp_path / "run", folder)


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(run, tmp_path):
    path, overrides, _ = run
    dropouts = [f"model.params.speech_encoder_config={json.dumps(NO_DROPOUT)}", "model.params.dropout=0.0"]
    given = [*overrides, *dropouts, "training.num_train_epochs=1"]
    one, two = (tmp_path / name for name in ("one", "two"))
    assert call_program(FINETUNE, path, *given, f"training.output_dir={one}") == 0
    launch_two_processes(tmp_path, [FINETUNE, str(path), *given, f"training.output_dir={two}"])
    expected = load_file(one / "adapter" / "model.safetensors")
    for name, weight in load_file(two / "adapter" / "model.safetensors").items():
        if not name.endswith("speech_encoder.attention.bias"):  # its gradient is rounding, which Adam scales up
            torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)
