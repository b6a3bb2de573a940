"""Who may ask: a browser on this machine, for this page, and nobody else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"frame-ancestors 'none'"),  # the rest of it is in the page
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),  # the address has the token in it
    (b"x-content-type-options", b"nosniff"),
)


class Guard:
    """Refuses requests that name another host than this machine, or come from another page.

    A name that a foreign page made point to this machine (DNS rebinding) is in the header ``Host``; a foreign page that
    posts is in ``Origin``. What is posted has to be JSON, which no form of a foreign page can send unasked.

    Args:
        app: to guard.
        port: that it is served at.
    """

    def __init__(self, app: App, port: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""

        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        if scope["type"] != "http":
            return
        refusal = self.refuses(scope["method"], scope["headers"])
        if refusal is None:
            await self._app(scope, receive, sent)
            return
        text = [(b"content-type", b"text/plain; charset=utf-8")]
        await sent({"type": "http.response.start", "status": refusal[0], "headers": text})
        await sent({"type": "http.response.body", "body": refusal[1].encode()})

    def refuses(self, method: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Return status and reason of a refusal; None for what may pass.

        Example:
            >>> guard = Guard(None, 8000)
            >>> guard.refuses("GET", [(b"host", b"127.0.0.1:8000")]), guard.refuses("GET", [(b"host", b"evil.example")])
            (None, (403, 'this page is served to this machine only'))
        """
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        kinds = [
            value.decode("latin-1").partition(";")[0].strip() for name, value in headers if name == b"content-type"
        ]
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return 403, "this page is served to this machine only"
        if any(origin.removeprefix("http://") != hosts[0] for origin in origins):
            return 403, "another page may not ask this one"
        if method == "POST" and kinds != ["application/json"]:
            return 415, "post JSON"
        return None
