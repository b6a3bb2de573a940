"""tenfold sensitivity: which layers can be compressed, and how far."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import NonNegativeInt, PositiveInt

from tenfold.cli.record_options import Fields
from tenfold.cli.scoring import DEFAULT_SAMPLES
from tenfold.cli.source import Cluster, Source
from tenfold.cli.terminal import Options, Terminal
from tenfold.records import Recipe

ORDER = 15


class Work(Options):
    """Measurement.

    Attributes:
        ranks: ranks to try in each layer and format.
        samples: score on so many labelled samples held out from training, or on all there are; 0 for no scores.
        calibration_samples: training samples, without labels, for the errors of outputs; 0 for the errors of weights.
        batchnorm: re-estimate batch norm on the calibration samples before every score.
        out: where to keep the table, and to take it over from; sensitivity-TASK.json by default.
        plot: draw the curves of the costliest layers as a PNG, with all numbers in a CSV beside it.
    """

    ranks: PositiveInt = 6
    samples: NonNegativeInt = 0
    calibration_samples: NonNegativeInt = DEFAULT_SAMPLES
    batchnorm: bool = False
    out: Path | None = None
    plot: Path | None = None


def run(
    source: Source,
    recipe: Annotated[Recipe, Fields("Recipe", only=("formats", "algorithms", "keep", "seed"), file=True)],
    work: Work,
    machine: Cluster,
    terminal: Terminal,
) -> None:
    """Measure what the model loses when one layer alone is factorized: the error of its output, and the score.

    tenfold sensitivity --task digits --samples 200 --out table.json --plot curves.png

    Every measurement is kept at once: the same command goes on where it was cut off, and more ranks, formats or scores
    are added to what is there. `tenfold plan --rule accuracy_drop --table table.json` uses the table.

    With --json, the whole table as one object.
    """
    from tenfold.cli.choices import check_recipe
    from tenfold.cli.scoring import sensitivity
    from tenfold.cli.source import open_source
    from tenfold.files import check_writable
    from tenfold.profiling import profile
    from tenfold.reporting.pictures import check_drawable, plot_sensitivity
    from tenfold.reporting.sensitivity_tables import sensitivity_tables
    from tenfold.runtime import Runtime

    check_recipe(recipe)
    if work.plot is not None:
        check_drawable()
    terminal.step("open the model")
    opened = open_source(source, machine, recipe.seed)
    path = work.out or Path(f"sensitivity-{opened.task.id.replace(':', '-')}.json")
    for file in filter(None, (path, work.plot)):
        check_writable(file)
    method = "batchnorm" if work.batchnorm else "sequential"
    found = sensitivity(
        opened,
        opened.model,
        profile(opened.model, opened.inputs()),
        recipe.replace(calibration=recipe.calibration.replace(method=method, metric="gradients", refine=0)),
        samples=work.samples,
        looked_at=work.calibration_samples,
        path=path,
        workers=machine.workers(opened),
    )
    try:
        table = found.measure(
            work.ranks,
            scores=work.samples > 0,
            progress=Runtime(on_event=terminal.on_event).counter("measure"),
        )
    except KeyboardInterrupt:
        msg = f"interrupted; the same command goes on with what is in {path}"
        raise KeyboardInterrupt(msg) from None
    terminal.show(*sensitivity_tables(table))
    terminal.say(f"Kept in {path}")
    if work.plot is not None:
        terminal.say(f"Drawn in {', '.join(map(str, plot_sensitivity(table, work.plot)))}")
    terminal.result(table.model_dump(mode="json"))
