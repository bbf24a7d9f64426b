"""The unpadded encoder against transformers' own models, run alone on each utterance."""

import copy
import os
import subprocess
import sys
import types

import pytest
import torch
from transformers import HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel
from transformers.activations import GELUActivation

from modeling_mamba_ema import (
    MambaEMAConfig,
    MambaEMAFeatureExtractor,
    MambaEMAForRegression,
    fast_speech_encoder,
    speech_encoder,
    tiny_wavlm,
)
from modeling_mamba_ema.fast_speech_encoder import fast_hidden_states, is_untouched
from modeling_mamba_ema.sample import load_sample_conversation
from modeling_mamba_ema.speech_encoder import hidden_states_one_by_one, num_frames

from .support.models import tiny_model

SAMPLES = [400, 16_000, 9_000, 24_000, 719]
NORMS = ["layer", "group"]
KINDS = {
    "wavlm": (WavLMConfig, WavLMModel, {}),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model, {}),
    "hubert": (HubertConfig, HubertModel, {}),
    "hubert without a norm": (HubertConfig, HubertModel, {"feat_proj_layer_norm": False}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def wavlm(norm: str, **changes) -> WavLMModel:
    return backbone("wavlm", norm, **changes)


def backbone(kind: str, norm: str, **changes):
    config_class, model_class, own = KINDS[kind]
    config = config_class(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(24,) * 7,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        conv_bias=norm == "layer",
        num_conv_pos_embeddings=16,
        **{"num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "apply_spec_augment": False, **own, **changes},
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():  # as after training: no norm is 1, no bias is 0
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    if kind != "wavlm":
        return model
    for layer in model.encoder.layers:  # no gate is alike, no position bias is small
        torch.nn.init.normal_(layer.attention.gru_rel_pos_const)
        torch.nn.init.normal_(layer.attention.gru_rel_pos_linear.weight)
    torch.nn.init.normal_(model.encoder.layers[0].attention.rel_attn_embed.weight)
    return model


def batch(samples=SAMPLES, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms whose padding is NaN: reading it would show"""
    waveforms = torch.full((len(samples), max(samples)), torch.nan, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for row, length in zip(waveforms, samples):
        row[:length] = torch.randn(length, generator=generator)
    return waveforms, torch.tensor(samples)


def alone(model, waveforms: torch.Tensor, lengths: torch.Tensor) -> list[list[torch.Tensor]]:
    """Every hidden state of every utterance from transformers' model itself"""
    states = []
    for row, length in zip(waveforms, lengths.tolist()):
        outputs = model(row[:length].unsqueeze(0), output_hidden_states=True)
        states.append([*(state[0] for state in outputs.hidden_states[:-1]), outputs.last_hidden_state[0]])
    return states


def largest_difference(states: list[torch.Tensor], references: list[list[torch.Tensor]]) -> float:
    return max(
        (states[layer][index, : len(reference)].double() - reference.double()).abs().max().item()
        for index, layers in enumerate(references)
        for layer, reference in enumerate(layers)
    )


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def way(request, monkeypatch):
    """Both ways to work on a batch, whatever the device."""
    together = request.param == "as on a GPU"
    monkeypatch.setattr(fast_speech_encoder, "_works_together", lambda device: together)
    return request.param


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("way")
@every_kind
def test_every_hidden_state_is_the_one_of_the_model_run_alone(kind, norm, dtype, tolerance, grad):
    model = backbone(kind, norm).to(dtype)
    waveforms, lengths = batch(dtype=dtype)
    with torch.set_grad_enabled(grad):
        states = fast_hidden_states(model, waveforms, lengths, range(4))
    assert largest_difference(states, alone(model, waveforms, lengths)) < tolerance


@pytest.mark.parametrize("samples", [[16_000, 16_000, 16_000], [9_000]])
@pytest.mark.usefixtures("way")
@every_kind
def test_utterances_of_one_length_get_the_states_of_the_model_run_alone(kind, samples):
    model = backbone(kind, "layer").double()
    waveforms, lengths = batch(samples, torch.float64)
    assert (
        largest_difference(fast_hidden_states(model, waveforms, lengths, range(4)), alone(model, waveforms, lengths))
        < 1e-12
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
def test_a_pretrained_encoder_hears_speech_as_when_run_alone(dtype, tolerance):
    """Unlike random weights, trained ones have activations of very different sizes."""
    model = WavLMModel.from_pretrained(tiny_wavlm.FOLDER, dtype=torch.float32).eval().to(dtype)
    inputs = MambaEMAFeatureExtractor()(
        [turn["waveform"] for turn in load_sample_conversation()], sampling_rate=16_000, return_tensors="pt"
    )
    waveforms, lengths = inputs["input_values"].to(dtype), inputs["attention_mask"].sum(dim=1)
    with torch.no_grad():
        states = fast_hidden_states(model, waveforms, lengths, range(model.config.num_hidden_layers + 1))
        assert largest_difference(states, alone(model, waveforms, lengths)) < tolerance


@pytest.mark.parametrize("norm", NORMS)
def test_frames_past_the_end_are_zero(norm):
    waveforms, lengths = batch()
    (states,) = fast_hidden_states(wavlm(norm), waveforms, lengths, [3])
    for row, frames in zip(states, num_frames(lengths, wavlm(norm).config).tolist()):
        assert row[:frames].abs().sum(dim=1).min() > 0
        assert (row[frames:] == 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("way")
@every_kind
def test_gradients_are_those_of_the_reference(kind, norm):
    model = backbone(kind, norm).double()
    waveforms, lengths = batch(dtype=torch.float64)
    weights = torch.randn(len(SAMPLES), 74, 32, dtype=torch.float64)
    gradients = []
    for encode in (fast_hidden_states, hidden_states_one_by_one):
        model.zero_grad()
        states = encode(model, waveforms.nan_to_num(), lengths, [1, 3])
        frames = num_frames(lengths, model.config)
        valid = (torch.arange(states[0].shape[1]) < frames.unsqueeze(1)).unsqueeze(-1)
        loss = sum((state.masked_fill(~valid, 0.0) * weights[:, : state.shape[1]]).sum() for state in states)
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    fast, plain = gradients
    assert {name for name, gradient in plain.items() if gradient is None} == {
        name for name, gradient in fast.items() if gradient is None
    }
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(fast[name], gradient, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (fast_speech_encoder, "GROUP_FRAMES", 30),
        (fast_speech_encoder, "PIECE_VALUES", 12_000),
        (fast_speech_encoder, "PIECE_VALUES", 1),
        (fast_speech_encoder, "ATTENTION_ENTRIES", 500),
        (fast_speech_encoder, "ATTENTION_ENTRIES", 5_000),
        (fast_speech_encoder, "MASK_ENTRIES", 20_000),
        (fast_speech_encoder, "SIMILAR_LENGTH", 0.0),
        (fast_speech_encoder, "SIMILAR_LENGTH", 1.0),
        (fast_speech_encoder, "FRONT_END_SAMPLES", 20_000),
        (fast_speech_encoder, "TAPS", 5),
    ],
    ids=[
        *("groups", "pieces of some frames", "pieces of one frame", "blocks of queries", "blocks of heads"),
        *("blocks of attention on a GPU", "one padded group", "a group for each length"),
        *("the front end in groups", "one tap at a time"),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_how_the_work_is_divided_changes_no_number(monkeypatch, norm, module, name, value):
    model = wavlm(norm).double()
    waveforms, lengths = batch(dtype=torch.float64)
    expected = fast_hidden_states(model, waveforms, lengths, range(4))
    monkeypatch.setattr(module, name, value)
    if name in {"MASK_ENTRIES", "SIMILAR_LENGTH", "FRONT_END_SAMPLES", "TAPS"}:
        monkeypatch.setattr(module, "_works_together", lambda device: True)
    for state, reference in zip(fast_hidden_states(model, waveforms, lengths, range(4)), expected):
        torch.testing.assert_close(state, reference, rtol=0, atol=1e-12)


@pytest.fixture
def two_threads(monkeypatch):
    """As on a machine of two cores, with an encoder as narrow as those here; the tests run with one thread."""
    monkeypatch.setattr(fast_speech_encoder, "THREADED_WIDTH", 0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("samples", [SAMPLES, [16_000, 16_000], [48_000, 400, 719], [8000] * 9, [5000]])
def test_threads_that_share_the_utterances_change_no_number(two_threads, samples, inference):
    model = wavlm("layer").double()
    waveforms, lengths = batch(samples, torch.float64)
    with torch.inference_mode() if inference else torch.no_grad():
        states = fast_hidden_states(model, waveforms, lengths, range(4))
        assert largest_difference(states, alone(model, waveforms, lengths)) < 1e-12
    assert all(state.is_inference() == inference for state in states)


@pytest.mark.parametrize(
    ("samples", "together", "threaded"),
    [
        ([5000], [[0]], []),
        ([16_000, 16_000], [], [[0], [1]]),
        ([400, 48_000, 719], [[0, 1, 2]], []),  # the second is longer than the others together, so is the third then
        ([8000, 160_000, 8000], [[1]], [[0], [2]]),
        ([4000, 8000, 4000, 8000, 4000, 4000], [], [[1], [3], [0, 2], [4, 5]]),
    ],
)
def test_each_thread_gets_utterances_of_its_own_but_for_those_longer_than_its_share(
    two_threads, samples, together, threaded
):
    with torch.no_grad():
        assert fast_speech_encoder._divide(samples, wavlm("layer").config) == (together, threaded)


@pytest.mark.parametrize(("utterances", "threads", "idle"), [(6, 2, 0.02), (8, 2, 0.02), (12, 4, 0.05), (200, 2, 0.01)])
def test_threads_that_work_at_the_same_speed_finish_together(utterances, threads, idle):
    """Each takes the next group when it has finished one; how much longer the last one works than all on average."""
    normal = torch.distributions.Normal(0.0, 0.6).icdf((torch.arange(utterances) + 0.5) / utterances)
    samples = sorted((64_000 * normal.exp()).int().tolist(), reverse=True)
    even = sum(samples) / threads
    groups = fast_speech_encoder._evenly(list(range(utterances)), samples, round(even / 2), threads)
    assert sorted(index for group in groups for index in group) == list(range(utterances))
    ends = [0] * threads
    for group in groups:
        ends[ends.index(min(ends))] += sum(samples[index] for index in group)
    assert max(ends) / even - 1 < idle


def test_each_of_the_threads_computes_with_one_core_and_the_caller_keeps_its_own(two_threads):
    numbers = fast_speech_encoder._in_single_threads(lambda _: torch.get_num_threads(), [[0], [1], [2]])
    assert numbers == [1, 1, 1]
    assert torch.get_num_threads() == 2


def test_an_error_in_one_of_the_threads_reaches_the_caller(two_threads):
    def refuse(*_):
        raise RuntimeError("out of memory, say")

    model = wavlm("layer")
    model.encoder.layers[1].attention.k_proj.register_forward_hook(refuse)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory, say"):
        fast_hidden_states(model, *batch([16_000, 16_000]), [3])


AFTER_THE_MAIN_THREAD = """
import threading, torch
from modeling_mamba_ema import fast_speech_encoder
from tests.test_fast_speech_encoder import batch, wavlm
fast_speech_encoder.THREADED_WIDTH = 0
torch.set_num_threads(2)
model, main = wavlm("layer"), threading.main_thread()
def work():
    main.join()
    torch.set_num_threads(2)
    with torch.no_grad():
        (states,) = fast_speech_encoder.fast_hidden_states(model, *batch([16_000, 16_000]), [3])
    print(len(states))
threading.Thread(target=work).start()
"""


def test_a_thread_that_outlives_the_main_one_still_gets_its_states():
    result = subprocess.run([sys.executable, "-c", AFTER_THE_MAIN_THREAD], capture_output=True, text=True, timeout=300)
    assert (result.stdout, result.returncode) == ("2\n", 0), result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_no_threads_of_its_parent(two_threads):
    fast_speech_encoder._single_threads(2)
    child = os.fork()
    if child == 0:
        os._exit(fast_speech_encoder._single_threads.cache_info().currsize)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_front_end_works_in_pieces_wherever_nothing_is_kept_for_a_gradient(monkeypatch, norm, mode):
    lengths = []
    convolve = fast_speech_encoder._convolve
    monkeypatch.setattr(fast_speech_encoder, "PIECE_VALUES", 20_000)
    monkeypatch.setattr(
        fast_speech_encoder, "_convolve", lambda *args: lengths.append(len(args[-1])) or convolve(*args)
    )
    with mode():
        fast_hidden_states(wavlm(norm), *batch([16_000]), [1])
    assert (max(lengths) > 15_000) is (mode is torch.enable_grad)


def test_the_norm_over_time_is_right_where_neighbouring_samples_are_nearly_equal():
    model = wavlm("group")
    waveform = (torch.arange(16_000.0) * 0.01).sin() + 1e-3 * torch.randn(16_000, generator=torch.manual_seed(0))
    with torch.no_grad():
        model.feature_extractor.conv_layers[0].conv.weight.copy_(
            torch.randn(24, 1, 10).diff(dim=2, append=torch.zeros(24, 1, 1))
        )
        (features,) = fast_speech_encoder._front_end(model.feature_extractor, [waveform])
        reference = model.double().feature_extractor(waveform[None].double())[0].t()
    torch.testing.assert_close(features.double(), reference, rtol=0, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("norm", NORMS)
def test_weights_changed_after_a_call_are_used_in_the_next(norm):
    model = wavlm(norm)
    waveforms, lengths = batch()
    with torch.inference_mode():
        fast_hidden_states(model, waveforms, lengths, range(4))
    for parameter in model.parameters():
        parameter.data.mul_(1.01)  # the way that leaves no trace in a parameter's version
    with torch.inference_mode():
        states = fast_hidden_states(model, waveforms, lengths, range(4))
        assert largest_difference(states, alone(model, waveforms, lengths)) < 2e-5


@pytest.mark.parametrize("products", [False, True], ids=["attention by torch", "attention by oneDNN"])
@every_kind
def test_half_precision_stays_closer_to_float32_than_the_model_itself_does(monkeypatch, kind, products):
    monkeypatch.setattr(fast_speech_encoder, "_BFLOAT16_PRODUCTS", products)
    model = backbone(kind, "layer")
    waveforms, lengths = batch()
    with torch.inference_mode():
        references = alone(model, waveforms, lengths)
        model.bfloat16()
        states = fast_hidden_states(model, waveforms.bfloat16(), lengths, range(4))
        theirs = alone(model, waveforms.bfloat16(), lengths)
    assert states[0].dtype == torch.bfloat16
    ours = largest_difference(states, references)
    assert ours < 0.1
    assert ours <= max(
        (a.double() - b.double()).abs().max().item() for x, y in zip(theirs, references) for a, b in zip(x, y)
    )


@pytest.mark.parametrize("biased", [False, True])
def test_attention_by_products_in_bfloat16_is_that_of_torch(biased):
    """Random encoders attend almost evenly; here scores are as large as trained ones'."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 4, 50, 16, generator=generator).bfloat16()
    mask = torch.randn(4, 50, 50, generator=generator).bfloat16() if biased else None
    expected = fast_speech_encoder._attend_fused(
        query.float(), key.float(), value.float(), None if mask is None else mask.float(), 0.0
    )
    found = fast_speech_encoder._attend_in_bfloat16(query, key, value, mask, 0.0)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("way")
def test_half_precision_gives_gradients_and_the_states_it_has_without_them(norm, dtype):
    model = wavlm(norm).to(dtype)
    waveforms, lengths = batch(dtype=dtype)
    (states,) = fast_hidden_states(model, waveforms, lengths, [3])
    states.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.encoder.layers.parameters())
    with torch.inference_mode():
        (expected,) = fast_hidden_states(model, waveforms, lengths, [3])
    torch.testing.assert_close(states, expected, rtol=0, atol=0.1)


def test_half_precision_is_right_for_narrow_groups_of_the_position_convolution():
    model = wavlm("layer", num_conv_pos_embedding_groups=4)  # 8 channels a group
    waveforms, lengths = batch()
    with torch.inference_mode():
        references = alone(model, waveforms, lengths)
        states = fast_hidden_states(model.bfloat16(), waveforms.bfloat16(), lengths, range(4))
    assert largest_difference(states, references) < 0.12  # oneDNN of torch 2.8 rounds more often


def test_autocast_computes_products_in_half_precision():
    model = wavlm("layer")
    waveforms, lengths = batch()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        states = fast_hidden_states(model, waveforms, lengths, range(4))
    difference = largest_difference(states, alone(model, waveforms, lengths))
    assert 1e-4 < difference < 0.1


def test_training_settings_apply_and_follow_the_seed():
    model = wavlm(
        "layer",
        layerdrop=0.5,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        feat_proj_dropout=0.1,
    ).train()
    waveforms, lengths = batch()

    def encode(seed):
        torch.manual_seed(seed)
        return fast_hidden_states(model, waveforms, lengths, [3])[0]

    assert torch.equal(encode(1), encode(1))
    assert not torch.equal(encode(1), encode(2))


@pytest.mark.parametrize("setting", ["hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"])
def test_each_dropout_takes_part(setting):
    model = wavlm("layer", **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, setting: 0.5})
    waveforms, lengths = batch()
    evaluated = fast_hidden_states(model, waveforms, lengths, [3])[0]
    assert not torch.allclose(fast_hidden_states(model.train(), waveforms, lengths, [3])[0], evaluated, atol=1e-3)


def test_spec_augment_leaves_short_utterances_alone():
    model = wavlm("layer", apply_spec_augment=True, mask_time_prob=0.5, hidden_dropout=0.0, attention_dropout=0.0)
    model.config.activation_dropout = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    waveforms, lengths = batch([24_000, 9_000])  # 74 frames and 27
    evaluated = fast_hidden_states(model, waveforms, lengths, [0])[0]
    trained = fast_hidden_states(model.train(), waveforms, lengths, [0])[0]
    assert not torch.allclose(trained[0], evaluated[0], atol=1e-3)
    torch.testing.assert_close(trained[1], evaluated[1])


LINEAR_LAYERS = {
    "wavlm": 1 + 3 * 7,  # the projection, and in each layer q, k, v, out, gate and two of the feed-forward part
    "wav2vec2": 1 + 3 * 6,
    "hubert": 1 + 3 * 6,
}


@pytest.mark.parametrize("kind", LINEAR_LAYERS)
def test_every_linear_layer_that_is_not_plain_is_called_and_gives_the_same_numbers(kind):
    """A class of its own stands for adapters and quantised layers; a subclass of the weight for torchao's tensors."""
    model = backbone(kind, "layer").double()
    waveforms, lengths = batch(dtype=torch.float64)
    expected = fast_hidden_states(model, waveforms, lengths, range(4))
    called = set()

    class Wrapped(torch.nn.Module):
        def __init__(self, name, linear):
            super().__init__()
            self.name, self.linear = name, linear

        def forward(self, hidden):
            called.add(self.name)
            return self.linear(hidden)

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, Wrapped(name, module))
    assert is_untouched(model)
    for state, reference in zip(fast_hidden_states(model, waveforms, lengths, range(4)), expected):
        torch.testing.assert_close(state, reference, rtol=0, atol=1e-12)
    assert len(called) == LINEAR_LAYERS[kind]


def test_hooks_on_linear_layers_run_and_change_the_result():
    model = wavlm("layer")
    waveforms, lengths = batch()
    before = fast_hidden_states(model, waveforms, lengths, [3])[0]
    model.encoder.layers[0].attention.v_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert is_untouched(model)
    assert not torch.allclose(fast_hidden_states(model, waveforms, lengths, [3])[0], before, atol=1e-3)


@pytest.mark.parametrize("name", ["", "encoder", "feature_extractor", "encoder.layers.1", "encoder.layer_norm"])
@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_on_modules_that_are_not_called_are_seen(name, register):
    model = wavlm("layer")
    handle = getattr(model.get_submodule(name), f"register_{register}")(lambda *_: None)
    assert not is_untouched(model)
    handle.remove()
    assert is_untouched(model)


@pytest.mark.parametrize("function", [GELUActivation.forward, lambda module, hidden: torch.relu(hidden)])
def test_activations_whose_forward_use_kernels_has_bound_anew_are_called(function):
    """transformers binds the kernel, or where there is none the module's own forward."""
    model = wavlm("layer")
    for module in model.modules():
        if isinstance(module, GELUActivation):
            module.forward = types.MethodType(function, module)
    waveforms, lengths = batch()
    assert is_untouched(model)
    with torch.inference_mode():
        (found,) = fast_hidden_states(model, waveforms, lengths, [3])
        (expected,) = hidden_states_one_by_one(model, waveforms, lengths, [3])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_an_activation_derived_from_gelu_is_called():
    class TwiceGELU(GELUActivation):
        def forward(self, input):
            return 2 * super().forward(input)

    model = wavlm("layer")
    for layer in model.encoder.layers:
        layer.feed_forward.intermediate_act_fn = TwiceGELU()
    waveforms, lengths = batch()
    with torch.inference_mode():
        (found,) = fast_hidden_states(model, waveforms, lengths, [3])
        (expected,) = hidden_states_one_by_one(model, waveforms, lengths, [3])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "norm", [torch.nn.LayerNorm(32, bias=False), torch.nn.RMSNorm(32), torch.nn.Identity()], ids=repr
)
@pytest.mark.parametrize("owner", ["encoder", "encoder.layers.1"])
def test_a_norm_of_another_kind_is_seen(owner, norm):
    model = wavlm("layer")
    model.get_submodule(owner).layer_norm = norm
    assert not is_untouched(model)


@pytest.mark.usefixtures("way")
def test_gates_without_a_bias_get_the_states_of_the_model_run_alone():
    model = wavlm("layer").double()
    for layer in model.encoder.layers:
        layer.attention.gru_rel_pos_linear.bias = None
    waveforms, lengths = batch(dtype=torch.float64)
    with torch.inference_mode():
        states = fast_hidden_states(model, waveforms, lengths, range(4))
        assert largest_difference(states, alone(model, waveforms, lengths)) < 1e-12


def test_global_hooks_are_seen():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not is_untouched(wavlm("layer"))
    finally:
        handle.remove()


def test_an_adapter_in_the_encoder_changes_the_predictions():
    class Doubled(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, hidden):
            return 2 * self.linear(hidden)

    model = tiny_model().eval()
    inputs = {"input_values": torch.randn(1, 8_000)}
    before = model(**inputs).logits
    feed_forward = model.mamba_ema.speech_encoder.backbone.encoder.layers[0].feed_forward
    feed_forward.output_dense = Doubled(feed_forward.output_dense)
    assert (model(**inputs).logits - before).abs().max() > 1e-5


def test_products_without_the_private_operator_are_the_same(monkeypatch):
    model = wavlm("layer")
    waveforms, lengths = batch()
    with torch.inference_mode():
        expected = fast_hidden_states(model, waveforms, lengths, range(4))
        monkeypatch.setattr(fast_speech_encoder, "_FUSED_DTYPES", frozenset())
        for state, reference in zip(fast_hidden_states(model, waveforms, lengths, range(4)), expected):
            torch.testing.assert_close(state, reference, rtol=0, atol=2e-5)


def test_a_copied_model_computes_with_its_own_weights():
    model = wavlm("layer")
    waveforms, lengths = batch()
    with torch.inference_mode():
        original = fast_hidden_states(model, waveforms, lengths, [3])[0]
        changed = copy.deepcopy(model)
        changed.encoder.layers[0].attention.q_proj.weight.mul_(3.0)
        assert not torch.equal(fast_hidden_states(changed, waveforms, lengths, [3])[0], original)
        assert torch.equal(fast_hidden_states(model, waveforms, lengths, [3])[0], original)


LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
}


@pytest.mark.slow
def test_a_wavlm_large_gets_the_same_frames_to_1e_4():
    torch.manual_seed(0)
    model = WavLMModel(WavLMConfig(**LARGE)).eval()
    waveforms, lengths = batch([64_000, 20_000, 97_000])
    with torch.inference_mode():
        (states,) = fast_hidden_states(model, waveforms, lengths, [24])
        for row, length, state in zip(waveforms, lengths.tolist(), states):
            reference = model(row[:length].unsqueeze(0)).last_hidden_state[0]
            assert (state[: len(reference)] - reference).abs().max() < 1e-4


@pytest.mark.slow
def test_a_wavlm_large_predicts_the_same_to_2e_5_and_in_bfloat16_to_1e_2(monkeypatch):
    torch.manual_seed(0)
    config = MambaEMAConfig(speech_encoder_config=LARGE, speech_encoder_pooling="attention")
    model = MambaEMAForRegression(config).eval()
    waveforms, lengths = batch([64_000, 20_000, 97_000])
    inputs = {"input_values": waveforms.nan_to_num(), "attention_mask": torch.arange(97_000) < lengths.unsqueeze(1)}
    with torch.inference_mode():
        fast = model(**inputs).logits
        with monkeypatch.context() as patch:
            patch.setattr(speech_encoder, "is_untouched", lambda backbone: False)
            plain = model(**inputs).logits
        inputs["input_values"] = inputs["input_values"].bfloat16()
        half = model.bfloat16()(**inputs).logits
    assert (fast - plain).abs().max() < 2e-5
    assert (half.float() - plain).abs().max() < 1e-2
