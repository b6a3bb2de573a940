"""tenfold plan: decide, and do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenfold.cli.options import Decide, Machine, Source
from tenfold.cli.terminal import Terminal

ORDER = 20

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Where to write the plan.", rich_help_panel="Output"),
]


def run(source: Source, decide: Decide, machine: Machine, terminal: Terminal, out: Out = None) -> None:
    """Decide what to do with each layer, as a YAML file that you can edit.

    tenfold plan --task digits --budget macs=0.5 --out plan.yaml

    Without --out the YAML goes to stdout. Edit ranks and actions, then: tenfold compress --plan plan.yaml ...
    """
    with terminal.session():
        from tenfold.cli.commands.compress import show_decision
        from tenfold.cli.sources import open_source

        terminal.step("open the model")
        opened = open_source(source, machine)
        if out is None and not terminal.json:
            from tenfold.cli.deciding import plan_of
            from tenfold.profiling import profile

            plan = plan_of(decide, opened, profile(opened.model, opened.inputs()), machine.seed)
            terminal.say(plan.to_yaml().rstrip())
            return
        plan = show_decision(opened, decide, machine.seed, terminal)
        if out is not None:
            out = out / "plan.yaml" if out.is_dir() else out
            plan.save(out)
            terminal.say(f"Written to {out}. Carry it out with: tenfold compress --plan {out} ...")
