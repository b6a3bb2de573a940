"""Shortcut correction: targets of layers at the end of a residual branch, so that the sum with the shortcut is met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tenfold.decompositions import Sketch
from tenfold.records import LayerSpec
from tenfold.surgery.batchnorm import BATCH_NORMS
from tenfold.tracing.replay import Replay
from tenfold.tracing.trace import Trace

# Channels that batch norm scales to less than this share of the largest are dead: a correction cannot pass them.
DEAD = 1e-3


@dataclass(frozen=True, eq=False)
class Branch:
    """Sum of a layer's output y with a shortcut: out = scale·y + shift + shortcut.

    Attributes:
        last: the module whose output is added to the shortcut: the layer itself, or the batch norm after it.
        scale: γ/√(var + ε) of that batch norm (out,); None for the layer itself.
    """

    last: str
    scale: Tensor | None = None

    def importance(self, spec: LayerSpec) -> Sketch | None:
        """Return how output errors of the layer weigh in the sum, as ``Moments.output_gram``; None if all are equal."""
        if self.scale is None or len(self.scale) != spec.out_channels:
            return None
        return Sketch.diagonal_of(self.scale.double().square().view(spec.groups, -1))

    def correction(self, lost: Tensor) -> Tensor:
        """Return what to add to the layer's outputs so that ``lost`` is added to the sum; 0 in dead channels."""
        if self.scale is None:
            return lost
        live = self.scale.abs() > DEAD * self.scale.abs().max()
        inverse = torch.where(live, 1 / self.scale, torch.zeros_like(self.scale))
        return lost * inverse.view(-1, *[1] * (lost.dim() - 2))  # batch norm has its channels on axis 1


def branch_of(model: nn.Module, trace: Trace | Replay, path: str) -> Branch | None:
    """Return the branch that ends with the layer at ``path``; None unless its whole output is added to one shortcut."""
    if trace.is_added(path):
        return Branch(path)
    follower = trace.follower(path)
    norm = None if follower is None else model.get_submodule(follower)
    if follower is None or not isinstance(norm, BATCH_NORMS) or norm.running_var is None:
        return None
    if not trace.is_added(follower):
        return None
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt()
        return Branch(follower, scale if norm.weight is None else scale * norm.weight)


def targets(dense: Replay, new: Replay, path: str, branch: Branch | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over inputs of a layer of the new model and target outputs, with its bias, batch by batch.

    Targets are the outputs in the dense model; with a branch, plus what the shortcut has lost.
    """
    if branch is None:
        yield from zip(new.inputs(path), dense.outputs(path), strict=True)
        return
    latest: list[Tensor] = []
    own = new.branches(path, branch.last, instead=iter(latest.pop, None))
    for _, y, dense_shortcut in dense.branches(path, branch.last):
        latest.append(y)
        x, _, shortcut = next(own)
        yield x, y + branch.correction(dense_shortcut - shortcut)
