"""The model as a service: turns and files by REST, live audio by WebSocket, sessions in memory or in Redis."""

try:
    import fastapi as _fastapi
    import prometheus_client as _prometheus_client
    import uvicorn as _uvicorn
    import websockets as _websockets
except ImportError as error:
    raise ImportError(f"the service needs {error.name}: pip install 'modeling-mamba-ema[serve]'") from error

from .app import build_app
from .server import serve
from .service import Service, Settings
