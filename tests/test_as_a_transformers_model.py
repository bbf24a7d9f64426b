"""What people do to any model of the Hub: adapters, other labels, quantisation, export, hooks, offloading."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoConfig, AutoModelForAudioClassification, AutoProcessor

from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor, MambaEMAForRegression, MambaEMAModel
from tests.support.audio_cases import noise
from tests.support.models import features, tiny_config, tiny_model

KINDS = ("wavlm", "wav2vec2", "hubert")
ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
RANGES = {"valence": (1, 7), "arousal": (1, 7)}
every_kind = pytest.mark.parametrize("kind", KINDS)
# Not all pairs: the norm is that of the front end, which all kinds share.
ALSO = [pytest.param(kind, norm, marks=pytest.mark.slow) for kind, norm in (("wavlm", "group"), ("wav2vec2", "layer"))]
kinds_and_norms = pytest.mark.parametrize(("kind", "norm"), [("wavlm", "layer"), ("hubert", "group"), *ALSO])


def model_of(kind="wavlm", norm="layer", **fields):
    encoder = {"model_type": kind, **fields.pop("speech_encoder_config", {})}
    return tiny_model(norm, speech_encoder_config=encoder, **fields)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch.compiler.reset()


@pytest.fixture
def waveforms():
    return torch.randn(3, 8_000, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def conversations():
    """Inputs of two conversations of up to 3 turns of different lengths."""
    values = torch.randn(2, 3, 8_000, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 3, 8_000, dtype=torch.long)
    mask[0, 1, 5_000:] = 0
    mask[1, 2] = 0
    return {"input_values": values, "attention_mask": mask}


# Adapters


@every_kind
def test_lora_in_attention_and_feed_forward_gets_gradients_and_equals_the_merged_model(kind, waveforms):
    peft = pytest.importorskip("peft")
    targets = [*ATTENTION, "intermediate_dense", "output_dense"]
    config = peft.LoraConfig(target_modules=targets, modules_to_save=["head"], init_lora_weights=False)
    model = peft.get_peft_model(model_of(kind), config)
    model.train()(waveforms, labels=torch.rand(3, 2)).loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert all(any(f".{target}.lora_A" in name for name in adapters) for target in targets)
    assert [name for name, grad in adapters.items() if grad is None or not grad.any()] == []
    model.eval()
    with torch.inference_mode():
        adapted = model(waveforms).logits
        with model.disable_adapter():
            without = model(waveforms).logits
        merged = model.merge_and_unload()(waveforms).logits
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=0)
    assert (adapted - without).abs().max() > 1e-3


def test_transformers_own_adapters_train_on_a_frozen_encoder(waveforms):
    peft = pytest.importorskip("peft")
    model = model_of(freeze_speech_encoder=True)
    model.add_adapter(peft.LoraConfig(target_modules=ATTENTION))
    model.train()(waveforms, labels=torch.rand(3, 2)).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name and "speech_encoder" in name]
    assert len(grads) == 2 * len(ATTENTION)
    assert all(grad is not None and grad.any() for grad in grads)
    assert all(p.grad is None for n, p in model.speech_encoder.named_parameters() if "base_layer" in n)


class QuantisedWeight(torch.Tensor):
    """A weight of 8 bits with a scale a row, as quantisation libraries put it into `nn.Linear`."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.values = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            inputs, weight, *rest = args
            return function(inputs, weight.values * weight.scale, *rest, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} reads the weight past nn.Linear")


@every_kind
def test_weights_that_are_quantised_tensors_are_honoured(kind, waveforms):
    model = model_of(kind)
    linear_layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.inference_mode(False), torch.no_grad():
        before = model(waveforms).logits
        for layer in linear_layers:
            layer.weight = torch.nn.Parameter(QuantisedWeight(layer.weight.detach()), requires_grad=False)
        after = model(waveforms).logits
        for layer in linear_layers:
            weight = layer.weight
            layer.weight = torch.nn.Parameter(weight.values * weight.scale)
        expected = model(waveforms).logits
    assert (after - before).abs().max() > 0
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)


# Labels


