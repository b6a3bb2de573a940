"""A server on this machine alone, until somebody stops it."""

from __future__ import annotations

import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tenfold.errors import TenfoldError, require
from tenfold.exploring.server import Service, application

HOST = "127.0.0.1"
_LAST_ANSWERS = 2  # seconds for what is under way when the server is stopped


def serve(service: Service, *, port: int = 0, browser: bool = True, ready: Callable[[str], None] | None = None) -> None:
    """Serve the page until an interrupt (Ctrl-C), to this machine alone, at an address that nobody can guess.

    Args:
        service: that answers.
        port: to listen at; any free one if 0.
        browser: open the page in the browser of this machine.
        ready: called with the address as soon as it can be opened.

    Raises:
        TenfoldError: the port is taken.
    """
    token = secrets.token_urlsafe(24)
    with listening(port) as listener:
        runs = server(service, token, listener)
        address = address_of(token, listener)
        if ready is not None:
            ready(address)
        if browser:  # some browsers run in the terminal and would not return
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        with suppress(KeyboardInterrupt):  # it has closed all by then
            runs.run(sockets=[listener])


def server(service: Service, token: str, listener: socket.socket) -> Any:
    """Return what serves the page once it is run: uvicorn's ``Server``."""
    uvicorn: Any = require("uvicorn", "explore")
    config = uvicorn.Config(
        application(service, token, listener.getsockname()[1]),
        log_level="error",
        access_log=False,
        lifespan="off",
        loop="asyncio",
        http="h11",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_LAST_ANSWERS,
    )
    return uvicorn.Server(config)


def address_of(token: str, listener: socket.socket) -> str:
    """Return the address of the page."""
    return f"http://{HOST}:{listener.getsockname()[1]}/{token}/"


def listening(port: int) -> socket.socket:
    """Return a socket that listens on the loopback interface.

    Raises:
        TenfoldError: the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        msg = f"cannot listen at port {port}: {error.strerror or error}. Name another one, or 0 for any that is free."
        raise TenfoldError(msg) from error
    return listener
