"""Running the service until it is stopped."""

import asyncio
import socket
import sys
from ipaddress import ip_address
from typing import Any

import uvicorn

from ..inference import EmotionTracker
from .app import build_app
from .errors import Refusal
from .service import Service, Settings

MAX_FRAME_BYTES = 256 * 2**10  # of a WebSocket; 8 s of 16 kHz
MAX_CONNECTIONS = 1024


def serve(
    tracker: EmotionTracker,
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    state: str = "memory",
    grace: int = 30,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C; what was begun by then is finished.

    Args:
        tracker: one that has heard nothing.
        host: address to listen on; one that other machines reach needs `settings.token`.
        port: 0 for a free one; the address is printed once it is listened on.
        state: "memory", or the URL of a Redis.
        grace: seconds that what was begun may take after the signal.

    Raises:
        ValueError: an address that other machines reach, without a token, or no port.
        OSError: the port is taken, the address is not this machine's, or Redis cannot be reached.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"there is no port {port}; ports are 1 to 65535, or 0 for a free one")
    if settings.token is None and not is_loopback(host):
        raise ValueError(f"{host} can be reached by other machines; set a token in the variable MAMBA_EMA_TOKEN")
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        asyncio.run(_serve(Service(tracker, settings, state), listening, grace))


async def _serve(service: Service, listening: socket.socket, grace: int) -> None:
    try:
        await service.sessions.count()
    except Refusal as error:
        raise OSError(str(error)) from error
    config = uvicorn.Config(
        build_app(service),
        log_level="warning",
        access_log=False,  # addresses hold names of sessions and speakers
        server_header=False,
        proxy_headers=False,
        ws="websockets-sansio",
        ws_max_size=MAX_FRAME_BYTES,
        ws_per_message_deflate=False,  # a small frame could become a large one
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=grace,
    )
    host, port = listening.getsockname()[:2]
    print(f"mamba-ema: serving on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
    await _Server(config, service, grace).serve(sockets=[listening])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(uvicorn.Server):
    """Lets live connections send the turn that is being spoken before they are closed."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
        self._service, self._grace, self._loop = service, grace, asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._service.stopping.is_set():  # the second signal
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._stop()))

    async def _stop(self) -> None:
        self._service.stopping.set()
        latest = self._loop.time() + self._grace
        while self._service.live.number and self._loop.time() < latest:
            await asyncio.sleep(0.01)
        self.config.timeout_graceful_shutdown = max(1, round(latest - self._loop.time()))
        self.should_exit = True
