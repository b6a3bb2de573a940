"""The perplexity of a language model that does not fit into memory: all sequences through a block, then the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.files import scratch
from tenfold.streaming.activations import Activations
from tenfold.streaming.network_parts import BlockInputs, Tail, block_calls, run_block
from tenfold.streaming.offloaded import Offloaded, open_offloaded
from tenfold.tasks.perplexity import perplexity
from tenfold.tensors.free_memory import give_back

Progress = Callable[[int, int], None]


def streamed_perplexity(
    folder: str | Path,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    skeleton: nn.Module | None = None,
    progress: Progress | None = None,
) -> float:
    """Return the perplexity of the language model in a folder, of which one block is in memory at a time.

    Use it to score what does not fit into memory, dense or compressed: the number is that of ``perplexity``, and each
    weight is read once, however many sequences there are. What lies between two blocks is in a temporary file: for each
    token as many numbers as the model is wide.

    Args:
        folder: see ``open_offloaded``.
        batches: ``{"input_ids": (batch, length)}``, without padding; small ones, since one at a time goes through a
            block.
        skeleton: see ``open_offloaded``.
        progress: called with (blocks done, blocks in all).

    Raises:
        CheckpointError: weights are missing, or not those of the model.
        DataError: there is no token to predict.
        PlanError: the model is no chain of blocks.
    """
    ids = [batch["input_ids"] for batch in batches]
    if not ids:
        msg = "there is no token to predict: pass at least one batch"
        raise DataError(msg)
    model = open_offloaded(folder, {"input_ids": ids[0]}, skeleton=skeleton)
    with scratch() as place, torch.no_grad():
        stored = _behind_blocks(model, ids, place, progress)
        after = _AfterBlocks(model)
        return perplexity(after, _Shown(after, ids, stored))


def _behind_blocks(model: Offloaded, ids: Sequence[Tensor], place: Path, progress: Progress | None) -> Activations:
    """Return what the last block puts out, for each batch."""
    depth, file = len(model.chain.blocks), place / "0"
    with Activations.writing(file) as write:
        known = BlockInputs.of(model.outer, model.chain, dict(enumerate({"input_ids": own} for own in ids)), write)
    for number in range(depth):
        entering, file = Activations.of(file), place / str(number + 1)
        block = model.block(number)
        with Activations.writing(file) as write:
            for batch in block_calls(known, number, entering, range(len(ids))):
                write(run_block(block, batch))
        del block
        entering.path.unlink()
        give_back()
        if progress is not None:
            progress(number + 1, depth)
    return Activations.of(file)


class _AfterBlocks(nn.Module):
    """What comes after the blocks, as a model of tokens: those of one batch, and the first ones of its rows."""

    def __init__(self, model: Offloaded) -> None:
        super().__init__()
        self.tail, self._head = Tail(model.outer, model.chain), model.get_output_embeddings
        self.ids, self.hidden = torch.empty(0, 0), torch.empty(0)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, as models of transformers do."""
        return self._head()

    def forward(self, input_ids: Tensor) -> Any:
        """Return the outputs of the network for some rows of the batch, or for the first tokens of these."""
        length = input_ids.shape[1]
        rows = [int((self.ids[:, :length] == row).all(1).nonzero()[0]) for row in input_ids]
        return self.tail(self.hidden[rows, :length], input_ids=input_ids)


@dataclass(frozen=True, eq=False)
class _Shown:
    """Batches, each of which a model is shown before it is asked about it."""

    model: _AfterBlocks
    ids: Sequence[Tensor]
    stored: Activations = field(repr=False)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number, own in enumerate(self.ids):
            self.model.ids, self.model.hidden = own, self.stored.read(number)
            yield {"input_ids": own}
