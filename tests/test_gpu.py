"""On a CUDA GPU: the numbers of the CPU within the dtype's tolerance. Written without a GPU, not run on one yet."""

import copy
import importlib

import pytest
import torch

from modeling_mamba_ema import mamba2
from modeling_mamba_ema.conversation_encoder import ConversationEncoder
from modeling_mamba_ema.fast_speech_encoder import fast_hidden_states
from modeling_mamba_ema.mamba2 import Mamba2
from modeling_mamba_ema.speech_encoder import length_mask

from .support.models import tiny_model
from .test_fast_speech_encoder import NORMS, batch, wavlm

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
every_norm = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture(autouse=True)
def convolutions_in_full_float32(monkeypatch):
    """torch lets cuDNN round a convolution's factors to TF32, which would hide smaller differences."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=0, atol=tolerance)


# The encoder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@every_norm
def test_frames_are_those_of_the_cpu(norm, dtype, tolerance):
    model = wavlm(norm)
    waveforms, lengths = batch()
    with torch.inference_mode():
        expected = fast_hidden_states(model, waveforms, lengths, range(4))
        states = fast_hidden_states(model.to(DEVICE, dtype), *on_device(waveforms.to(dtype), lengths), range(4))
    for state, reference in zip(states, expected):
        assert state.dtype == dtype
        assert_close(state, reference, tolerance)


@every_norm
def test_an_utterance_alone_gets_the_frames_it_gets_in_a_batch(norm):
    model = wavlm(norm).to(DEVICE)
    waveforms, lengths = on_device(*batch())
    with torch.inference_mode():
        (together,) = fast_hidden_states(model, waveforms, lengths, [3])
        for row, length, state in zip(waveforms, lengths, together):
            (alone,) = fast_hidden_states(model, row[None, :length], length[None], [3])
            assert_close(state[: alone.shape[1]], alone[0].cpu(), 1e-4)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@every_norm
def test_autocast_computes_products_in_half_precision(norm, grad):
    model = wavlm(norm)
    waveforms, lengths = batch()
    with torch.set_grad_enabled(grad):
        (expected,) = fast_hidden_states(model, waveforms, lengths, [3])
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            (state,) = fast_hidden_states(model.to(DEVICE), *on_device(waveforms, lengths), [3])
    assert (state.cpu() - expected).abs().max() > 1e-4
    assert_close(state, expected, 0.1)


@every_norm
def test_gradients_are_those_of_the_cpu(norm):
    model = wavlm(norm)
    waveforms, lengths = batch()
    weights = torch.randn(len(lengths), 74, 32)

    def gradients(model, waveforms, lengths, weights):
        states = fast_hidden_states(model, waveforms, lengths, [1, 3])
        sum((state * weights).mean() for state in states).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    found = gradients(copy.deepcopy(model).to(DEVICE), *on_device(waveforms, lengths, weights))
    expected = gradients(model, waveforms, lengths, weights)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-3 * gradient.abs().max().item() + 1e-7)


# The updater


@pytest.mark.skipif(mamba2.mamba_chunk_scan_combined is None, reason="needs mamba-ssm's Triton kernels")
@pytest.mark.parametrize("turns", [2, 64, 130])
def test_the_triton_scan_equals_the_plain_one(monkeypatch, turns):
    """Outputs, states and gradients, from an initial state and with rows that end early."""
    torch.manual_seed(0)
    mixer = Mamba2(d_model=64, d_state=32, d_conv=4, expand=2, headdim=32).to(DEVICE, torch.bfloat16)
    observations = torch.randn(3, turns, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.tensor([turns, turns // 2, 0], device=DEVICE)
    start = [torch.randn_like(part) for part in mixer.initial_state(3, observations.device, torch.float32)]
    valid = length_mask(lengths, turns)

    def run():
        state = mamba2.Mamba2State(*(part.clone().requires_grad_() for part in start))
        output, after = mixer(observations, lengths, state)
        output = output.masked_fill(~valid[..., None], 0.0)
        inputs = [observations, *state, *mixer.parameters()]
        loss = output.float().square().sum() + after.ssm.square().sum() + after.conv.square().sum()
        return [output, *after, *torch.autograd.grad(loss, inputs)]

    found = run()
    monkeypatch.setattr(mamba2, "mamba_chunk_scan_combined", None)
    for tensor, expected in zip(found, run(), strict=True):
        assert_close(tensor, expected.cpu(), 0.02 * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(found[2][2], start[1][2], rtol=1e-5, atol=1e-6)  # a row without turns keeps its state


def test_a_float32_updater_does_not_run_in_tf32(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the kernel would round float32 to TF32")

    monkeypatch.setattr(mamba2, "mamba_chunk_scan_combined", refuse)
    mixer = Mamba2(d_model=64, d_state=32, d_conv=4, expand=2, headdim=32)
    observations, lengths = torch.randn(2, 70, 64), torch.tensor([70, 30])
    expected, _ = mixer(observations, lengths)
    output, _ = mixer.to(DEVICE)(*on_device(observations, lengths))
    assert_close(output[0], expected[0], 1e-4)


def test_a_step_as_a_cuda_graph_equals_the_eager_one(monkeypatch):
    if DEVICE != "cuda":
        pytest.skip("needs a CUDA GPU")
    monkeypatch.syspath_prepend("benchmarks")
    captured_step = importlib.import_module("bench_gpu").captured_step
    torch.manual_seed(0)
    encoder = ConversationEncoder(32, "mamba_ema", 2, 16, 4, 2, 16, 0.8, False, 0.0).to(DEVICE).eval()
    observation, mask = torch.zeros(2, 1, 32, device=DEVICE), torch.ones(2, 1, device=DEVICE).bool()
    with torch.inference_mode():
        state = encoder.initial_state(2, observation.device, torch.float32)
        graph, context = captured_step(encoder, observation, mask, state)
        for tensor in state.state_dict().values():
            tensor.zero_()
        eager = None
        for turn in torch.randn(5, 2, 1, 32, device=DEVICE):
            expected, eager = encoder(turn, mask, eager)
            observation.copy_(turn)
            graph.replay()
            assert_close(context, expected.cpu(), 1e-5)
    for name, tensor in eager.state_dict().items():
        assert_close(state.state_dict()[name], tensor.cpu(), 1e-5)


# The whole model


def conversations():
    """Two conversations, three turns and two, of different lengths."""
    samples = torch.tensor([[16_000, 9_000, 4_000], [800, 12_000, 0]])
    mask = torch.arange(16_000) < samples.unsqueeze(-1)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, 16_000, generator=generator).masked_fill(~mask, 0.0), mask.long()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@every_norm
def test_a_model_predicts_what_it_predicts_on_the_cpu(norm, dtype, tolerance):
    model = tiny_model(norm)
    waveforms, mask = conversations()
    labels = torch.rand(2, 3, 2)
    with torch.inference_mode():
        expected = model(waveforms, mask, labels=labels)
        waveforms, mask, labels = on_device(waveforms, mask, labels)
        outputs = model.to(DEVICE, dtype)(waveforms, mask, labels=labels)
    there = torch.tensor([[True, True, True], [True, True, False]])
    assert outputs.logits[~there].isnan().all()
    assert_close(outputs.logits[there], expected.logits[there], tolerance)
    assert_close(outputs.pooling_attentions, expected.pooling_attentions, tolerance)
    assert_close(outputs.loss, expected.loss, 10 * tolerance)


def test_a_stream_stays_on_the_device_and_equals_the_whole_conversation_and_the_cpu():
    model = tiny_model()
    waveforms, _ = conversations()
    with torch.inference_mode():
        expected = model(waveforms, use_conversation_state=True)
        model.to(DEVICE)
        whole = model(waveforms.to(DEVICE)).logits
        state = None
        for number, turn in enumerate(waveforms.to(DEVICE).unbind(dim=1)):
            outputs = model(turn, conversation_state=state, use_conversation_state=True)
            state = outputs.conversation_state
            assert {tensor.device.type for tensor in state.state_dict().values()} == {DEVICE}
            assert_close(outputs.logits, whole[:, number].cpu(), 1e-4)
            assert_close(outputs.logits, expected.logits[:, number], 1e-4)
        for name, tensor in expected.conversation_state.state_dict().items():
            assert_close(state.state_dict()[name], tensor, 1e-3)


def test_a_state_of_another_device_is_refused_until_it_is_moved():
    model = tiny_model().to(DEVICE)
    turn = torch.randn(1, 8_000, device=DEVICE)
    with torch.inference_mode():
        state = model(turn, use_conversation_state=True).conversation_state.to("cpu")
        if DEVICE != "cpu":
            with pytest.raises(ValueError, match=r"conversation_state is on cpu"):
                model(turn, conversation_state=state)
        assert model(turn, conversation_state=state.to(DEVICE)).logits.isfinite().all()


def test_a_training_step_gives_the_gradients_of_the_cpu():
    model = tiny_model()
    waveforms, mask = conversations()
    labels = torch.rand(2, 3, 2)
    moved = copy.deepcopy(model).to(DEVICE)
    model(waveforms, mask, labels=labels).loss.backward()
    moved(**dict(zip(["input_values", "attention_mask", "labels"], on_device(waveforms, mask, labels)))).loss.backward()
    found = dict(moved.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(found[name].grad, parameter.grad, 1e-3 * parameter.grad.abs().max().item() + 1e-6)
