"""Publishing: what would be uploaded is shown, what does not belong is refused, and the Hub gets exactly the folder.

The Hub itself cannot be reached from a test. A server on this machine answers the requests that huggingface_hub makes,
so that everything up to the network is the real thing.
"""

import base64
import hashlib
import json
import pickle
import shutil

import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load

from modeling_mamba_ema import MambaEMAForRegression
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.modeling_mamba_ema import has_adapters
from modeling_mamba_ema.publishing import files_to_publish
from modeling_mamba_ema.training import add_lora, merge_lora
from tests.support.local_hub import hub_that_takes_a_model
from tests.support.models import tiny_model
from tests.support.programs import call_command, call_program
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import LABELS, make_trainer, write_run


@pytest.fixture
def folder(release, tmp_path):
    return shutil.copytree(release, tmp_path / "model")


@pytest.fixture
def hub(monkeypatch):
    with hub_that_takes_a_model() as server:
        real = constants.ENDPOINT
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        # Clients are kept by those who made them: each asks this server while it stands, and the real Hub afterwards.
        everywhere = property(lambda client: server.address, lambda client, _: vars(client).update(endpoint=real))
        monkeypatch.setattr(HfApi, "endpoint", everywhere, raising=False)
        url = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


def committed(hub):
    (commit,) = [content for path, _, content in hub.requests if path.endswith("/commit/main")]
    lines = [json.loads(line) for line in commit.splitlines()]
    assert {line["key"] for line in lines} == {"header", "file"}
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


def test_a_dry_run_shows_each_file_with_size_and_hash_and_sends_nothing(folder, hub, capsys):
    assert call_command("publish", folder, "me/emotions", "--dry-run") == 0
    assert hub.requests == []
    *lines, last = capsys.readouterr().out.splitlines()
    listed = {}
    for line in lines:
        digest, size, name = line.split()
        listed[name] = (digest, int(size.replace(",", "")))
    assert listed == {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size) for path in folder.iterdir()
    }
    assert f"{len(listed)} files" in last


def test_the_hub_gets_the_files_of_the_folder_byte_for_byte_in_one_commit(folder, hub, capsys):
    assert call_command("publish", folder, "me/emotions", "--message", "First") == 0
    assert f"{hub.address}/me/emotions/commit/abc" in capsys.readouterr().out
    assert committed(hub) == {path.name: path.read_bytes() for path in folder.iterdir()}
    path, authorization, content = hub.requests[0]
    assert (path, authorization) == ("/api/repos/create", "Bearer hf_test")
    assert b"private" in content


def push_by_method(folder):
    model = MambaEMAForRegression.from_pretrained(folder).train()
    address = model.push_to_hub("me/emotions", commit_message="From the method", private=True, tags=["mine"])
    assert model.training
    return address


def test_the_models_own_method_publishes_the_release_with_its_card(folder, hub):
    assert push_by_method(folder) == f"{hub.address}/me/emotions/commit/abc"
    files = committed(hub)
    assert set(files) == {path.name for path in folder.iterdir()}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "audio-classification"
    assert "mine" in card.data.tags
    assert "unpleasant" in card.text
    assert "[More Information Needed]" not in card.text


def test_a_card_that_the_repository_has_is_kept(folder, hub):
    hub.files.add("README.md")
    push_by_method(folder)
    assert set(committed(hub)) == {path.name for path in folder.iterdir()} - {"README.md"}


def add_pickle(folder):
    (folder / "weights.bin").write_bytes(pickle.dumps({}))


def add_training_arguments(folder):
    torch.save({}, folder / "training_args.bin")


def add_checkpoint(folder):
    (folder / "checkpoint-7").mkdir()


def add_hidden_file(folder):
    (folder / ".env").write_text("TOKEN=secret")


def add_state(folder):
    (folder / "trainer_state.json").write_text("{}")


def add_link(folder):
    (folder / "extra.py").symlink_to(folder / "mamba2.py")


def lose_weights(folder):
    (folder / "model.safetensors").unlink()


def lose_card(folder):
    (folder / "README.md").unlink()


