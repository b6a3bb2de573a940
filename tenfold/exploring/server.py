"""The page and its answers over HTTP, for one person on one machine."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tenfold.errors import BudgetError, DataError, TenfoldError, require
from tenfold.exploring.explorer import Explorer
from tenfold.exploring.guard import Guard
from tenfold.exploring.view import kept, shown_answer, shown_explorer
from tenfold.exploring.wishes import Wish
from tenfold.records import explain
from tenfold.reporting.pages import page

SCRIPTS = ("table.js", "chart.js", "page.js", "explore.js")
STYLES = ("style.css", "explore.css")
POINTS = 24
_LARGEST = 1 << 20  # bytes of a wish


class Service:
    """What can be asked of an explorer: answers, curves, and to save a plan. One thing at a time.

    Args:
        explorer: that answers.
        name: of the run, for the title.
        out: where plans are saved.
        command: what carries out the plan that was saved.
    """

    def __init__(self, explorer: Explorer, *, name: str, out: Path, command: str = "") -> None:
        self.explorer, self.name, self.out, self.command = explorer, name, out, command
        self._busy = threading.Lock()  # the solver must not run twice at once
        self._curves: dict[str, list[list[float]]] = {}

    def page(self) -> str:
        """Return the page as HTML."""
        explorer = self.explorer
        with self._busy:
            shown = shown_explorer(explorer)
        return page(
            "explore.html",
            title=f"Explore {self.name}",
            data={"charts": {}, "explore": shown},
            scripts=SCRIPTS,
            styles=STYLES,
            model=explorer.base.model,
            shown=shown,
            timed=explorer.candidates.time is not None,
            kept=kept(explorer),
            out=str(self.out),
        )

    def answer(self, wish: Wish) -> dict[str, Any]:
        """Return what the page shows of the answer to a wish."""
        with self._busy:
            return shown_answer(self.explorer, self.explorer.answer(wish))

    def curve(self, kind: str) -> dict[str, Any]:
        """Return the damage of the best plans for budgets of one kind: points of share left and damage.

        Raises:
            DataError: there is no such kind of budget.
        """
        ledger = self.explorer.ledger
        if kind not in ledger.kinds:
            msg = f"a budget is of {' or '.join(ledger.kinds)}, not {kind}"
            raise DataError(msg)
        if kind not in self._curves:
            low = self.explorer.least(kind)
            shares = [low + (1 - low) * i / POINTS for i in range(1, POINTS)]
            found = []
            for share in shares:
                with self._busy:  # others are served between two points
                    made = self.explorer.answer(Wish(budget={kind: share}))
                found.append([self.explorer.left(made, kind), made.damage])
            self._curves[kind] = found
        return {"kind": kind, "points": self._curves[kind]}

    def save(self, wish: Wish) -> dict[str, Any]:
        """Write the plan of a wish, whole or not at all, and return where it is and how to carry it out."""
        with self._busy:
            plan = self.explorer.plan(self.explorer.answer(wish))
        plan.save(self.out)
        return {"out": str(self.out), "command": self.command, "factorized": len(plan.factorized)}


def application(service: Service, token: str, port: int) -> Any:
    """Return the ASGI application: the page at ``/TOKEN/``, and what it asks below.

    Whoever does not know the token, or comes by another name than that of this machine, gets nothing.

    Args:
        service: that answers.
        token: a secret in the address.
        port: that it is served at.
    """
    applications: Any = require("starlette.applications", "explore")
    routing: Any = require("starlette.routing", "explore")

    def route(path: str, answer: Callable[[bytes], Any], method: str) -> Any:
        return routing.Route(f"/{{token}}/{path}", partial(_respond, answer, token), methods=[method])

    def wished(answer: Callable[[Wish], Any]) -> Callable[[bytes], Any]:
        return lambda body: answer(_wish(body))

    routes = [
        route("", lambda _: service.page(), "GET"),
        route("answer", wished(service.answer), "POST"),
        route("save", wished(service.save), "POST"),
        route("curve", lambda body: service.curve(_kind(body)), "POST"),
    ]
    return Guard(applications.Starlette(routes=routes), port)


async def _respond(answer: Callable[[bytes], Any], token: str, request: Any) -> Any:
    """Return the response to one request: HTML, JSON, or what was wrong in one line."""
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
    except BudgetError as error:  # an answer like any other: nothing is wrong with the question
        return JSONResponse({"error": " ".join(str(error).split())})
    except (TenfoldError, OSError) as error:
        return JSONResponse({"error": " ".join(str(error).split())}, 400)
    return HTMLResponse(found) if isinstance(found, str) else JSONResponse(found)


def _wish(body: bytes) -> Wish:
    try:
        return Wish.model_validate_json(body)
    except ValidationError as error:
        msg = f"this is no wish: {explain(error)}"
        raise DataError(msg) from error


def _kind(body: bytes) -> str:
    try:
        return str(json.loads(body)["kind"])
    except (ValueError, KeyError, TypeError) as error:
        msg = 'a curve is of a kind of budget: {"kind": "macs"}'
        raise DataError(msg) from error
