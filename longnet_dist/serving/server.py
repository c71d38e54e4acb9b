"""The server's process: a socket, then uvicorn until an interrupt."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from longnet_dist.errors import ConfigError


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve an application until the process is interrupted.

    Args:
        app: what to serve.
        host: address to listen on.
        port: to listen on.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; use another --host or --port") from None
    print(f"serving http://{host}:{port}/v1/completions", flush=True)
    with listening:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listening])