def change_code(folder):
    (folder / "mamba2.py").write_text("import os")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_pickle, "weights.bin does not belong"),
        (add_training_arguments, "training_args.bin does not belong"),
        (add_checkpoint, "checkpoint-7/ does not belong"),
        (add_hidden_file, r"\.env does not belong"),
        (add_state, "trainer_state.json does not belong"),
        (add_link, "extra.py is a link"),
        (lose_weights, r"there is no model\*\.safetensors"),
        (lose_card, "there is no README.md"),
        (change_code, "mamba2.py is damaged"),
    ],
)
def test_a_folder_with_anything_else_is_refused(folder, change, message):
    files_to_publish(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        files_to_publish(folder)


def test_a_refusal_ends_the_program_before_anything_is_sent(folder, hub, capsys):
    add_pickle(folder)
    for options in ((), ("--dry-run",)):
        assert call_command("publish", folder, "me/emotions", *options) == 1
        assert "weights.bin does not belong to a published model" in capsys.readouterr().err
    assert hub.requests == []


def test_a_hub_that_refuses_is_a_sentence_with_a_way_out(folder, hub, capsys):
    assert call_command("publish", folder, "you/other") == 1
    message = capsys.readouterr().err
    assert "the Hub refused" in message
    assert "hf auth login" in message


def test_training_publishes_its_model_at_the_end(corpus, tmp_path, hub):
    configuration = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    options = ["training.num_train_epochs=1", "training.push_to_hub=true", "training.hub_model_id=me/emotions"]
    assert call_program(FINETUNE, configuration, *options) == 0
    assert committed(hub) == {path.name: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()}
    assert not any("checkpoint" in path for path, *_ in hub.requests)


@pytest.fixture
def trained(corpus, tmp_path):
    """A trainer that was told to push, after two steps and an evaluation; WavLM is adapted by LoRA."""
    dataset = ConversationDataset(load_emotion_dataset(corpus, LABELS)["train"], LABELS)
    model = tiny_model()
    add_lora(model, {"r": 2}, "microsoft/wavlm-large", "main")
    trainer = make_trainer(tmp_path / "run", dataset, model, push_to_hub=True, hub_model_id="me/emotions",
                           learning_rate=0.01, eval_strategy="steps", eval_steps=1, save_strategy="steps",
                           save_steps=1)  # fmt: skip
    trainer.train()
    return trainer


def test_the_trainer_publishes_a_release_of_the_merged_model_and_never_a_checkpoint(hub, trained, release, tmp_path):
    assert [path for path, *_ in hub.requests] == ["/api/repos/create"]
    facts = {"dataset": "MSP-Podcast", "license": "mit", "language": "en", "finetuned_from": "microsoft/wavlm-large"}
    assert trained.push_to_hub(tags="mine", **facts) == f"{hub.address}/me/emotions/commit/abc"
    files = committed(hub)
    assert set(files) == {path.name for path in release.iterdir()}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.language) == ("microsoft/wavlm-large", "mit", ["en"])
    trained.create_model_card(tags="mine", model_name="Emotions", **facts)
    for again in (card, ModelCard.load(tmp_path / "run" / "README.md")):
        assert "mine" in again.data.tags
        assert "unpleasant" in again.text
    evaluations = [entry["eval_ccc"] for entry in trained.state.log_history if "eval_ccc" in entry]
    result = card.data.eval_results[-1]
    assert (result.dataset_name, result.metric_value) == ("MSP-Podcast", round(evaluations[-1], 4))
    published = load(files["model.safetensors"])
    assert not any("lora" in name for name in published)
    assert has_adapters(trained.model)  # the trainer's own model stays as it was
    with pytest.raises(ValueError, match="merge them first"):
        trained.model.push_to_hub("me/emotions")
    with pytest.raises(ValueError, match="blocking=False"):
        trained.push_to_hub(blocking=False)
    merge_lora(trained.model)
    assert all(torch.equal(weight, published[name]) for name, weight in trained.model.state_dict().items())


def test_a_model_in_8_bits_is_refused_before_a_repository_is_made(monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("a repository was made"))
    with pytest.raises(ValueError, match="8 bits; push the model before"):
        tiny_model().quantize_speech_encoder().push_to_hub("me/emotions")


def test_transformers_own_adapters_are_merged_before_they_are_published(hub):
    model, speech = tiny_model(), torch.randn(1, 4_000, generator=torch.Generator().manual_seed(0))
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "out_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"the model has adapters; merge them first \(.*merge_lora\)"):
        model.push_to_hub("me/emotions")
    with torch.no_grad():
        adapted = model(speech).logits
        merge_lora(model)
        torch.testing.assert_close(model(speech).logits, adapted, atol=1e-5, rtol=0)
    model.push_to_hub("me/emotions")
    assert load(committed(hub)["model.safetensors"]).keys() == tiny_model().state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.push_to_hub=true"], "training.push_to_hub needs training.hub_model_id"),
        (["training.push_to_hub=true", "training.hub_model_id=me/emotions"], "and a login: hf auth login"),
    ],
)
def test_training_that_could_not_publish_does_not_begin(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert call_program(FINETUNE, write_run(tmp_path / "run.yaml", tmp_path, tmp_path / "run"), *options) == 1
    assert message in capsys.readouterr().err
