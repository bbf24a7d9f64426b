"""The model as a service: turns and files by REST, live audio by WebSocket, sessions in memory or in Redis."""

try:
    import fastapi as _fastapi  # noqa: F401
    import prometheus_client as _prometheus_client  # noqa: F401
    import uvicorn as _uvicorn  # noqa: F401
    import websockets as _websockets  # noqa: F401
except ImportError as error:
    raise ImportError(f"the service needs {error.name}: pip install 'modeling-mamba-ema[serve]'") from error

from .app import build_app
from .server import serve
from .service import Service, Settings

__all__ = ["Service", "Settings", "build_app", "serve"]
