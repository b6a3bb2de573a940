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
        self._files, self._names, self._chain = files, names, chain

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        with ExitStack() as stack:
            for path in self._chain.blocks:
                block = self.outer.get_submodule(path)
                stack.enter_context(stand_in(block, self._running(path, block)))
            return self.outer(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, as models of transformers do."""
        find: Callable[[], nn.Module] | None = getattr(self.outer, "get_output_embeddings", None)
        return None if find is None else find()

    def _running(self, path: str, block: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            twin = copied(block)
            vars(twin).pop("forward", None)  # what stands in for it is this function
            return fill_(twin, self._files, self._names, f"{path}.").eval()(*args, **kwargs)

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
    path = Path(folder).expanduser()
    files = WeightFiles.of(path)
    if skeleton is None and not (path / CONFIG).is_file():
        msg = f"{path} has no {CONFIG} that says what the model is: pass skeleton=, the model on the meta device"
        raise CheckpointError(msg)
    model = empty_pretrained(path) if skeleton is None else skeleton.eval()
    if is_sharded(path):
        model = restructure_(copied(model), plan_of_shards(path))
    return Offloaded(model, files, find_chain(on_meta(model), meta_inputs(example_inputs)))
