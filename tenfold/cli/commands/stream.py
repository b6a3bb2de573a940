"""tenfold stream: compress a model that is larger than the memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import NonNegativeInt, PositiveInt

from tenfold.cli.choices import RecipeOptions
from tenfold.cli.record_options import Fields
from tenfold.cli.source import Cluster, Folder
from tenfold.cli.terminal import Options, Terminal

if TYPE_CHECKING:
    from tenfold.cli.source import Opened
    from tenfold.records import Recipe

ORDER = 35
LAUNCHABLE = True  # by accelerate: the processes share the samples


class Texts(Options):
    """Data.

    Attributes:
        data: a text file, a text a line, or a folder with train.txt, as for `--task lm:`; without, weights alone
            decide.
        calibration_samples: sequences to look at; 128 by default, or as many as there are.
        tokens: tokens of a sequence; 512 by default, or as many as the model has positions for.
        batch_size: sequences that go through a block at a time; memory grows with it.
    """

    data: Folder = None
    calibration_samples: NonNegativeInt | None = None
    tokens: PositiveInt | None = None
    batch_size: PositiveInt = 1

    def batches(self, opened: Opened, recipe: Recipe) -> list[Any] | None:
        """Return the sequences to look at; None where weights alone decide."""
        task, samples = opened.task, self.calibration_samples
        if self.data is None or samples == 0 or not recipe.calibration.plans:
            return None
        if samples is None:
            samples = min(task.looked_at, task.calibration_size(recipe.seed))
        return list(task.calibration_batches(samples, batch_size=self.batch_size, seed=recipe.seed))


class Work(Options):
    """What is done.

    Attributes:
        out: the folder to write; it must not be there yet.
        work: where the files of the run are kept, which is for fast disks; a hidden folder beside --out by default,
            which is removed in the end.
        max_memory: what the process may take, such as 8GB: it holds fewer activations then, and sketches wide inputs
            where it has to.
        max_cache: hold at most so many activations of each of the two blocks while layers are fitted.
        blocks: paths or patterns of the blocks that follow each other, where they are not found.
    """

    out: Annotated[Path, "FOLDER"]
    work: Folder = None
    max_memory: Annotated[str | None, "SIZE"] = None
    max_cache: Annotated[str, "SIZE"] = "16MiB"
    blocks: Annotated[tuple[str, ...], "PATTERN"] = ()


def run(
    weights: Path,
    /,
    recipe: RecipeOptions,
    texts: Texts,
    work: Work,
    machine: Annotated[Cluster, Fields(without=("device",))],
    terminal: Terminal,
) -> None:
    """Make a model of transformers smaller that does not fit into memory: one block at a time, from disk to disk.

    tenfold stream llama --data texts.txt --budget params=0.8 --out smaller --max-memory 8GB

    WEIGHTS is a folder with config.json and safetensors files, in one piece or in shards. What is written is a folder
    that `eval`, `report`, `explore` and transformers open. What the run takes of memory and of disk is said before it
    begins. One that was killed goes on where it was, to the same bytes, when the same command is given again.

    With --json, one object, as of `compress`.

    Args:
        weights: a folder of transformers.
        recipe: what is wanted.
        texts: data that decide.
        work: what is done.
        machine: who does it.
        terminal: what to show.
    """
    from tenfold.cli.choices import plan_or_recipe
    from tenfold.cli.launch import launched
    from tenfold.cli.show import show_outcome
    from tenfold.cli.streamed_source import open_folder
    from tenfold.runtime import Runtime
    from tenfold.streaming.stream import carried_out, looked_at

    plan_or_recipe(recipe, None)
    launch = launched(machine)
    runtime = Runtime(
        folder=work.work,
        max_cache=work.max_cache,
        max_memory=work.max_memory,
        on_event=terminal.on_event if launch.main else None,
        accelerator=launch.accelerator,
    )
    if launch.main:
        terminal.step("look at the model")
    opened = open_folder(weights, texts.data, texts.tokens, machine, recipe.seed)
    data, blocks = texts.batches(opened, recipe), work.blocks or None
    example = opened.task.example_inputs(1)
    network = looked_at(weights, work.out, recipe, data=data, example=example, blocks=blocks)
    about = {"task": opened.name, "command": terminal.command}
    runtime = runtime.replace(workers=machine.workers(opened))
    try:
        found = carried_out(network, work.out, blocks, runtime, about)
    except KeyboardInterrupt:
        msg = "interrupted; the same command goes on after the last complete block"
        raise KeyboardInterrupt(msg) from None
    if launch.main:
        show_outcome(found.record, found.path, terminal)
