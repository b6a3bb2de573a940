"""tenfold explore: move budgets and layers by hand, and see what it costs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tenfold.cli.terminal import Misuse, Terminal

ORDER = 25


def run(
    path: Path,
    /,
    terminal: Terminal,
    *,
    out: Path | None = None,
    port: Annotated[int, Field(ge=0, le=65535)] = 0,
    browser: bool = True,
) -> None:
    """Move a budget or the rank of a layer on a page, see cost and predicted distortion change, and save the plan.

    tenfold explore half

    PATH is what `compress` wrote, or a plan of `plan`, by the rule global. Every move is answered by the optimum that
    `plan` finds for the same budget, from what the run chose from: neither the model nor its data is needed. The page
    is served to this machine alone, at an address that nobody else knows, until Ctrl-C. Carry out what was saved
    with: tenfold compress --plan FILE ...

    With --json, one object as soon as the page is served: `url`, and `out`, where plans are saved.

    Args:
        path: a folder that tenfold wrote, or a plan of `tenfold plan`.
        terminal: what to show.
        out: where to save the plan; by default explored.yaml in PATH, or beside the plan, numbered if it is there.
        port: port to listen at; 0 for any that is free.
        browser: open the page in the browser.
    """
    if out is not None and out.is_dir():
        msg = f"--out {out} is a folder: name the file of the plan."
        raise Misuse(msg)
    from tenfold.explorer.explorer import Explorer
    from tenfold.explorer.server import Service, serve
    from tenfold.explorer.table_files import free_name, read_options, run_name
    from tenfold.files import check_writable

    folder = path if path.is_dir() else path.parent
    target = free_name(folder / "explored.yaml") if out is None else out
    check_writable(target)
    table = read_options(path)
    name, command = run_name(path, table, target)

    def ready(address: str) -> None:
        terminal.say(f"Exploring {name} at {address}")
        terminal.say("Ctrl-C ends it.")
        terminal.result({"url": address, "out": str(target)})
        sys.stdout.flush()

    service = Service(Explorer(table), name=name, out=target, command=command)
    serve(service, port=port, browser=browser, ready=ready)
