"""Scoring on a Ray cluster: the files that one process writes, whatever is killed."""

import json

import numpy as np
import psutil
import pytest
import soundfile as sf

pytest.importorskip("ray", reason="needs its extra: pip install '.[cluster]'")

from ray.cluster_utils import Cluster

from modeling_mamba_ema.inference.scoring import ScoringOptions
from modeling_mamba_ema.integrations.ray_data import ScoringActor
from tests.support.programs import HANGS, call_command, free_port, start_program, wait_until


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A corpus of 120 conversations of three turns."""
    folder, random, rows = tmp_path_factory.mktemp("many"), np.random.default_rng(0), []
    for conversation in range(120):
        for turn in range(3):
            name = f"{conversation}_{turn}.wav"
            sf.write(folder / name, random.normal(0, 0.1, random.integers(8_000, 48_000)).clip(-1, 1), 16_000)
            rows.append({"file_name": name, "conversation_id": conversation, "turn": turn, "speaker": "ab"[turn % 2]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def actors_of(cluster):
    """The processes that score, by the machine that they run on."""
    found = {}
    for node in cluster.list_all_nodes():
        (raylet,) = node.all_processes["raylet"]
        children = psutil.Process(raylet.process.pid).children()
        found[node] = [child for child in children if child.name().startswith("ray::MapWorker")]
    return found


@pytest.mark.slow
def test_two_machines_write_what_one_process_writes_although_a_process_and_a_machine_are_killed(
    saved_model, many, tmp_path
):
    command = ["score", "--model", saved_model, many, "--rows-per-part", "3", "--output"]
    assert call_command(*command, tmp_path / "local") == 0
    machine = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    try:
        second = cluster.add_node(**machine)
        on_ray = ["-m", "modeling_mamba_ema", *command, tmp_path / "ray", "--ray", cluster.address]
        running = start_program(*on_ray)

        def are_there(count):
            return len(list(tmp_path.glob("ray/part-*.parquet"))) >= count and all(actors_of(cluster).values())

        wait_until(lambda: are_there(20), running)
        actors_of(cluster)[cluster.head_node][0].kill()
        wait_until(lambda: are_there(40), running)
        assert running.poll() is None
        cluster.remove_node(second, allow_graceful=False)
        _, errors = running.communicate(timeout=HANGS)
        assert running.returncode == 0, errors
        assert content(tmp_path / "ray") == content(tmp_path / "local")
        (tmp_path / "ray" / "part-00007.parquet").unlink()
        assert call_command(*command, tmp_path / "ray", "--ray", cluster.address) == 0
        assert content(tmp_path / "ray") == content(tmp_path / "local")
    finally:
        cluster.shutdown()


def test_no_cluster_is_one_line_at_once(saved_model, many, tmp_path, capsys):
    address = f"127.0.0.1:{free_port()}"
    assert call_command("score", "--model", saved_model, many, "--output", tmp_path, "--ray", address) == 1
    assert f"mamba-ema: no Ray cluster answers at {address}: " in capsys.readouterr().err


def test_a_machine_with_other_weights_scores_nothing(saved_model):
    with pytest.raises(ValueError, match="has other weights than where the run was started"):
        ScoringActor(ScoringOptions(str(saved_model)), "0" * 64, "cpu")
