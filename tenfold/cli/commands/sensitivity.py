"""tenfold sensitivity: which layers can be compressed, and how far."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenfold.cli.options import Machine, Source
from tenfold.cli.scaling import Spread
from tenfold.cli.sensing import Conditions, Samples
from tenfold.cli.terminal import Terminal

ORDER = 15

Formats = Annotated[
    list[str] | None,
    typer.Option("--format", "-f", metavar="FORMAT", help="What to try: tucker2,low_rank. Repeatable."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave these layers out: a path, a glob or re:EXPRESSION. Repeatable."),
]
Ranks = Annotated[int, typer.Option(min=1, metavar="N", help="Ranks to try in each layer and format.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="Where to keep the table, and to take it over from. Default: sensitivity-TASK.json.",
        rich_help_panel="Output",
        show_default=False,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw the curves of the costliest layers as a PNG, with all numbers in a CSV beside it.",
        rich_help_panel="Output",
    ),
]


def run(  # noqa: PLR0913, PLR0917 - one argument for each group of options
    source: Source,
    machine: Machine,
    conditions: Conditions,
    spread: Spread,
    terminal: Terminal,
    format: Formats = None,
    keep: Keep = None,
    ranks: Ranks = 6,
    samples: Samples = 0,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Measure what the model minds when one layer alone is factorized: the error of its output, and the score.

    tenfold sensitivity --task digits --samples 200 --out table.json --plot curves.png

    Every measurement is kept at once: the same command goes on where it was cut off, and more ranks, formats or scores
    are added to what is there. `tenfold plan --rule accuracy_drop --table table.json` uses the table.

    With --json, the whole table as one object.
    """
    with terminal.session():
        from tenfold.cli.deciding import names_in
        from tenfold.cli.sensing import bar, open_sensitivity
        from tenfold.cli.sources import open_source
        from tenfold.planning import DEFAULT_FORMATS
        from tenfold.profiling import profile
        from tenfold.reporting.sensitivity_tables import sensitivity_tables

        terminal.step("open the model")
        opened = open_source(source, machine)
        path = out or Path(f"sensitivity-{opened.task.id.replace(':', '-')}.json")
        sensitivity = open_sensitivity(
            opened,
            profile(opened.model, opened.inputs()),
            conditions,
            samples=samples,
            formats=tuple(names_in(format)) or DEFAULT_FORMATS,
            keep=tuple(keep or ()),
            seed=machine.seed,
            path=path,
            workers=spread.workers(opened, machine),
        )
        terminal.step("measure")
        try:
            with bar(terminal, "measurements") as advance:
                table = sensitivity.measure(ranks, scores=samples > 0, progress=advance)
        except KeyboardInterrupt:
            msg = f"interrupted; the same command goes on with what is in {path}"
            raise KeyboardInterrupt(msg) from None
        terminal.show(*sensitivity_tables(table))
        terminal.say(f"Kept in {path}")
        if plot is not None:
            from tenfold.reporting.pictures import plot_sensitivity

            terminal.say(f"Drawn in {', '.join(map(str, plot_sensitivity(table, plot)))}")
        terminal.result(table.model_dump(mode="json"))
