"""tenfold list: what there is to choose from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tenfold.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.table import Table

    from tenfold.registry import Registry

ORDER = 60


Kind = Literal["formats", "algorithms", "units", "rules", "tasks", "exports", "runtimes"]


def run(kind: Kind | None = None, /, *, terminal: Terminal) -> None:
    """List formats, algorithms, units, rank rules, tasks, export targets and runtimes, a line each; plugins too.

    With --json, one object: entries by kind and name.

    Args:
        kind: everything when left out.
        terminal: what to show.
    """
    registries = _registries()
    chosen = [kind] if kind is not None else list(registries)
    found = {every: {name: registries[every].summary(name) for name in registries[every].names()} for every in chosen}
    for every, entries in found.items():
        terminal.show(_table(every, entries))
    terminal.result(found)


def _registries() -> dict[str, Registry[Any]]:
    """Return the registries by the kind of their entries."""
    from tenfold.allocation import RULES
    from tenfold.decompositions import DECOMPOSITIONS
    from tenfold.exporting import EXPORTERS
    from tenfold.formats import FORMATS
    from tenfold.runtimes import RUNTIMES
    from tenfold.tasks import TASKS
    from tenfold.units import UNITS

    return {
        "formats": FORMATS,
        "algorithms": DECOMPOSITIONS,
        "units": UNITS,
        "rules": RULES,
        "tasks": TASKS,
        "exports": EXPORTERS,
        "runtimes": RUNTIMES,
    }


def _table(kind: str, entries: dict[str, str]) -> Table:
    from tenfold.reporting.table_parts import grid

    table = grid()
    table.add_column(kind, no_wrap=True)
    table.add_column("", ratio=1)
    for name, summary in entries.items():
        table.add_row(name, summary)
    return table
