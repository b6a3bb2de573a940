"""Tables as plain text, without colour, for files, logs and summaries."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

from tenfold.records import Plan, Profile, RunRecord
from tenfold.reporting.numbers import plural
from tenfold.reporting.plan_tables import plan_tables
from tenfold.reporting.profile_tables import profile_tables
from tenfold.reporting.run_tables import agreement_line, cost_table, record_tables

WIDTH = 120


def render_record(record: RunRecord, *, width: int | None = None) -> str:
    """Return the before/after table and the plan with its reasons as text of at most ``width`` columns."""
    return as_text(*record_tables(record), width=width)


def render_outcome(record: RunRecord) -> str:
    """Return before and after in a few lines, without the plan."""
    factorized = len(record.plan.factorized)
    more = f"{plural(factorized, 'layer')} factorized; summary() says which, and why the others are kept."
    agreed = () if record.agreement is None else (agreement_line(record.agreement),)
    return as_text(cost_table(record), *agreed, more)


def render_plan(plan: Plan, *, width: int | None = None) -> str:
    """Return what happens to each layer, and why, as text of at most ``width`` columns."""
    return as_text(*plan_tables(plan), width=width)


def render_profile(profile: Profile, *, width: int | None = None) -> str:
    """Return what each layer costs as text of at most ``width`` columns."""
    return as_text(*profile_tables(profile), width=width)


def as_text(*parts: RenderableType, width: int | None = None) -> str:
    """Return rich renderables as text without colour, a blank line between them, no trailing blanks.

    Example:
        >>> as_text("one", "two").split()
        ['one', 'two']
    """
    console = Console(
        file=io.StringIO(), width=width or WIDTH, color_system=None, force_terminal=False, highlight=False
    )
    blocks = []
    for part in parts:
        with console.capture() as capture:
            console.print(part, markup=False)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        blocks.append("\n".join(lines).strip("\n"))
    return "\n\n".join(blocks)
