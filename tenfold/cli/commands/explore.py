"""tenfold explore: move budgets and layers by hand, and see what it costs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tenfold.cli.terminal import Misuse, Terminal

ORDER = 25

RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A folder that tenfold wrote, or a plan of `tenfold plan`.", show_default=False),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="Where to save the plan. Default: explored.yaml in RUN, or beside the plan, numbered if it is there.",
        rich_help_panel="Output",
        show_default=False,
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen at; 0 for any that is free.")]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")]


def run(terminal: Terminal, path: RunPath, out: Out = None, port: Port = 0, browser: Browser = True) -> None:  # noqa: FBT002
    """Move a budget or the rank of a layer on a page, see cost and predicted distortion change, and save the plan.

    tenfold explore half

    RUN is what `compress` wrote, or a plan of `plan`, by the rule global. Every move is answered by the optimum that
    `plan` finds for the same budget, from what the run chose from: neither the model nor its data is needed. The page
    is served to this machine alone, at an address that nobody else knows, until Ctrl-C. Carry out what was saved
    with: tenfold compress --plan FILE ...

    With --json, one object as soon as the page is served: `url`, and `out`, where plans are saved.
    """
    if out is not None and out.is_dir():
        msg = f"--out {out} is a folder: name the file of the plan."
        raise Misuse(msg)
    with terminal.session():
        from tenfold.explorer.explorer import Explorer
        from tenfold.explorer.server import Service, serve
        from tenfold.explorer.table_files import free_name, read_options, run_name

        folder = path if path.is_dir() else path.parent
        target = free_name(folder / "explored.yaml") if out is None else out
        explorer = Explorer(read_options(path))
        name, command = run_name(path, explorer.table, target)

        def ready(address: str) -> None:
            terminal.say(f"Exploring {name} at {address}")
            terminal.say("Ctrl-C ends it.")
            terminal.result({"url": address, "out": str(target)})
            sys.stdout.flush()

        serve(Service(explorer, name=name, out=target, command=command), port=port, browser=browser, ready=ready)
