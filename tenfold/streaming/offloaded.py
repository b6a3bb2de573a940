"""A model whose blocks are read from the disk when they run: to score what does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from tenfold.checkpoint.model_folder import CONFIG
from tenfold.checkpoint.shards import WeightFiles, is_sharded, plan_of_shards
from tenfold.errors import CheckpointError
from tenfold.streaming.chain import Chain, find_chain, meta_inputs
from tenfold.streaming.skeletons import empty_pretrained, fill_, on_meta, stored_names
from tenfold.surgery import restructure_
from tenfold.tracing import copied
from tenfold.tracing.replay import stand_in


class Offloaded(nn.Module):
    """A model of which one block is in memory at a time; slow, and as exact as the whole.

    Use it with few large batches, since each reads all weights once. It has no parameters of its own blocks: for
    inference alone.

    Args:
        skeleton: the model, its parameters on the meta device.
        files: with its weights.
        chain: of its blocks.
    """

    def __init__(self, skeleton: nn.Module, files: WeightFiles, chain: Chain) -> None:
        super().__init__()
        names = stored_names(skeleton, files)
        outside = {name: stored for name, stored in names.items() if not name.startswith(chain.prefixes)}
        self.outer = fill_(copied(skeleton), files, outside).eval()
        self.chain = chain
        self._files, self._names = files, names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        with ExitStack() as stack:
            for number, path in enumerate(self.chain.blocks):
                stack.enter_context(stand_in(self.outer.get_submodule(path), self._running(number)))
            return self.outer(*args, **kwargs)

    def block(self, number: int) -> nn.Module:
        """Return a block with its weights, in memory of its own."""
        path = self.chain.blocks[number]
        twin = copied(self.outer.get_submodule(path))
        vars(twin).pop("forward", None)  # what stands in for it reads it here
        return fill_(twin, self._files, self._names, f"{path}.").eval()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, as models of transformers do."""
        find: Callable[[], nn.Module] | None = getattr(self.outer, "get_output_embeddings", None)
        return None if find is None else find()

    def _running(self, number: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return self.block(number)(*args, **kwargs)

        return run


def open_offloaded(folder: str | Path, example_inputs: Any, *, skeleton: nn.Module | None = None) -> Offloaded:
    """Return the model in a folder, dense or compressed by ``compress_streamed``, one block of it in memory at a time.

    Use it to score or to run a model that does not fit into memory.

    Args:
        folder: with safetensors files, and the config of a model of transformers.
        example_inputs: by which the blocks are found.
        skeleton: the dense model with its parameters on the meta device, where the folder has no config.

    Raises:
        CheckpointError: weights are missing, or not those of the model.
        PlanError: the model is no chain of blocks.
    """
    model = open_skeleton(folder, skeleton)
    return Offloaded(model, WeightFiles.of(folder), find_chain(on_meta(model), meta_inputs(example_inputs)))


def open_skeleton(folder: str | Path, skeleton: nn.Module | None = None) -> nn.Module:
    """Return the model in a folder without its weights, dense or compressed; see ``open_offloaded``."""
    path = Path(folder).expanduser()
    WeightFiles.of(path)  # says what is wrong with them first
    if skeleton is None and not (path / CONFIG).is_file():
        msg = f"{path} has no {CONFIG} that says what the model is: pass skeleton=, the model on the meta device"
        raise CheckpointError(msg)
    model = empty_pretrained(path) if skeleton is None else skeleton.eval()
    return restructure_(copied(model), plan_of_shards(path)) if is_sharded(path) else model
