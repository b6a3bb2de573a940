"""tenfold profile: what a model costs."""

from __future__ import annotations

from typing import Annotated

import typer

from tenfold.cli.options import Machine, Source
from tenfold.cli.terminal import Terminal

ORDER = 10

Latency = Annotated[bool, typer.Option("--latency/--no-latency", help="Measure milliseconds too, model and layers.")]
Batch = Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Samples in the forward that is profiled.")]


def run(
    source: Source,
    machine: Machine,
    terminal: Terminal,
    latency: Latency = False,  # noqa: FBT002 - typer calls it
    batch: Batch = 1,
) -> None:
    """Show what each layer costs: parameters, MACs, and with --latency milliseconds.

    tenfold profile --task cifar10:resnet20 --weights resnet20.safetensors --latency --batch 8

    With --json, the whole profile as one object.
    """
    with terminal.session():
        from tenfold.cli.sources import open_source
        from tenfold.profiling import profile
        from tenfold.reporting import profile_tables

        terminal.step("open the model")
        opened = open_source(source, machine)
        found = profile(opened.model, opened.inputs(batch), latency=latency)
        terminal.show(*profile_tables(found))
        terminal.result(found.model_dump(mode="json"))
