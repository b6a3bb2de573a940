"""The explorer served to this machine, in a thread, for as long as a test wants it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tenfold.exploring import Explorer
from tenfold.exploring.server import HOST, Service, address_of, listening, server

TOKEN = "known-to-the-test"  # noqa: S105


class Client:
    """Asks the page's server as a browser would, or worse. ``service`` is what answers."""

    def __init__(self, service: Service, port: int, address: str) -> None:
        self.service, self.port, self.address = service, port, address

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        try:
            connection.request(method, urlsplit(path).path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read().decode(), response.headers
        finally:
            connection.close()

    def post(self, what: str, value: Any, **headers: str) -> tuple[int, Any]:
        own = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        status, text, _ = self.ask("POST", f"/{TOKEN}/{what}", body, own)
        return status, json.loads(text) if text.startswith("{") else text


@contextmanager
def served(explorer: Explorer, out: Path) -> Iterator[Client]:
    """Serve an explorer, until the block ends."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    service = Service(explorer, name="net", out=out, command=f"tenfold compress --plan {out} ...")
    with listening(0) as listener:
        runs = server(service, TOKEN)
        thread = threading.Thread(target=runs.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Client(service, listener.getsockname()[1], address_of(TOKEN, listener))
        finally:
            runs.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
