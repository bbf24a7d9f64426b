"""Scoring from and to S3, by s3fs and a server on this machine that speaks S3 (moto)."""

import os
import signal
import sys

import pandas as pd
import pytest

from modeling_mamba_ema.inference.scoring import ScoringOptions, read_corpus, score_corpus
from tests.support.programs import HANGS, call_command, free_port, start_program, wait_until

BAD = {"bucket/corpus/test_0_0.wav": None, "bucket/corpus/test_1_1.wav": b"no sound"}  # last turns


@pytest.fixture(scope="module")
def endpoint():
    why = "needs an S3 server and client: pip install s3fs 'moto[server]'"
    moto = pytest.importorskip("moto.server", reason=why)
    pytest.importorskip("s3fs", reason=why)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(endpoint, corpus, monkeypatch):
    """A client of a server that holds the corpus, without one file and with one that is damaged."""
    import s3fs

    variables = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    variables |= dict.fromkeys(["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"], os.devnull)
    variables |= {"AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = s3fs.S3FileSystem()
    if client.exists("bucket"):
        client.rm("bucket", recursive=True)
    client.mkdir("bucket")
    for path in corpus.iterdir():
        client.pipe_file(f"bucket/corpus/{path.name}", BAD.get(f"bucket/corpus/{path.name}") or path.read_bytes())
    client.rm("bucket/corpus/test_0_0.wav")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()


def test_rows_are_those_of_local_files_also_after_a_kill(s3, saved_model, corpus, tmp_path, capsys):
    command = ["score", "--model", saved_model, "s3://bucket/corpus", "--output", "s3://bucket/scores"]
    command += ["--rows-per-part", "10"]
    running = start_program("-m", "modeling_mamba_ema", *command)
    wait_until(lambda: parts(s3), running)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate(timeout=HANGS)
    assert call_command(*command, "--workers", "2") == 0
    turns = read_corpus(str(corpus))
    assert f"{len(turns)} turns in s3://bucket/scores, 2 of them without values" in capsys.readouterr().out
    score_corpus(turns, tmp_path, ScoringOptions(str(saved_model), rows_per_part=10))
    wanted = pd.concat([pd.read_parquet(path) for path in sorted(tmp_path.glob("part-*"))], ignore_index=True)
    before = parts(s3)
    rows = pd.concat([pd.read_parquet(s3.open(part)) for part in before], ignore_index=True)
    names = wanted["file_name"].str.replace(str(corpus), "s3://bucket/corpus")
    assert list(rows["file_name"]) == list(names)
    bad = names.isin([f"s3://{name}" for name in BAD])
    assert list(rows["error"].notna()) == list(bad)
    assert rows["error"][bad].iloc[0] == "s3://bucket/corpus/test_0_0.wav does not exist"
    pd.testing.assert_frame_equal(rows[~bad].drop(columns="file_name"), wanted[~bad].drop(columns="file_name"))
    # In one process, whose client may remember what it listed while others wrote.
    s3.rm("bucket/scores/part-00002.parquet")
    assert call_command(*command) == 0
    after = parts(s3)
    assert [part for part in after if after[part] != before[part]] == ["bucket/scores/part-00002.parquet"]


def parts(client):
    """Each part with the time when it was written."""
    client.invalidate_cache()
    found = client.glob("bucket/scores/part-*.parquet", detail=True)
    return {path: facts["LastModified"] for path, facts in sorted(found.items())}


def test_tables_name_files_in_a_bucket(s3, tmp_path):
    whole = read_corpus("s3://bucket/corpus")
    for table in (tmp_path / "files.csv", "s3://bucket/tables/files.parquet"):
        (whole.to_csv if str(table).endswith("csv") else whole.to_parquet)(table, index=False)
        read = read_corpus(str(table))
        assert read[["file_name", "conversation_id"]].equals(whole[["file_name", "conversation_id"]])
    s3.pipe_file("bucket/parts/train/metadata.csv", b"file_name,conversation_id,turn\na.wav,one,0\nb.wav,one,1\n")
    s3.pipe_file("bucket/parts/test/metadata.csv", b"file_name,conversation_id,turn\nc.wav,one,0\n")
    parts = read_corpus("s3://bucket/parts")
    assert sorted(parts["file_name"]) == [f"s3://bucket/parts/{name}.wav" for name in ("test/c", "train/a", "train/b")]
    assert parts["conversation_id"].nunique() == 2


@pytest.mark.parametrize(
    ("source", "output", "variables", "message"),
    [
        (
            "s3://no-bucket/corpus",
            "s3://bucket/scores",
            {},
            "s3://no-bucket/corpus cannot be found: The ",
        ),
        ("s3://bucket/nothing", "s3://bucket/scores", {}, "s3://bucket/nothing holds neither audio files"),
        ("s3://bucket/corpus", "s3://no-bucket/scores", {}, "s3://no-bucket/scores cannot be found: "),
        (
            "s3://bucket/corpus",
            "s3://bucket/scores",
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "s3://bucket/corpus cannot be used: Unable to locate credentials",
        ),
        (
            "s3://bucket/corpus",
            "s3://bucket/scores",
            {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"},
            "s3://bucket/corpus cannot be used: Could not connect to the endpoint",
        ),
    ],
)
def test_what_cannot_be_reached_is_named(s3, saved_model, monkeypatch, capsys, source, output, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    s3.clear_instance_cache()
    assert call_command("score", "--model", saved_model, source, "--output", output) == 1
    assert f"mamba-ema: {message}" in capsys.readouterr().err
    monkeypatch.undo()
    assert not s3.exists("no-bucket")


def test_wrong_credentials_are_named(s3, saved_model, monkeypatch, capsys):
    from moto import settings

    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    assert call_command("score", "--model", saved_model, "s3://bucket/corpus", "--output", "s3://bucket/scores") == 1
    assert "s3://bucket/corpus cannot be used: The AWS Access Key Id you provided" in capsys.readouterr().err


def test_without_a_client_the_line_that_installs_it_is_named(saved_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert call_command("score", "--model", saved_model, "gs://bucket/corpus", "--output", tmp_path) == 1
    message = "gs://bucket/corpus: Please install gcsfs to access Google Storage; s3:// needs `pip install s3fs`, gs://"
    assert message in capsys.readouterr().err
