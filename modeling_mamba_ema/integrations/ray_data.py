"""Scoring on a Ray cluster (https://docs.ray.io/en/latest/data/data.html): parts go to actors that hold the model.

Ray starts the actors, hands out the parts, restarts an actor that was killed and hands its parts to it or to another.
A part that is scored twice is the same file.
"""

import json
import logging
import platform
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..inference.scoring import ScoringOptions, Task, score_to_file

try:
    import ray
except ImportError as error:
    raise ImportError("a Ray cluster needs ray: pip install 'modeling-mamba-ema[cluster]'") from error


class ScoringActor:
    """Scores parts with a model that is loaded once."""

    def __init__(self, options: ScoringOptions, weights: str, device: str):
        self._options, self._tracker = options, options.tracker(device)
        if self._tracker.weights_sha256 != weights:
            raise ValueError(f"{options.model} on {platform.node()} has other weights than where the run was started")

    def __call__(self, tasks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        turns = [
            score_to_file(self._tracker, self._options, json.loads(turns), path)
            for turns, path in zip(tasks["turns"], tasks["path"])
        ]
        return {"turns": np.array(turns)}


def score_on_ray(tasks: Iterator[Task], options: ScoringOptions, weights: str, address: str) -> Iterator[int]:
    """Score parts on a cluster; yields how many turns each finished part has. Raises `OSError` for no cluster, or one
    that gave up."""
    todo = [{"turns": json.dumps(turns), "path": path} for turns, path in tasks]
    if not todo:
        return
    try:
        host, _, port = address.rpartition(":")
        if host and "://" not in address:  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actors = gpus or int(ray.cluster_resources()["CPU"])
        resources: Any
        device, resources = ("cuda", {"num_gpus": 1}) if gpus else ("cpu", {"num_cpus": 1})
        # A block a part: what is handed out, and handed out again.
        dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            ScoringActor,
            batch_size=1,
            fn_constructor_args=(options, weights, device),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(actors, len(todo))),
            **resources,
        )
        for row in dataset.iter_rows():
            yield int(row["turns"])
    except ray.exceptions.RayError as error:  # its last line is the reason, those before are its own insides
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"Ray gave up ({reason}); the same command goes on where it was") from error
    except OSError as error:
        raise OSError(f"no Ray cluster answers at {address}: {error}") from error
    finally:
        ray.shutdown()