@pytest.fixture
def trained(tmp_path):
    model_of(label_ranges=RANGES, loss_label_weights={"arousal": 2.0}).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {0: "dominance"}}, ["dominance"]),
        ({"label2id": {"dominance": 0}}, ["dominance"]),
        # As transformers' example scripts pass them.
        ({"id2label": {"0": "dominance"}, "label2id": {"dominance": "0"}, "num_labels": 1}, ["dominance"]),
        ({"id2label": {0: "arousal", 1: "dominance", 2: "valence"}}, ["arousal", "dominance", "valence"]),
    ],
    ids=["num_labels", "id2label", "label2id", "strings", "another order"],
)
def test_a_trained_checkpoint_takes_other_labels_and_can_be_saved_and_loaded_again(trained, tmp_path, labels, names):
    model = MambaEMAForRegression.from_pretrained(trained, **labels, ignore_mismatched_sizes=True)
    assert model.config.labels == names
    model(torch.randn(2, 8_000), labels=torch.rand(2, len(names))).loss.backward()
    model.save_pretrained(tmp_path / "again")
    config = MambaEMAForRegression.from_pretrained(tmp_path / "again").config
    assert config.labels == names
    assert config.label2id == {name: index for index, name in enumerate(names)}
    kept = [name for name in RANGES if name in names]
    assert sorted(config.label_ranges or {}) == sorted(kept)


def test_the_same_number_of_labels_keeps_their_names_and_ranges(trained):
    config = AutoConfig.from_pretrained(trained, num_labels=2)
    assert (config.labels, config.label_range("valence")) == (["valence", "arousal"], (1.0, 7.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_ranges": {"valense": [1, 7]}}, "'valense'; allowed are 'valence', 'arousal'"),
        ({"label_ranges": {"valence": [7, 1]}}, "low < high"),
        ({"speech_encoder_pooling": "atention"}, "'atention'; allowed are"),
        ({"speech_encoder_layers": 9}, "speech_encoder_layers is 9"),
        ({"loss_mse_weight": 7.0}, "loss_mse_weight is 7.0"),
        ({"id2label": {0: "dominance"}, "label_ranges": {"valence": [1, 7]}}, "'valence'; allowed are 'dominance'"),
        ({"id2label": {0: "a", 1: "b"}, "num_labels": 3}, "num_labels is 3, but 2 labels are named"),
    ],
)
def test_what_a_caller_misspells_is_refused_when_a_checkpoint_is_loaded(trained, fields, message):
    with pytest.raises(ValueError, match=message):
        MambaEMAForRegression.from_pretrained(trained, **fields, ignore_mismatched_sizes=True)


def test_a_single_label_may_go_without_a_dimension(waveforms):
    model = model_of(num_labels=1)
    labels = torch.rand(3)
    assert torch.equal(model(waveforms, labels=labels).loss, model(waveforms, labels=labels[:, None]).loss)
    turns = model(waveforms.view(1, 3, -1), labels=labels.view(1, 3)).loss
    assert torch.equal(turns, model(waveforms.view(1, 3, -1), labels=labels.view(1, 3, 1)).loss)


# Devices


@every_kind
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_numbers(kind, where, tmp_path, waveforms):
    accelerate = pytest.importorskip("accelerate")
    model = model_of(kind, speech_encoder_pooling="multihead_attention", speech_encoder_layers=[0, -1])
    inputs = waveforms.view(1, 3, -1)
    with torch.no_grad():
        expected = model(inputs).logits
        if where == "cpu":
            accelerate.cpu_offload(model, torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        torch.testing.assert_close(model(inputs).logits, expected, atol=1e-6, rtol=0)


def test_a_device_map_may_leave_the_updater_on_the_disk(trained, tmp_path, waveforms):
    pytest.importorskip("accelerate")
    places = {"mamba_ema.speech_encoder": "cpu", "mamba_ema.projection": "cpu", "head": "cpu"}
    device_map = {**places, "mamba_ema.conversation_encoder": "disk"}
    with torch.no_grad():
        expected = MambaEMAForRegression.from_pretrained(trained)(waveforms).logits
        model = MambaEMAForRegression.from_pretrained(trained, device_map=device_map, offload_folder=tmp_path / "off")
        torch.testing.assert_close(model(waveforms).logits, expected, atol=1e-6, rtol=0)


@every_kind
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize(("context", "units"), [("none", 1), ("mamba_ema", 2)])
def test_the_units_that_sharding_wraps_are_modules_of_the_model(kind, norm, context, units):
    model = model_of(kind, norm, context=context)
    present = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= present
    assert len(model._no_split_modules) == units
    assert model.get_input_embeddings() is None


# Tracing, compiling, exporting, mapping


def test_a_trace_which_would_fix_the_length_is_refused(waveforms):
    for model in (model_of(), model_of().speech_encoder):
        with pytest.raises(RuntimeError, match=r"use torch\.export or torch\.compile"):
            torch.jit.trace(model, waveforms, strict=False)


@kinds_and_norms
def test_an_exported_program_takes_any_length_and_gives_the_same_numbers(kind, norm, waveforms):
    model = model_of(kind, norm)
    # Named dimensions are refused, as for WavLMModel: torch cannot tell that there is more than one frame.
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (waveforms,), dynamic_shapes={"input_values": sizes}, strict=False)
    other = torch.randn(2, 12_345)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other).logits, model(other).logits, atol=1e-5, rtol=0)


