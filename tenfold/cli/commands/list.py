"""tenfold list: what there is to choose from."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any, Literal

from tenfold.cli.terminal import Terminal

if TYPE_CHECKING:
    from tenfold.registry import Registry

ORDER = 60


Kind = Literal["formats", "algorithms", "units", "rules", "tasks", "exports", "runtimes"]


def run(kind: Kind | None = None, /, *, terminal: Terminal) -> None:
    """List formats, algorithms, units, rank rules, tasks, export targets and runtimes, a line each; plugins too.

    A * marks what is taken by default, [NAME] the extra of tenfold that an entry needs. The pages about methods say
    when to use which.

    With --json, one object: entries by kind and name.

    Args:
        kind: everything when left out.
        terminal: what to show.
    """
    registries = _registries()
    chosen = [kind] if kind is not None else list(registries)
    found = {every: {name: registries[every].summary(name) for name in registries[every].names()} for every in chosen}
    for place, (every, entries) in enumerate(found.items()):
        terminal.say(("\n" if place else "") + f"{every}:")
        default = _defaults()[every]
        for line in _lines(registries[every], entries, default):
            terminal.say(line)
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


def _defaults() -> dict[str, set[str]]:
    """Return what is taken where nothing is said, by kind: of algorithms those of the default formats."""
    from tenfold.cli.commands.export import File
    from tenfold.formats import FORMATS
    from tenfold.records import Recipe
    from tenfold.units import UNITS

    recipe = Recipe()
    kinds = [FORMATS.get(name) for name in recipe.formats]
    return {
        "formats": set(recipe.formats),
        "algorithms": {str(name) for kind in kinds for name in (kind.default_algorithm, kind.data_aware_algorithm)},
        "units": {name for name, kind in UNITS.items() if kind.default},
        "rules": {recipe.rule_name},
        "tasks": set(),
        "exports": {str(File.model_fields["to"].default)},
        "runtimes": {recipe.target},
    }


def _lines(registry: Registry[Any], entries: dict[str, str], default: set[str]) -> list[str]:
    """Return a line for each entry; on a terminal it ends where the screen does."""
    marks = {name: getattr(registry.get(name), "extra", "") for name in entries}
    widest = max(map(len, entries), default=0)
    needs = max((len(mark) + 3 for mark in marks.values() if mark), default=0)
    lines = []
    for name, summary in entries.items():
        extra = f"[{marks[name]}]" if marks[name] else ""
        line = f"{'*' if name in default else ' '} {name:<{widest}}  {extra:<{needs}}{summary}"
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(line)
        lines.append(line if len(line) <= width else f"{line[: width - 1].rstrip()}…")
    return lines
