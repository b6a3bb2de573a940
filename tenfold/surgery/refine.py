"""Refine the repeated blocks of a compressed model, one after the other, by a few gradient steps without labels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.calibration.block_gradients import block_roots, rows_of
from tenfold.calibration.last_layer import LastLayer
from tenfold.errors import CalibrationWarning, CheckpointError, warn
from tenfold.files import atomic_write, check_writable
from tenfold.surgery.modules import find
from tenfold.tensors.digests import digest
from tenfold.tensors.tensor_file import check_digest, read_tensors, write_tensors
from tenfold.tracing.block_calls import BlockCall, repeated_blocks, without_cache
from tenfold.tracing.contexts import device_of, kept_modes, same_random_numbers
from tenfold.tracing.inputs import call_model, digest_batches, tensors_in
from tenfold.tracing.masks import real_tokens, token_mask
from tenfold.tracing.replay import Replay
from tenfold.tracing.samples import parted

logger = logging.getLogger("tenfold")

Progress = Callable[[int, int], None]

_HELD_OUT = 0.2
_JUDGES = 8  # batches that judge a block, at most
_WEIGHING = 8  # batches by whose gradients errors are weighed, at most
_HALVES = (torch.float16, torch.bfloat16)
_HEADER = "block"


@dataclass(frozen=True)
class Refinement:
    """How blocks are refined.

    Attributes:
        steps: gradient steps on each block, each on one batch.
        rate: learning rate of Adam at the first step; it falls to zero in a straight line.
        seed: of the order of the batches.
        max_cache: bytes of what enters and leaves one block that are held of each of the two models; beyond that they
            are computed again, with the same result.
    """

    steps: int = 25
    rate: float = 1e-4
    seed: int = 0
    max_cache: int = 4 << 30

    def order(self, batches: int) -> list[int]:
        """Return which of the batches each step is on: all of them in turn, shuffled."""
        generator = torch.Generator().manual_seed(self.seed)
        rounds = -(-self.steps // batches)
        return [i for _ in range(rounds) for i in torch.randperm(batches, generator=generator).tolist()][: self.steps]


@dataclass(frozen=True)
class RefinedBlock:
    """A block with the squared error of its output on held-out samples, as a share of the output's own square.

    Both are weighed by what errors there cost the network.
    """

    path: str
    before: float
    after: float
    kept: bool


def refine_blocks_(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Any],
    config: Refinement | None = None,
    *,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[RefinedBlock, ...]:
    """Refine the repeated blocks of a compressed model in place, front to back; return what came of each.

    Layers are fitted each on its own, in closed form. What they make together, with the norms and activations between
    them, is drawn here to what the block of the original puts out: all parameters of one block at a time, on what now
    enters it from the blocks refined before (AA-SVD 2026, arXiv 2604.02119). Errors count by the gradients of the
    network's outputs there, as in the fits. A fifth of the samples judges: a block that did not get better there gets
    its parameters back. No labels are needed.

    What enters a block, and what the original puts out there, is computed once and held while that block is refined,
    never for two blocks at a time.

    Use it after ``apply_sequentially``, where fits alone lose too much and training the whole model is too much work.

    Args:
        model: the compressed model; in evaluation mode meanwhile, so that statistics of batch norms stay.
        original: what it was made from, with the same blocks at the same paths.
        batches: unlabeled inputs as ``call_model`` takes them, on the device of both.
        config: steps, learning rate and seed.
        folder: where each block is kept once it is refined. The same call, on the same models and batches, then goes on
            where it was killed and ends with the same bits. Files of other calls are left alone.
        progress: called with (blocks done, blocks in all).

    Raises:
        CheckpointError: a block in the folder is damaged.
        FileError: the folder cannot be written to.

    Warns:
        CalibrationWarning: the model has no repeated blocks with smaller layers, or they are in half precision.

    Example:
        >>> import warnings
        >>> blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        >>> with warnings.catch_warnings(record=True):
        ...     refine_blocks_(nn.Sequential(*blocks), nn.Sequential(*blocks), [torch.ones(8, 4)])
        ()
    """
    config = config or Refinement()
    with (
        kept_modes(model),
        kept_modes(original),
        without_cache(model),
        without_cache(original),
        same_random_numbers(device_of(model)),
    ):
        for module in (*model.modules(), *original.modules()):
            module.training = False  # directly: an overridden eval() may do more
        results = []
        for done, total, block in _refined(model, original, batches, config, folder):
            results.append(block)
            if progress is not None:
                progress(done, total)
    return tuple(results)


def _refined(
    model: nn.Module, original: nn.Module, batches: Sequence[Any], config: Refinement, folder: str | Path | None
) -> Iterator[tuple[int, int, RefinedBlock]]:
    """Refine one block after the other; yield how many are done, of how many, and what came of the last."""
    paths = _refinable(model, original, batches)
    if not paths:
        return
    fitting, judging = parted(original, batches, _HELD_OUT)
    order = config.order(len(fitting))
    used = sorted({*order, *(() if judging else range(len(fitting))[:_JUDGES])})
    rows = [*(fitting[i] for i in used), *judging[:_JUDGES]]
    steps = [used.index(i) for i in order]
    judges = range(len(used), len(rows)) if judging else range(len(used))[:_JUDGES]
    last = LastLayer.of(original, rows[0], call_model)
    forward = None if last is None else last.leave_out  # nothing is asked of what comes after the blocks
    dense = Replay(original, rows, forward=forward, limit=config.max_cache, changing=False, seed=config.seed)
    changing = Replay(model, rows, forward=forward, limit=config.max_cache, like=dense)
    every = [*range(len(rows))]
    paths = tuple(path for path in paths if dense.places(path) == changing.places(path) == every)
    kept = None if folder is None else _Kept.of(Path(folder), model, original, batches, config)
    known = [] if kept is None else kept.restore(model, paths)
    for done, block in enumerate(known, 1):
        yield done, len(paths), block
    paths_left = paths[len(known) :]
    roots = block_roots(original, paths_left, fitting[:_WEIGHING], seed=config.seed) if paths_left else {}
    for done, path in enumerate(paths_left, len(known) + 1):
        pairs = _Pairs(dense, changing, path, rows, config.max_cache)
        found = _Block(pairs, config, roots.get(path)).refine(steps, judges)
        del pairs  # before the next block holds its own
        if kept is not None:
            kept.write(done, find(model, path), found)
        yield done, len(paths), found


def _refinable(model: nn.Module, original: nn.Module, batches: Sequence[Any]) -> tuple[str, ...]:
    """Return the blocks that can be refined, in the order in which they run; warn where there is none."""
    blocks = [p for p in repeated_blocks(model, batches[0]) if _shapes(find(model, p)) != _shapes(find(original, p))]
    full = [p for p in blocks if not any(t.dtype in _HALVES for t in find(model, p).parameters())]
    if not full:
        why = "its blocks are in half precision" if blocks else "it has no repeated blocks with smaller layers"
        warn(f"nothing of the model is refined: {why}", CalibrationWarning)
    return tuple(full)


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in block.named_parameters()}


@dataclass(frozen=True)
class _Kept:
    """The files of refined blocks: one for each, by a fingerprint of all that they depend on."""

    folder: Path
    name: str

    @classmethod
    def of(
        cls, folder: Path, model: nn.Module, original: nn.Module, batches: Sequence[Any], config: Refinement
    ) -> _Kept:
        facts = [digest({**dict(net.named_parameters()), **dict(net.named_buffers())}) for net in (model, original)]
        facts += [digest_batches(batches), f"{config.steps} {config.rate} {config.seed}"]
        kept = cls(folder, digest({}, " ".join(facts)))
        check_writable(kept.path(0))  # now, and not after the first block
        return kept

    def path(self, number: int) -> Path:
        return self.folder / f"block-{self.name[:12]}-{number:03d}.safetensors"

    def write(self, number: int, block: nn.Module, found: RefinedBlock) -> None:
        """Keep a block as it is now."""
        tensors = dict(block.named_parameters()) if found.kept else {}
        with atomic_write(self.path(number)) as partial:
            write_tensors(partial, tensors, {_HEADER: json.dumps(asdict(found))}, (_HEADER,))

    def restore(self, model: nn.Module, paths: Sequence[str]) -> list[RefinedBlock]:
        """Give the blocks that are kept, up to the first that is not, the parameters that were found for them."""
        results: list[RefinedBlock] = []
        for number, path in enumerate(paths, 1):
            file = self.path(number)
            if not file.is_file():
                break
            try:
                tensors, header = read_tensors(file)
                check_digest(file, tensors, header, (_HEADER,))
            except CheckpointError as error:
                msg = f"{error} Delete it, and its block is refined again."
                raise CheckpointError(msg) from error
            own = dict(find(model, path).named_parameters())
            with torch.no_grad():
                for name, tensor in tensors.items():
                    own[name].copy_(tensor)
            results.append(RefinedBlock(**json.loads(header[_HEADER])))
        if results:
            logger.info("resuming after block %d of %d from %s", len(results), len(paths), self.folder)
        return results


@dataclass(eq=False)
class _Pairs:
    """How one block is called on each batch now, and what it puts out in the original."""

    dense: Replay
    changing: Replay
    path: str
    batches: Sequence[Any]
    limit: int
    _held: dict[int, _Pair] = field(default_factory=dict)

    def __post_init__(self) -> None:
        room = self.limit
        both = zip(self.changing.calls(self.path), self.dense.outputs(self.path), strict=True)
        for number, (call, output) in enumerate(both):
            pair = self._pair(number, call, output)
            room -= sum(t.numel() * t.element_size() for t in tensors_in((call.args, call.kwargs, pair.wanted)))
            if room < 0:
                break
            self._held[number] = pair

    def __getitem__(self, number: int) -> _Pair:
        if number in self._held:
            return self._held[number]
        return self._pair(
            number, next(self.changing.calls(self.path, number)), next(self.dense.outputs(self.path, number))
        )

    def _pair(self, number: int, call: BlockCall, output: Tensor) -> _Pair:
        mask = token_mask(self.batches[number], self.changing.model)
        return _Pair(call, real_tokens(output, mask), mask)


@dataclass(frozen=True, eq=False)
class _Pair:
    call: BlockCall
    wanted: Tensor
    mask: Tensor | None


@dataclass
class _Block:
    """One block that is refined."""

    pairs: _Pairs
    config: Refinement
    root: Tensor | None = None  # by which errors of the output count; None for all alike
    block: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.block = find(self.pairs.changing.model, self.pairs.path)

    def refine(self, steps: Sequence[int], judges: Sequence[int]) -> RefinedBlock:
        """Take a step on each of some batches, and take all back where others say that they did not help."""
        parameters = [p for p in self.block.parameters() if p.is_floating_point()]
        trained = [p.requires_grad for p in parameters]
        before, kept = self.judged(judges), [p.detach().clone() for p in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_()
            self.descend(parameters, steps)
        finally:
            for parameter, was in zip(parameters, trained, strict=True):
                parameter.grad = None
                parameter.requires_grad_(was)
        after = self.judged(judges)
        better = after < before
        if not better:
            with torch.no_grad():
                for parameter, old in zip(parameters, kept, strict=True):
                    parameter.copy_(old)
        return RefinedBlock(self.pairs.path, before, after if better else before, better)

    def descend(self, parameters: Sequence[nn.Parameter], steps: Sequence[int]) -> None:
        """Take a step on each of some batches."""
        optimizer = torch.optim.Adam(parameters, lr=self.config.rate)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
        for number in steps:
            with torch.enable_grad():
                missed, power = self.missed(number)
                (missed / power).backward()
            optimizer.step()
            optimizer.zero_grad()
            falling.step()

    @torch.no_grad()
    def judged(self, batches: Sequence[int]) -> float:
        """Return Σ‖y − ŷ‖²/Σ‖y‖² of the block's output over some batches."""
        sums = [self.missed(number) for number in batches]
        return float(sum(missed for missed, _ in sums) / sum(power for _, power in sums))

    def missed(self, number: int) -> tuple[Tensor, Tensor]:
        """Return ‖y − ŷ‖² and ‖y‖² over the real tokens of a batch."""
        pair = self.pairs[number]
        found = real_tokens(pair.call.run(self.block), pair.mask)
        missed, power = (self.weighed(t) for t in (found - pair.wanted, pair.wanted))
        return missed, power.clamp_min(torch.finfo(torch.float32).tiny)

    def weighed(self, output: Tensor) -> Tensor:
        """Return the sum of the squares of outputs (..., channels) or (n, channels, ...), as they count."""
        rows = rows_of(output).float()
        return (rows if self.root is None else rows @ self.root.to(rows)).square().sum()