@kinds_and_norms
def test_a_batch_of_conversations_compiles_in_one_graph_with_the_same_numbers(kind, norm, conversations):
    model = model_of(kind, norm)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, found = model(**conversations), compiled(**conversations)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(found.turn_mask, expected.turn_mask)


def test_a_stream_compiles_in_one_graph_with_the_same_numbers(waveforms):
    model = model_of()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(waveforms.view(1, 3, -1)).logits[0]
        state, found = None, []
        for waveform in waveforms:
            outputs = compiled(waveform[None], conversation_state=state, use_conversation_state=True)
            state = outputs.conversation_state
            found.append(outputs.logits[0])
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=0)


def test_cached_frames_compile_in_one_graph(conversations):
    model = model_of(freeze_speech_encoder=True)
    frames = torch.randn(2, 3, 1, 12, 32)
    mask = torch.ones(2, 3, 12, dtype=torch.bool)
    mask[1, 2] = False
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(frame_values=frames, frame_mask=mask).logits
        found = compiled(frame_values=frames, frame_mask=mask).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, equal_nan=True)


def test_a_compiled_training_step_has_the_same_loss_and_gradients(conversations):
    labels = torch.rand(2, 3, 2)
    labels[1, 2] = -100
    model = model_of()
    gradients = []
    for forward in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = forward(**conversations, labels=labels).loss
        loss.backward()
        gradients.append(
            {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@every_kind
def test_vmap_over_utterances_gives_the_numbers_of_the_batch(kind, waveforms):
    model = model_of(kind)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda waveform: model(waveform[None]).logits[0])(waveforms)
        torch.testing.assert_close(mapped, model(waveforms).logits, atol=1e-5, rtol=0)


# Hooks and gradients


@pytest.mark.parametrize("name", ["", "encoder", "feature_extractor", "encoder.layers.0.attention.q_proj"])
@pytest.mark.filterwarnings("ignore:For backward hooks", "ignore:Full backward hook")
def test_forward_and_backward_hooks_run_and_change_nothing(name, waveforms):
    model = model_of()
    expected = model(waveforms).logits
    module, seen = model.speech_encoder.backbone.get_submodule(name), []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    logits = model(waveforms).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    logits.sum().backward()
    assert {"before", "after"} <= set(seen)
    assert "backward" in seen or name in ("", "encoder")  # whose outputs are no tensors, of which torch says so itself


def test_global_hooks_run(waveforms):
    model, seen = model_of(), set()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module).__name__))
    try:
        model(waveforms)
    finally:
        handle.remove()
    assert {"WavLMModel", "WavLMEncoderStableLayerNorm", "WavLMFeatureEncoder", "Mamba2", "RegressionHead"} <= seen


@every_kind
@pytest.mark.parametrize("shape", [(3, 8_000), (1, 3, 8_000)], ids=["utterances", "a conversation"])
def test_gradients_reach_every_hidden_state_that_is_returned(kind, shape, waveforms):
    outputs = model_of(kind)(waveforms.view(shape), output_hidden_states=True)
    assert all(state.shape == (*shape[:-1], 24, 32) for state in outputs.hidden_states)
    gradients = torch.autograd.grad(outputs.logits.sum(), outputs.hidden_states)
    assert len(gradients) == 3
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_asking_for_hidden_states_changes_no_number_and_the_last_is_after_the_final_norm(waveforms, conversations):
    model = model_of()
    with torch.no_grad():
        outputs = model(waveforms, output_hidden_states=True)
        torch.testing.assert_close(outputs.logits, model(waveforms).logits, atol=1e-6, rtol=0)
        last = model.speech_encoder.backbone(waveforms).last_hidden_state
        torch.testing.assert_close(outputs.hidden_states[-1], last, atol=1e-5, rtol=0)
        expected, found = model(**conversations).logits, model(**conversations, output_hidden_states=True).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_gradient_checkpointing_covers_the_convolutions(norm, monkeypatch):
    model = model_of(norm=norm).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def saved(enabled):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enabled
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(2, 32_000, generator=torch.Generator().manual_seed(0)), labels=torch.rand(2, 2))
        return sum(sizes)

    kept = [saved(True), saved(False)]
    assert kept[0] < kept[1] / 5


