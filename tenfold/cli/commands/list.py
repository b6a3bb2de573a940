"""tenfold list: what there is to choose from."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tenfold.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.table import Table

    from tenfold.registry import Registry

ORDER = 60


class What(StrEnum):
    """The kinds of entries that are registered by name."""

    formats = "formats"
    algorithms = "algorithms"
    rules = "rules"
    tasks = "tasks"
    exports = "exports"


Wanted = Annotated[What | None, typer.Argument(help="Everything when left out.", show_default=False)]


def run(terminal: Terminal, what: Wanted = None) -> None:
    """List formats, algorithms, rank rules, tasks and export targets, a line each; those of plugins too.

    With --json, one object: entries by kind and name.
    """
    with terminal.session():
        registries = _registries()
        chosen = [what.value] if what is not None else list(registries)
        found = {kind: {name: registries[kind].summary(name) for name in registries[kind].names()} for kind in chosen}
        for kind, entries in found.items():
            terminal.show(_table(kind, entries))
        terminal.result(found)


def _registries() -> dict[str, Registry[Any]]:
    """Return the registries by the kind of their entries."""
    from tenfold.decompositions import DECOMPOSITIONS
    from tenfold.exporting import EXPORTERS
    from tenfold.formats import FORMATS
    from tenfold.ranks import RULES
    from tenfold.tasks import TASKS

    return {"formats": FORMATS, "algorithms": DECOMPOSITIONS, "rules": RULES, "tasks": TASKS, "exports": EXPORTERS}


def _table(kind: str, entries: dict[str, str]) -> Table:
    from tenfold.reporting.columns import grid

    table = grid()
    table.add_column(kind, no_wrap=True)
    table.add_column("", ratio=1)
    for name, summary in entries.items():
        table.add_row(name, summary)
    return table
