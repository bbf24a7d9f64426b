"""Publishing: what would be uploaded is shown, what does not belong is refused, and the Hub gets exactly the folder.

The Hub itself cannot be reached from a test. A server on this machine answers the requests that huggingface_hub makes,
so that everything up to the network is the real thing.
"""

import base64
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from huggingface_hub import ModelCard

from modeling_mamba_ema.publishing import files_to_publish, prepare_release
from tests.support.models import tiny_model
from tests.support.tiny_corpus import ROOT, environment, write_corpus, write_run


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    prepare_release(tmp_path / "model")
    return tmp_path / "model"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as creating a repository and committing to it takes; the server keeps what it is sent."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.requests.append((self.path, self.headers.get("Authorization"), content))
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/me/emotions", "id": "me/emotions", "name": "me/emotions"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path == "/api/models/me/emotions/preupload/main":
            files = json.loads(content)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.path == "/api/models/me/emotions/commit/main":
            answer = {"commitUrl": f"{self.server.address}/me/emotions/commit/abc", "commitOid": "abc"}
        else:
            self.send_error(404)
            return
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        there = self.path.removeprefix("/me/emotions/resolve/main/") in self.server.files
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", "abc")
        self.send_header("ETag", '"abc"')
        self.send_header("Content-Length", "1")
        if not there:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.requests, server.files = f"http://127.0.0.1:{server.server_port}", [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def push(*arguments, hub=None, **variables):
    variables = {"HF_ENDPOINT": hub.address if hub else "http://127.0.0.1:9", "HF_TOKEN": "hf_test", **variables}
    return subprocess.run(
        [sys.executable, "-m", "modeling_mamba_ema", "publish", *map(str, arguments)],
        cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def committed(hub):
    (commit,) = [content for path, _, content in hub.requests if path.endswith("/commit/main")]
    lines = [json.loads(line) for line in commit.splitlines()]
    assert {line["key"] for line in lines} == {"header", "file"}
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


def test_a_dry_run_shows_each_file_with_size_and_hash_and_sends_nothing(folder, hub):
    shown = push(folder, "me/emotions", "--dry-run", hub=hub, HF_HUB_OFFLINE="1", HF_TOKEN="")
    assert shown.returncode == 0, shown.stderr
    assert hub.requests == []
    listed = {}
    for line in shown.stdout.splitlines()[:-1]:
        digest, size, name = line.split()
        listed[name] = (digest, int(size.replace(",", "")))
    assert listed == {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size) for path in folder.iterdir()
    }
    assert f"{len(listed)} files" in shown.stdout


def test_the_hub_gets_the_files_of_the_folder_byte_for_byte_in_one_commit(folder, hub):
    done = push(folder, "me/emotions", "--message", "First", hub=hub)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/emotions/commit/abc" in done.stdout
    assert committed(hub) == {path.name: path.read_bytes() for path in folder.iterdir()}
    path, authorization, content = hub.requests[0]
    assert (path, authorization) == ("/api/repos/create", "Bearer hf_test")
    assert b"private" in content


PUSH_A_MODEL = """
import sys
from modeling_mamba_ema import MambaEMAForRegression

model = MambaEMAForRegression.from_pretrained(sys.argv[1]).train()
print(model.push_to_hub("me/emotions", commit_message="From the method", private=True, tags=["mine"]))
assert model.training
"""


def push_by_method(folder, hub):
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-c", PUSH_A_MODEL, str(folder)]
    return subprocess.run(
        command, cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, timeout=200
    )


def test_the_models_own_method_publishes_the_release_with_its_card(folder, hub):
    done = push_by_method(folder, hub)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/emotions/commit/abc" in done.stdout
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
    done = push_by_method(folder, hub)
    assert done.returncode == 0, done.stderr
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


@pytest.mark.slow
def test_a_refusal_ends_the_program_before_anything_is_sent(folder, hub):
    add_pickle(folder)
    for option in ((), ("--dry-run",)):
        refused = push(folder, "me/emotions", *option, hub=hub)
        assert refused.returncode == 1
        assert "weights.bin does not belong to a published model" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert hub.requests == []


@pytest.mark.slow
def test_a_name_that_is_none_is_refused(folder):
    refused = push(folder, "me/emo tions", "--dry-run")
    assert refused.returncode == 1
    assert "me/emo tions" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_hub_that_refuses_is_told_in_a_sentence(folder, hub):
    refused = push(folder, "you/other", hub=hub)
    assert refused.returncode == 1
    assert "the Hub refused" in refused.stderr
    assert "hf auth login" in refused.stderr
    assert "Traceback" not in refused.stderr


def finetune(configuration, *overrides, **variables):
    return subprocess.run(
        [sys.executable, "examples/run_finetune.py", str(configuration), *overrides],
        cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.slow
def test_training_publishes_its_model_at_the_end(tmp_path, hub):
    configuration = write_run(tmp_path / "run.yaml", write_corpus(tmp_path / "corpus"), tmp_path / "run")
    options = ["training.num_train_epochs=1", "training.push_to_hub=true", "training.hub_model_id=me/emotions"]
    done = finetune(configuration, *options, HF_ENDPOINT=hub.address, HF_TOKEN="hf_test")
    assert done.returncode == 0, done.stderr
    assert committed(hub) == {path.name: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()}
    assert os.sep + "checkpoint" not in " ".join(path for path, *_ in hub.requests)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.push_to_hub=true"], "training.push_to_hub needs training.hub_model_id"),
        (["training.push_to_hub=true", "training.hub_model_id=me/emotions"], "and a login: hf auth login"),
    ],
)
def test_training_that_could_not_publish_does_not_begin(tmp_path, options, message):
    configuration = write_run(tmp_path / "run.yaml", tmp_path, tmp_path / "run")
    refused = finetune(configuration, *options, HF_TOKEN="", HF_HOME=str(tmp_path))
    assert refused.returncode == 1
    assert message in refused.stderr
