"""What commands show of a plan and of an outcome."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenfold.cli.source import Opened
    from tenfold.cli.terminal import Terminal
    from tenfold.records import Plan, RunRecord


def show_decision(plan: Plan, opened: Opened, terminal: Terminal, *, out: Path | None = None) -> None:
    """Show a plan that is not carried out; ``out`` is where it was written."""
    from tenfold.profiling import environment
    from tenfold.records import Measurement, RunRecord
    from tenfold.reporting import plan_tables

    record = RunRecord(
        task=opened.name,
        seed=plan.seed,
        before=Measurement(**plan.before.model_dump()),
        after=Measurement(**plan.after.model_dump()),
        plan=plan,
        environment=environment(opened.device),
    )
    terminal.show(*plan_tables(plan))
    terminal.result(record.model_dump(mode="json") | {"out": None if out is None else str(out)})


def show_outcome(record: RunRecord, out: Path, terminal: Terminal) -> None:
    """Show the tables and where the files are."""
    from tenfold.reporting import record_tables

    terminal.show(*record_tables(record))
    terminal.say(f"Saved in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    terminal.result(record.model_dump(mode="json") | {"out": str(out)})
