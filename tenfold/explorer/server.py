"""The page and its answers over HTTP: a server for the browser of this machine alone, until it is stopped."""

from __future__ import annotations

import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tenfold.errors import BudgetError, DataError, TenfoldError, require
from tenfold.explorer.explorer import Explorer, Query
from tenfold.explorer.view import initial_view, selection_view
from tenfold.records import Budget, explain
from tenfold.records.parsing import parse_json
from tenfold.reporting.pages import page

SCRIPTS = ("table.js", "chart.js", "page.js", "explore.js")
STYLES = ("style.css", "explore.css")
POINTS = 24
HOST = "127.0.0.1"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the rest of it is in the page
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address has the token in it
    "X-Content-Type-Options": "nosniff",
}
_LARGEST = 1 << 20  # bytes of a request
_LAST_ANSWERS = 2  # seconds for what is under way when the server is stopped


class Service:
    """What the page can ask for: answers, curves, and a plan to be saved. Requests are served one at a time.

    Args:
        explorer: answers the requests.
        name: of the run, for the title.
        out: file that plans are saved to.
        command: carries out a saved plan; shown to the user.
    """

    def __init__(self, explorer: Explorer, *, name: str, out: Path, command: str = "") -> None:
        self.explorer, self.name, self.out, self.command = explorer, name, out, command
        self._busy = threading.Lock()  # the solver must not run twice at once
        self._curves: dict[str, list[list[float]]] = {}

    def page(self) -> str:
        """Return the page as HTML."""
        table = self.explorer.table
        with self._busy:
            view = initial_view(self.explorer)
        return page(
            "explore.html",
            title=f"Explore {self.name}",
            data={"charts": {}, "explore": view},
            scripts=SCRIPTS,
            styles=STYLES,
            model=table.model,
            view=view,
            timed=table.time is not None,
            kept=[layer for layer in table.layers if layer.keep_reason is not None],
            out=str(self.out),
        )

    def select(self, query: Query) -> dict[str, Any]:
        """Return the selection for a query, as the page shows it."""
        with self._busy:
            return selection_view(self.explorer, self.explorer.select(query), query)

    def curve(self, kind: str) -> dict[str, Any]:
        """Return the least distortion for a row of budgets of one kind: points of share left and distortion.

        Raises:
            DataError: there is no such kind of budget.
        """
        kinds = self.explorer.accounts.kinds
        if kind not in kinds:
            msg = f"a budget is of {' or '.join(kinds)}, not {kind}"
            raise DataError(msg)
        if kind not in self._curves:
            low = self.explorer.least(kind)
            shares = [low + (1 - low) * i / POINTS for i in range(1, POINTS)]
            points = []
            for share in shares:
                with self._busy:  # others are served between two points
                    selection = self.explorer.select(Query(budget=Budget.of({kind: share})))
                points.append([self.explorer.left(selection, kind), selection.distortion])
            self._curves[kind] = points
        return {"kind": kind, "points": self._curves[kind]}

    def save(self, query: Query) -> dict[str, Any]:
        """Write the plan for a query, whole or not at all; return its file and the command to carry it out."""
        with self._busy:
            plan = self.explorer.plan(query)
        plan.save(self.out)
        return {"out": str(self.out), "command": self.command, "factorized": len(plan.factorized)}


def serve(service: Service, *, port: int = 0, browser: bool = True, ready: Callable[[str], None] | None = None) -> None:
    """Serve the page until an interrupt (Ctrl-C), to this machine alone, at an address that nobody can guess.

    Args:
        service: answers the requests.
        port: to listen at; any free one if 0.
        browser: open the page in the browser of this machine.
        ready: called with the address as soon as it can be opened.

    Raises:
        TenfoldError: the port is taken.
    """
    token = secrets.token_urlsafe(24)
    with listening(port) as listener:
        running = server(service, token)
        address = address_of(token, listener)
        if ready is not None:
            ready(address)
        if browser:  # in a thread: browsers in a terminal do not return
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        with suppress(KeyboardInterrupt):  # uvicorn has closed everything by then
            running.run(sockets=[listener])


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


def address_of(token: str, listener: socket.socket) -> str:
    """Return the address of the page."""
    return f"http://{HOST}:{listener.getsockname()[1]}/{token}/"


def server(service: Service, token: str) -> Any:
    """Return uvicorn's ``Server`` of the page, ready to run."""
    uvicorn: Any = require("uvicorn", "explore")
    config = uvicorn.Config(
        application(service, token),
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


def application(service: Service, token: str) -> Any:
    """Return the ASGI application: the page at ``/TOKEN/``, and its requests below.

    Without the token, or under another name than this machine's, there is nothing: a name that a foreign page made
    point to this machine (DNS rebinding) is in the header ``Host``.

    Args:
        service: answers the requests.
        token: a secret in the address.
    """
    applications: Any = require("starlette.applications", "explore")
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    def route(path: str, answer: Callable[[bytes], Any], method: str) -> Any:
        return Route(f"/{{token}}/{path}", partial(_respond, answer, token), methods=[method])

    def queried(answer: Callable[[Query], Any]) -> Callable[[bytes], Any]:
        return lambda body: answer(_query(body))

    routes = [
        route("", lambda _: service.page(), "GET"),
        route("select", queried(service.select), "POST"),
        route("save", queried(service.save), "POST"),
        route("curve", lambda body: service.curve(_kind(body)), "POST"),
    ]
    here = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    return applications.Starlette(routes=routes, middleware=[here, Middleware(BaseHTTPMiddleware, dispatch=_same_page)])


async def _same_page(request: Any, respond: Callable[[Any], Any]) -> Any:
    # A foreign page that posts is in the header Origin. No form of one can send JSON without asking first.
    from starlette.responses import PlainTextResponse

    media_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if request.headers.get("origin", address := f"http://{request.headers['host']}") != address:
        response = PlainTextResponse("another page may not ask this one", 403)
    elif request.method == "POST" and media_type != "application/json":
        response = PlainTextResponse("post JSON", 415)
    else:
        response = await respond(request)
    response.headers.update(HEADERS)
    return response


async def _respond(answer: Callable[[bytes], Any], token: str, request: Any) -> Any:
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

    if not secrets.compare_digest(request.path_params["token"].encode(), token.encode()):
        return PlainTextResponse("not found", 404)
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST:
            return JSONResponse({"error": f"a request has at most {_LARGEST:,} bytes"}, 413)
    try:
        found = await run_in_threadpool(answer, body)
    except BudgetError as error:  # an answer like any other: nothing is wrong with the request
        return JSONResponse({"error": " ".join(str(error).split())})
    except (TenfoldError, OSError) as error:
        return JSONResponse({"error": " ".join(str(error).split())}, 400)
    return HTMLResponse(found) if isinstance(found, str) else JSONResponse(found)


def _query(body: bytes) -> Query:
    try:
        return Query.model_validate_json(body)
    except ValidationError as error:
        msg = f"invalid request: {explain(error)}"
        raise DataError(msg) from error


def _kind(body: bytes) -> str:
    try:
        return str(parse_json(body)["kind"])
    except (ValueError, KeyError, TypeError) as error:
        msg = 'invalid request: a curve needs a kind of budget, as {"kind": "macs"}'
        raise DataError(msg) from error
