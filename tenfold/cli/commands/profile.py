"""tenfold profile: what a model costs."""

from __future__ import annotations

from pydantic import PositiveInt

from tenfold.cli.source import Machine, Source
from tenfold.cli.terminal import Terminal
from tenfold.records import Seed

ORDER = 10


def run(
    source: Source,
    machine: Machine,
    terminal: Terminal,
    *,
    latency: bool = False,
    batch_size: PositiveInt = 1,
    seed: Seed = 0,
) -> None:
    """Show what each layer costs: parameters, MACs, and with --latency milliseconds.

    tenfold profile --task cifar10:resnet20 --weights resnet20.safetensors --latency --batch-size 8

    With --json, the whole profile as one object.

    Args:
        source: the model.
        machine: where to run it.
        terminal: what to show.
        latency: measure milliseconds too, of the model and of its layers.
        batch_size: samples in the forward that is profiled.
        seed: of the task.
    """
    from tenfold.cli.source import open_source
    from tenfold.profiling import profile
    from tenfold.reporting import profile_tables

    terminal.step("open the model")
    opened = open_source(source, machine, seed)
    cost = profile(opened.model, opened.inputs(batch_size), latency=latency)
    terminal.show(*profile_tables(cost))
    terminal.result(cost.model_dump(mode="json"))
