"""tenfold report: one page about a run."""

from __future__ import annotations

from pathlib import Path

from tenfold.cli.terminal import Terminal

ORDER = 50


def run(path: Path, /, terminal: Terminal, *, curves: tuple[Path, ...] = (), out: Path | None = None) -> None:
    """Write what came of a run as one HTML page: before and after, every layer with its reasons, spectra, curves.

    tenfold report half

    The page is one file and asks the network for nothing: send it, keep it, print it. It is made from the records in
    the folder alone, without the model.

    With --json, one object: `out`, the path of the page, and `bytes`, its size.

    Args:
        path: a folder that tenfold wrote, or a record.json.
        terminal: what to show.
        curves: draw these too: the JSON of `tenfold plan --plot`, or a table of `tenfold sensitivity`. Repeatable.
        out: where to write the page; by default report.html in PATH, or beside the record.
    """
    from tenfold.files import check_writable
    from tenfold.reporting.report import write_report
    from tenfold.reporting.run_files import read_run

    if out is None:
        out = (path if path.is_dir() else path.parent) / "report.html"
    elif out.is_dir():
        out = out / "report.html"
    check_writable(out)
    written = write_report(read_run(path, curves=curves), out)
    terminal.say(f"Written to {written}. Open it in a browser.")
    terminal.result({"out": str(written), "bytes": written.stat().st_size})
