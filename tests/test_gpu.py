"""On a CUDA GPU: the numbers of the CPU within the dtype's tolerance, and the programs that find the GPU."""

import copy
import importlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import pipeline

from modeling_mamba_ema import MambaEMAPipeline, mamba2
from modeling_mamba_ema.audio_files import load_audio
from modeling_mamba_ema.conversation_encoder import ConversationEncoder
from modeling_mamba_ema.fast_speech_encoder import fast_hidden_states
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.mamba2 import Mamba2
from modeling_mamba_ema.speech_encoder import length_mask

from .support.models import NO_DROPOUT, tiny_model
from .support.programs import call_command, call_program, free_port, run_program
from .support.runs import FINETUNE
from .support.tiny_corpus import write_run
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


def test_the_triton_scan_equals_the_plain_one(monkeypatch):
    """Outputs, states and gradients, from an initial state and with rows that end early, in three chunks.

    Triton compiles for more than a minute. The kernel is put where `use_kernels=True` puts it.
    """
    kernel = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    turns = 130
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

    plain = run()
    monkeypatch.setattr(mamba2, "chunk_scan", kernel)
    found = run()
    for tensor, expected in zip(found, plain, strict=True):
        assert_close(tensor, expected.cpu(), 0.02 * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(found[2][2], start[1][2], rtol=1e-5, atol=1e-6)  # a row without turns keeps its state


def test_a_float32_updater_does_not_run_in_tf32(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the kernel would round float32 to TF32")

    monkeypatch.setattr(mamba2, "chunk_scan", refuse)
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


# Live use and scoring


@pytest.fixture(scope="module")
def files(corpus):
    return sorted(corpus.glob("test_*.wav"))


def heard_by(tracker, files):
    return [list(tracker.update(load_audio(path), 16_000, speaker=str(path)[-5]).values.values()) for path in files]


def test_a_tracker_gives_the_values_of_the_cpu_and_its_state_moves_between_devices(saved_model, files):
    here, there = (EmotionTracker.from_pretrained(saved_model, device=device) for device in ("cpu", DEVICE))
    np.testing.assert_allclose(heard_by(there, files[:4]), heard_by(here, files[:4]), atol=1e-4)
    other = EmotionTracker.from_pretrained(saved_model, device="cpu")
    other.restore_bytes(there.state_bytes())
    there.restore_bytes(there.state_bytes())
    expected = heard_by(here, files[4:])
    np.testing.assert_allclose(heard_by(other, files[4:]), expected, atol=1e-4)
    np.testing.assert_allclose(heard_by(there, files[4:]), expected, atol=1e-4)


def test_conversations_heard_in_one_pass_get_the_values_of_each_alone(saved_model, files):
    trackers = [EmotionTracker.from_pretrained(saved_model, device=DEVICE)]
    trackers += [EmotionTracker(trackers[0].model, trackers[0].feature_extractor) for _ in files[1:4]]
    alone = EmotionTracker(trackers[0].model, trackers[0].feature_extractor)
    turns = [load_audio(path) for path in files[:4]]
    for _ in range(2):  # the first and the second turn of each
        together = EmotionTracker.update_batch([(own, turn, None) for own, turn in zip(trackers, turns)], 16_000)
    for found, turn in zip(together, turns):
        alone.reset()
        alone.update(turn, 16_000)
        expected = list(alone.update(turn, 16_000).values.values())
        np.testing.assert_allclose(list(found.values.values()), expected, atol=1e-4)


def test_a_pipeline_on_the_gpu_answers_as_one_on_the_cpu(saved_model, files):
    one, other = (
        pipeline("audio-classification", model=str(saved_model), pipeline_class=MambaEMAPipeline, device=device)
        for device in ("cpu", DEVICE)
    )
    for path in files[:2]:
        for found, expected in zip(other(load_audio(path)), one(load_audio(path)), strict=True):
            assert found["label"] == expected["label"]
            assert found["score"] == pytest.approx(expected["score"], abs=1e-4)


def test_8_bits_are_refused_on_a_gpu(saved_model):
    if DEVICE == "cpu":
        pytest.skip("needs a CUDA GPU")
    with pytest.raises(ValueError, match="on a CPU"):
        EmotionTracker.from_pretrained(saved_model, device=DEVICE, int8=True)


def test_a_corpus_is_scored_on_the_gpu_without_being_told(saved_model, corpus, tmp_path):
    command = ["score", "--model", saved_model, corpus, "--output"]
    assert call_command(*command, tmp_path / "cpu", "--workers", "1") == 0
    assert call_command(*command, tmp_path / "gpu") == 0
    expected, found = (
        pd.concat(pd.read_parquet(path) for path in sorted((tmp_path / where).glob("part-*.parquet")))
        for where in ("cpu", "gpu")
    )
    pd.testing.assert_frame_equal(found, expected, atol=1e-3, rtol=0)


# Training


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Runs of the fine-tuning program on the tiny encoder that ships, by name."""
    folder = tmp_path_factory.mktemp("trained")
    options = {
        "frozen": ["model.params.freeze_speech_encoder=true", "data.cache_frames=true"],
        "full": ["training.bf16=true", "training.gradient_checkpointing=true"],
        "lora": ["training.bf16=true", "training.lora={r: 4}", "training.gradient_checkpointing=true"],
    }
    for name, changes in options.items():
        run = yaml.safe_load(write_run(folder / f"{name}.yaml", corpus, folder / name).read_text())
        run["model"]["pretrained_speech_encoder"] = "tiny"
        del run["model"]["params"]["speech_encoder_config"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))
        assert call_program(FINETUNE, folder / f"{name}.yaml", "training.num_train_epochs=2", *changes) == 0
    return folder


@pytest.mark.parametrize(("name", "tolerance"), [("frozen", 1e-3), ("full", 0.02), ("lora", 0.02)])
def test_a_run_on_the_gpu_leaves_a_model_that_gives_its_predictions_on_the_cpu(
    trained, corpus, name, tolerance, tmp_path
):
    table = pd.read_csv(trained / name / "predictions_test.csv")
    command = ["score", "--model", trained / name / "model", corpus, "--split", "test", "--output", tmp_path]
    assert call_command(*command, "--workers", "1") == 0
    scored = pd.concat(pd.read_parquet(path) for path in tmp_path.glob("part-*.parquet"))
    for label in ("valence", "arousal"):
        expected = table[table["label"] == label].set_index("file_name")["prediction"]
        expected.index = [path.rpartition("/")[2] for path in expected.index]
        own = scored.set_index(scored["file_name"].str.rpartition("/")[2])[label]
        np.testing.assert_allclose(own[expected.index], expected, atol=tolerance)
    assert json.loads((trained / name / "results.json").read_text())["test"]["num_turns"] == 10


def test_sharded_training_starts_on_one_gpu_and_leaves_the_model_of_a_plain_run(corpus, tmp_path):
    if DEVICE == "cpu":
        pytest.skip("needs a CUDA GPU")
    plain, sharded = (write_run(tmp_path / f"{name}.yaml", corpus, tmp_path / name) for name in ("plain", "sharded"))
    encoder = "model.params.speech_encoder_config"
    options = ["training.num_train_epochs=1", "model.params.dropout=0", *(f"{encoder}.{name}=0" for name in NO_DROPOUT)]
    launch = ["-m", "accelerate.commands.launch", "--config_file"]
    for path, configuration in ((plain, "one_gpu"), (sharded, "fsdp")):
        own = ["--num_processes", 1, "--main_process_port", free_port()]
        file = f"configuration/accelerate/{configuration}.yaml"
        run_program(*launch, file, *own, FINETUNE, path, *options, CUDA_VISIBLE_DEVICES="0")
    tables = [pd.read_csv(path.with_suffix("") / "predictions_test.csv") for path in (plain, sharded)]
    np.testing.assert_allclose(tables[1]["prediction"], tables[0]["prediction"], atol=0.02)