def test_the_feature_encoder_and_the_whole_encoder_can_be_frozen(waveforms):
    model = model_of().train()
    model.freeze_feature_encoder()
    model(waveforms, labels=torch.rand(3, 2)).loss.backward()
    backbone = model.speech_encoder.backbone
    assert all(p.grad is None for p in backbone.feature_extractor.parameters())
    assert backbone.encoder.layers[0].attention.q_proj.weight.grad is not None
    model.freeze_base_model()
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


# Loading and state


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_kind
def test_both_names_of_attention_load_and_give_the_same_numbers(kind, attention, tmp_path, waveforms):
    model_of(kind).save_pretrained(tmp_path)
    model = MambaEMAForRegression.from_pretrained(tmp_path, attn_implementation=attention)
    with torch.no_grad():
        expected = MambaEMAForRegression.from_pretrained(tmp_path)(waveforms).logits
        torch.testing.assert_close(model(waveforms).logits, expected, atol=1e-6, rtol=0)


def test_the_auto_processor_is_the_feature_extractor_without_remote_code(trained):
    assert type(AutoProcessor.from_pretrained(trained)) is MambaEMAFeatureExtractor
    assert type(AutoModelForAudioClassification.from_pretrained(trained)) is MambaEMAForRegression


def test_a_saved_state_loads_with_torchs_default_and_equals_itself(tmp_path, waveforms):
    model = model_of()
    with torch.no_grad():
        states = [model(w[None], use_conversation_state=True).conversation_state for w in waveforms[:2]]
    torch.save(states[0], tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert loaded == states[0]
    assert loaded != states[1]
    assert loaded != "a state"


def test_a_configuration_from_its_own_dictionary_is_equal():
    config = MambaEMAConfig(id2label={0: "valence"}, label_ranges={"valence": (1, 5)})
    assert MambaEMAConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# Tuples, copies, threads

SPEECH = [[noise(1_000), noise(2_000, 1)], [noise(700, 2)]]


@pytest.mark.promise("B-22", "copies and plain tuples give the same values", "bitwise")
@pytest.mark.parametrize("labels", [False, True])
def test_return_dict_false_gives_the_same_values_as_a_plain_tuple(labels):
    model, inputs = tiny_model(), features(SPEECH)
    if labels:
        inputs["labels"] = torch.rand(2, 2, 2)
    with torch.no_grad():
        named = model(**inputs, use_conversation_state=True)
        plain = model(**inputs, use_conversation_state=True, return_dict=False)
    assert type(plain) is tuple
    assert len(plain) == len(named.to_tuple())
    for value, expected in zip(plain, named.to_tuple()):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(value.nan_to_num(-1), expected.nan_to_num(-1))
    states = [next(value for value in values if hasattr(value, "num_turns")) for values in (plain, named.to_tuple())]
    assert all(torch.equal(states[0].state_dict()[name], tensor) for name, tensor in states[1].state_dict().items())


@pytest.mark.promise("B-22")
def test_the_bare_model_gives_a_plain_tuple_too():
    model = MambaEMAModel(tiny_config()).eval()
    with torch.no_grad():
        named, plain = model(**features(SPEECH)), model(**features(SPEECH), return_dict=False)
    assert all(torch.equal(value, expected) for value, expected in zip(plain, named.to_tuple()))


@pytest.mark.promise("B-22")
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_deep_copy_answers_the_same_and_shares_no_weight(norm):
    model = tiny_model(norm)
    inputs = features(noise(2_000))
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**inputs).logits
        assert torch.equal(duplicate(**inputs).logits, before)
        for parameter in duplicate.parameters():
            parameter.add_(1.0)
        assert torch.equal(model(**inputs).logits, before)
        assert not torch.equal(duplicate(**inputs).logits, before)


@pytest.mark.promise("B-12")
def test_eight_threads_on_one_model_get_the_answers_of_one():
    model = tiny_model()
    batches = [features([noise(1_000 + 100 * index, index)]) for index in range(20)]

    def answer(inputs):
        with torch.no_grad():
            return model(**inputs).logits

    expected = [answer(inputs) for inputs in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            found = list(pool.map(answer, batches))
            assert all(torch.equal(one, other) for one, other in zip(found, expected))
