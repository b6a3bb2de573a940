"""From a folder of transformers to its task, whose model is not opened; and the perplexity of such a folder."""

from __future__ import annotations

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
        msg = f"{folder} has no {CONFIG}, which says what the model is: use tenfold.streaming.compress_streamed in Python"
        raise CheckpointError(msg)
    name = f"lm:{folder}" + ("" if tokens is None else f"@{tokens}")
    opened = open_source(Source(task=name, data=data), machine, seed)
    try:
        if isinstance(opened.task, CausalLM):
            opened.task.model_class  # noqa: B018 - raises
    except CheckpointError:
        if tokens is not None:
            msg = f"--tokens is for language models, and {folder} is none."
            raise Misuse(msg) from None
        return open_source(Source(task=f"hf:{folder}", data=data), machine, seed)
    return opened
