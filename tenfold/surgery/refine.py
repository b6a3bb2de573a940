"""Refine the repeated blocks of a compressed model, one after the other, by a few gradient steps without labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.calibration.block_gradients import block_roots, rows_of
from tenfold.errors import CalibrationWarning
from tenfold.surgery.modules import find
from tenfold.tracing.block_calls import BlockCall, call_of, output_of, repeated_blocks
from tenfold.tracing.contexts import device_of, kept_modes, same_random_numbers
from tenfold.tracing.masks import real_tokens, token_mask
from tenfold.tracing.samples import parted

Progress = Callable[[int, int], None]

_HELD_OUT = 0.2
_JUDGES = 8  # batches that judge a block, at most
_WEIGHING = 8  # batches by whose gradients errors are weighed, at most
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Refinement:
    """How blocks are refined.

    Attributes:
        steps: gradient steps on each block, each on one batch.
        rate: learning rate of Adam at the first step; it falls to zero in a straight line.
        seed: of the order of the batches.
    """

    steps: int = 25
    rate: float = 1e-4
    seed: int = 0


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
    progress: Progress | None = None,
) -> tuple[RefinedBlock, ...]:
    """Refine the repeated blocks of a compressed model in place, front to back; return what came of each.

    Layers are fitted each on its own, in closed form. What they make together, with the norms and activations between
    them, is drawn here to what the block of the original puts out: all parameters of one block at a time, on what now
    enters it from the blocks refined before (AA-SVD 2026, arXiv 2604.02119). Errors count by the gradients of the
    network's outputs there, as in the fits. A fifth of the samples judges: a block that did not get better there gets
    its parameters back. Memory is that of one batch. No labels are needed.

    Use it after ``apply_sequentially``, where fits alone lose too much and training the whole model is too much work.

    Args:
        model: the compressed model; in evaluation mode meanwhile, so that statistics of batch norms stay.
        original: what it was made from, with the same blocks at the same paths.
        batches: unlabeled inputs as ``call_model`` takes them, on the device of both.
        config: steps, learning rate and seed.
        progress: called with (blocks done, blocks in all).

    Warns:
        CalibrationWarning: the model has no repeated blocks with smaller layers, or they are in half precision.

    Example:
        >>> blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        >>> with warnings.catch_warnings(record=True):
        ...     refine_blocks_(nn.Sequential(*blocks), nn.Sequential(*blocks), [torch.ones(8, 4)])
        ()
    """
    config = config or Refinement()
    paths = _refinable(model, original, batches)
    fitting, judging = parted(original, batches, _HELD_OUT)
    results = []
    with kept_modes(model), kept_modes(original), same_random_numbers(device_of(model)):
        for module in (*model.modules(), *original.modules()):
            module.training = False  # directly: an overridden eval() may do more
        roots = block_roots(original, paths, fitting[:_WEIGHING], seed=config.seed)
        for path in paths:
            block = _Block(model, original, path, config, roots.get(path))
            results.append(block.refine(fitting, judging or fitting))
            if progress is not None:
                progress(len(results), len(paths))
    return tuple(results)


def _refinable(model: nn.Module, original: nn.Module, batches: Sequence[Any]) -> tuple[str, ...]:
    """Return the blocks that can be refined, in the order in which they run; warn where there is none."""
    blocks = [p for p in repeated_blocks(model, batches[0]) if _shapes(find(model, p)) != _shapes(find(original, p))]
    full = [p for p in blocks if not any(t.dtype in _HALVES for t in find(model, p).parameters())]
    if not full:
        why = "its blocks are in half precision" if blocks else "it has no repeated blocks with smaller layers"
        warnings.warn(f"nothing of the model is refined: {why}", CalibrationWarning, stacklevel=3)
    return tuple(full)


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in block.named_parameters()}


@dataclass
class _Block:
    """One block of both models; what enters and leaves it is computed again for each batch, and not held."""

    model: nn.Module
    original: nn.Module
    path: str
    config: Refinement
    root: Tensor | None = None  # by which errors of the output count; None for all alike
    block: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.block = find(self.model, self.path)

    def refine(self, fitting: Sequence[Any], judging: Sequence[Any]) -> RefinedBlock:
        """Take the steps, and take them back where they did not help."""
        judging = judging[:_JUDGES]
        parameters = [p for p in self.block.parameters() if p.is_floating_point()]
        trained = [p.requires_grad for p in parameters]
        before, kept = self.judged(judging), [p.detach().clone() for p in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_()
            self.descend(parameters, fitting)
        finally:
            for parameter, was in zip(parameters, trained, strict=True):
                parameter.grad = None
                parameter.requires_grad_(was)
        after = self.judged(judging)
        better = after < before
        if not better:
            with torch.no_grad():
                for parameter, old in zip(parameters, kept, strict=True):
                    parameter.copy_(old)
        return RefinedBlock(self.path, before, after if better else before, better)

    def descend(self, parameters: Sequence[nn.Parameter], batches: Sequence[Any]) -> None:
        """Take the steps, each on one batch."""
        steps = self.config.steps
        optimizer = torch.optim.Adam(parameters, lr=self.config.rate)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        generator = torch.Generator().manual_seed(self.config.seed)
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            call, wanted = self.pair(batches[order.pop()])
            with torch.enable_grad():
                missed, power = self.missed(call, wanted)
                (missed / power).backward()
            optimizer.step()
            optimizer.zero_grad()
            falling.step()

    @torch.no_grad()
    def judged(self, batches: Sequence[Any]) -> float:
        """Return Σ‖y − ŷ‖²/Σ‖y‖² of the block's output over some batches."""
        sums = [self.missed(*self.pair(batch)) for batch in batches]
        return float(sum(missed for missed, _ in sums) / sum(power for _, power in sums))

    def pair(self, batch: Any) -> tuple[tuple[BlockCall, Tensor | None], Tensor]:
        """Return how the block is called now, with the tokens that are real, and what it puts out in the original."""
        call, mask = call_of(self.model, self.path, batch), token_mask(batch, self.model)
        return (call, mask), real_tokens(output_of(self.original, self.path, batch), mask)

    def missed(self, at: tuple[BlockCall, Tensor | None], wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖y − ŷ‖² and ‖y‖² over the real tokens of a batch."""
        call, mask = at
        found = real_tokens(call.run(self.block), mask)
        missed, power = (self.weighed(t) for t in (found - wanted, wanted))
        return missed, power.clamp_min(torch.finfo(torch.float32).tiny)

    def weighed(self, output: Tensor) -> Tensor:
        """Return the sum of the squares of outputs (..., channels) or (n, channels, ...), as they count."""
        rows = rows_of(output).float()
        return (rows if self.root is None else rows @ self.root.to(rows)).square().sum()
