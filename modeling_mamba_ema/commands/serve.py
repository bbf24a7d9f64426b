"""Serve a model by REST and WebSocket, until it is stopped by SIGTERM or Ctrl-C; see docs/serving.md.

Each request must bear the token in the environment variable MAMBA_EMA_TOKEN, if it is set. Without it, only addresses
that no other machine reaches may be listened on.
"""

import argparse
import os

from .model_options import add_model_options, load_tracker, number_between

HELP = "a service: REST for turns and files, WebSocket for live audio"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1, this machine only)")
    parser.add_argument("--port", type=number_between(0, 65_535, int), default=8000, help="0 for a free one (8000)")
    state = os.environ.get("MAMBA_EMA_STATE", "memory")
    parser.add_argument(
        "--state", default=state, metavar="URL", help="redis://...; default: MAMBA_EMA_STATE, or memory"
    )
    add = parser.add_argument_group("limits").add_argument
    count, positive = number_between(1, 10**9, int), number_between(0.001, 1e9)
    wait, grace = number_between(0, 1e6), number_between(0, 10**6, int)
    add("--max-sessions", type=count, default=1024, help="that are kept (1024)")
    add("--session-seconds", type=positive, default=3600, help="that a session is kept after its last turn (3600)")
    add("--max-live", type=count, default=128, help="WebSocket connections at once (128)")
    add("--max-rate", type=positive, default=50, help="requests a second of one address (50)")
    add("--max-megabytes", type=count, default=256, help="size of a file (256)")
    add("--max-batch", type=count, default=16, help="turns in a pass of the model (16); 1: same bits in any company")
    add("--max-wait", type=wait, default=5, help="milliseconds that a turn waits for others to join its pass (5)")
    add("--grace", type=grace, default=30, help="seconds that what was begun may take when the server is stopped (30)")


def run(options: argparse.Namespace) -> int:
    from ..serving import Settings, serve

    settings = Settings(
        token=os.environ.get("MAMBA_EMA_TOKEN") or None,
        max_batch=options.max_batch,
        max_wait=options.max_wait / 1000,
        max_sessions=options.max_sessions,
        session_seconds=options.session_seconds,
        max_live=options.max_live,
        max_rate=options.max_rate,
        max_file_bytes=options.max_megabytes * 2**20,
    )
    serve(load_tracker(options), settings, options.host, options.port, options.state, options.grace)
    return 0
