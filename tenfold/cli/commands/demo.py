"""tenfold demo: the main job on the embedded task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tenfold.cli.source import Machine, Source
from tenfold.cli.terminal import Terminal
from tenfold.errors import CheckpointError
from tenfold.records import Seed

if TYPE_CHECKING:
    from torch import nn

    from tenfold.cli.source import Opened
    from tenfold.pipeline import Compressed

ORDER = 70
BUDGET = {"macs": 1 / 3}
FORMATS = ("tucker2", "low_rank", "spatial")  # without cp3: its depthwise stage is slow in eager torch, which runs this
SAMPLES = 256  # to look at, without labels
BATCH = 64  # for the latency


def run(
    machine: Machine,
    terminal: Terminal,
    *,
    out: Annotated[Path, "FOLDER"] = Path("demo-out"),
    seed: Seed = 0,
) -> None:
    """Show the whole way in less than a minute, on a small network for handwritten digits.

    Trains it, profiles it, compresses it to a third of its MACs, tunes it, saves it, loads it again, shows the outcome.

    Args:
        machine: where to compute.
        terminal: what to show.
        out: where to write the model.
        seed: of everything that draws random numbers.
    """
    from tenfold.cli.recovery import claim
    from tenfold.cli.show import show_outcome
    from tenfold.cli.source import open_source
    from tenfold.profiling import profile
    from tenfold.reporting import profile_tables

    claim(out, terminal)
    terminal.say("1. Train a small network on handwritten digits, and see what it costs.\n")
    opened = open_source(Source(task="digits"), machine, seed)
    terminal.show(*profile_tables(profile(opened.model, opened.inputs())))
    terminal.say(
        "2. Compress it to a third of its MACs by the look of 256 unlabeled images; tune, measure and save it.\n"
    )
    result = _compress(opened, seed, terminal)
    record = result.record.replace(task=opened.name, command=terminal.command)
    dataclasses.replace(result, record=record).save(out)
    show_outcome(record, out, terminal)
    terminal.say("\n3. Load it again onto a freshly built network.\n")
    _check_loaded(opened, result, out)
    terminal.say("The loaded model gives the same outputs, bit for bit. In Python:\n")
    terminal.say(f'    model, plan = tenfold.load(skeleton, "{out}")\n')
    terminal.say(f"Read {out / 'README.md'} for the model card, {out / 'plan.yaml'} for what was done and why.")


def _compress(opened: Opened, seed: int, terminal: Terminal) -> Compressed:
    from tenfold.cli.recovery import CalibrationBatches, Tuner, tune_config
    from tenfold.pipeline import compress
    from tenfold.records import TuneConfig
    from tenfold.runtime import Runtime
    from tenfold.training import TuneEvents, TuneResult, finetune

    config = tune_config(opened, TuneConfig(), seed)
    tuner = Tuner(opened, config, Path(), "")

    def tune(model: nn.Module) -> TuneResult:
        return finetune(model, tuner.batches, config, progress=TuneEvents(terminal.on_event))

    return compress(
        opened.model,
        opened.inputs(),
        {"budget": BUDGET, "formats": FORMATS, "seed": seed},
        data=CalibrationBatches(opened, SAMPLES, seed),
        tune=tune,
        evaluate=opened.task.evaluate,
        runtime=Runtime(latency_inputs=opened.inputs(BATCH), on_event=terminal.on_event),
    )


def _check_loaded(opened: Opened, result: Compressed, out: Path) -> None:
    """Raise CheckpointError unless the saved model gives the very same outputs as the one in memory."""
    import torch

    from tenfold.checkpoint import load

    loaded, _ = load(opened.task.build(), out)
    loaded = loaded.to(opened.device)
    inputs = opened.inputs(BATCH)
    with torch.no_grad():
        same = torch.equal(result.model.eval()(inputs), loaded.eval()(inputs))
    if not same:
        msg = f"the model in {out} gives other outputs than the one that was saved"
        raise CheckpointError(msg)
