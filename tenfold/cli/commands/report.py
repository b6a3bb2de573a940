"""tenfold report: one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenfold.cli.terminal import Terminal

ORDER = 50

RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A folder that tenfold wrote, or a record.json.", show_default=False),
]
Curves = Annotated[
    list[Path] | None,
    typer.Option(
        "--curves",
        metavar="FILE",
        help="Draw these too: the JSON of `tenfold plan --plot`, or a table of `tenfold sensitivity`. Repeatable.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="Where to write the page. Default: report.html in RUN, or beside the record.",
        rich_help_panel="Output",
        show_default=False,
    ),
]


def run(terminal: Terminal, path: RunPath, curves: Curves = None, out: Out = None) -> None:
    """Write what came of a run as one HTML page: before and after, every layer with its reasons, spectra, curves.

    tenfold report half

    The page is one file and asks the network for nothing: send it, keep it, print it. It is made from the records in
    the folder alone, without the model.

    With --json, one object: `out`, the path of the page, and `bytes`, its size.
    """
    with terminal.session():
        from tenfold.reporting.report import write_report
        from tenfold.reporting.run_files import read_run

        if out is None:
            out = (path if path.is_dir() else path.parent) / "report.html"
        elif out.is_dir():
            out = out / "report.html"
        written = write_report(read_run(path, curves=curves or ()), out)
        terminal.say(f"Written to {written}. Open it in a browser.")
        terminal.result({"out": str(written), "bytes": written.stat().st_size})
