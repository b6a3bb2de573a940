"""From a folder of transformers to its task, whose model is not opened; and the perplexity of such a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.cli.source import Machine, Opened, Source, open_source
from tenfold.cli.terminal import Misuse
from tenfold.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenfold.records import Profile


def open_folder(folder: Path, data: Path | None, tokens: int | None, machine: Machine, seed: int) -> Opened:
    """Return the task of a folder: that of a language model, else that of a model without a score.

    Raises:
        CheckpointError: it is no folder of transformers.
    """
    from tenfold.checkpoint.model_folder import CONFIG
    from tenfold.checkpoint.shards import WeightFiles
    from tenfold.tasks.causal_lm import CausalLM

    WeightFiles.of(folder)  # says what is wrong with them before anything is asked of transformers
    if not (folder.expanduser() / CONFIG).is_file():
        msg = (
            f"{folder} has no {CONFIG}, which says what the model is: use tenfold.streaming.compress_streamed in Python"
        )
        raise CheckpointError(msg)
    name = f"lm:{folder}" + ("" if tokens is None else f"@{tokens}")
    opened = open_source(Source(task=name, data=data), machine, seed)
    try:
        if isinstance(opened.task, CausalLM):
            _ = opened.task.model_class
    except CheckpointError:
        if tokens is not None:
            msg = f"--tokens is for language models, and {folder} is none."
            raise Misuse(msg) from None
        return open_source(Source(task=f"hf:{folder}", data=data), machine, seed)
    return opened


@dataclass(frozen=True, eq=False)
class StreamedScores:
    """Perplexities of a language model in a folder, which is never opened as a whole.

    Attributes:
        opened: the task.
        source: the options that name the folder.
    """

    opened: Opened
    source: Source

    @cached_property
    def folder(self) -> Path:
        """The folder of the weights.

        Raises:
            Misuse: the task is no language model.
            CheckpointError: there is no such folder.
        """
        from tenfold.tasks.causal_lm import CausalLM

        task = self.opened.task
        if not isinstance(task, CausalLM):
            msg = f"--streamed is for language models (lm:FOLDER), and the task is {task.id}."
            raise Misuse(msg)
        folder = self.source.checkpoint or self.source.weights or Path(task.source)
        if not folder.expanduser().is_dir():
            msg = f"--streamed reads a folder of safetensors files, and there is none at {folder}: download it first"
            raise CheckpointError(msg)
        return folder

    def profile(self) -> Profile:
        """Return what the model costs, which needs no weights."""
        from tenfold.profiling import environment, profile
        from tenfold.streaming.chain import meta_inputs
        from tenfold.streaming.offloaded import open_skeleton
        from tenfold.streaming.skeletons import on_meta

        hollow = on_meta(open_skeleton(self.folder))
        cost = profile(hollow, meta_inputs(self.opened.task.example_inputs(1)))
        return cost.replace(environment=environment())

    def score(self, split: str, limit: int | None, batch_size: int, progress: Callable[[int, int], None]) -> float:
        """Return the perplexity on a part of the texts."""
        from tenfold.streaming import streamed_perplexity

        task: Any = self.opened.task
        return streamed_perplexity(self.folder, task.scored_batches(split, limit, batch_size), progress=progress)

    def elsewhere(self, limit: int | None, batch_size: int) -> dict[str, float]:
        """Return the perplexities on further texts, by name."""
        from tenfold.streaming import streamed_perplexity

        task: Any = self.opened.task
        every = task.batches_elsewhere(limit, batch_size)
        return {name: streamed_perplexity(self.folder, own) for name, own in every.items()}
