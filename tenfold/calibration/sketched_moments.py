"""Sketched input moments of wide layers, in one pass with bounded memory.

Up to k rows are stored as they are, which is exact. Beyond that each row is projected to z = [1, Ωᵀx] with a seeded
Gaussian Ω (n, k), and only the sums of z xᵀ and z yᵀ are kept: the single-pass Nyström approximation of Tropp,
Yurtsever, Udell and Cevher 2017 (arXiv 1706.05736). It is close to the best approximation of rank k, does not depend on
the order of the rows, and costs 2·k·n multiply-adds per row. The diagonal is summed separately, so variances are exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tenfold.calibration.shares import Together
from tenfold.decompositions import Moments, Sketch
from tenfold.tensors import symmetrize_

# A sketch, the mean, and where there are targets their means and mean squares.
_Parts = tuple[Sketch, Tensor, Tensor | None, Tensor | None]

_CHUNK = 1 << 22  # entries of the sums that are transformed at a time


def sketch_size(width: int, widest: int) -> int:
    """Return the number of rows of a sketch of inputs of this width: no more entries than a matrix ``widest`` wide.

    Example:
        >>> sketch_size(25088, 8192), sketch_size(8193, 8192)
        (2674, 4096)
    """
    return max(1, min(widest * widest // width, width // 2))


class SketchSums:
    """Stored rows of one layer, or the sums of their projections, in float64.

    Args:
        size: rows k of the sketch.
        seed: of the projection.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.count = 0
        self._seed = seed
        self._held: list[tuple[Tensor, Tensor | None]] = []
        self._probe: Tensor | None = None
        self._eps = 0.0
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows x (groups, n, rows), float32 or float64, with their targets y (groups, out/groups, rows)."""
        self.count += x.shape[-1]
        self._eps = max(self._eps, torch.finfo(x.dtype).eps)
        if self.count <= self.size:
            self._held.append((x.clone(), None if y is None else y.clone()))  # views of what may change in place
            return
        while self._held:
            self._project(*self._held.pop(0))
        self._project(x, y)

    def _project(self, x: Tensor, y: Tensor | None) -> None:
        probe = self._draw(x.shape[1], x.device)
        z = torch.cat([x.new_ones(len(x), 1, x.shape[-1]), probe.to(x.dtype).mT @ x], dim=1)
        if "rows" not in self._sums:
            self._sums["rows"] = x.new_zeros(*z.shape[:2], x.shape[1], dtype=torch.float64)
        for part in _parts(x.shape[1], self.size):
            self._sums["rows"][:, :, part] += z @ x[:, part].mT
        self._sum("power", torch.linalg.vector_norm(x, dim=-1).square())
        if y is not None:
            self._sum("targets", z @ y.mT)
            self._sum("target_power", y.square().sum(-1))

    def _draw(self, width: int, device: torch.device) -> Tensor:
        """Return Ω (n, k), drawn at the first call."""
        if self._probe is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._probe = torch.randn(width, self.size, generator=generator).to(device)
        return self._probe

    def _sum(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(value)
        else:
            self._sums[name] = value.double()

    def gather(self, together: Together) -> None:
        """Make these the sums of all processes, each of which calls this."""
        counts, eps = zip(*together.everyones((self.count, self._eps)), strict=True)
        self.count, self._eps = sum(counts), max(eps)
        if self.count <= self.size:
            self._held = [rows for held in together.everyones(self._held) for rows in held]
            return
        while self._held:
            self._project(*self._held.pop(0))
        self._sums = together.summed(self._sums)
        self._draw(self._sums["rows"].shape[-1], self._sums["rows"].device)

    def finite(self) -> bool:
        """Return whether all inputs that were added are finite, and so are their products."""
        stored = [x for x, _ in self._held] if self._probe is None else [self._sums["rows"], self._sums["power"]]
        return all(bool(torch.isfinite(t.sum(-1)).all()) for t in stored)  # of the sums, which are small

    def moments(self) -> Moments:
        """Return the moments of all rows, with a sketch as second moment. Frees the sums: add nothing afterwards."""
        sketch, mean, target_mean, target_power = self._exact() if self._probe is None else self._approximate()
        return Moments(sketch, mean, self.count, None, target_mean, target_power)

    def sketch(self) -> Sketch:
        """Return the second moment alone of all rows, not centred. Frees the sums too."""
        return (self._exact() if self._probe is None else self._approximate())[0]

    def _exact(self) -> _Parts:
        held, self._held = self._held, []
        targets = [y.mT for _, y in held if y is not None]
        sketch = Sketch.of(torch.cat([x.mT for x, _ in held], dim=1), torch.cat(targets, dim=1) if targets else None)
        mean = sketch.rows.mean(1) * self.count**0.5
        if sketch.targets is None:
            return sketch, mean, None, None
        target_mean = sketch.targets.mean(1) * self.count**0.5
        return sketch, mean, target_mean, _squares(sketch.targets)

    def _approximate(self) -> _Parts:
        """Return a sketch that has the mean as its first row, followed by centered rows."""
        means = {name: self._sums.pop(name).div_(self.count) for name in list(self._sums)}
        rows, targets = means["rows"], means.get("targets")
        mean, target_mean = rows[:, 0].clone(), None if targets is None else targets[:, 0].clone()
        turn = self._whitening(rows, targets)
        for part in _parts(rows.shape[-1], self.size):
            rows[:, 1:, part] = turn @ rows[:, 1:, part]
        if targets is not None:
            targets[:, 1:] = turn @ targets[:, 1:]
        constant = torch.zeros_like(rows[:, :, 0])
        constant[:, 0] = 1
        sketch = Sketch(rows, (means["power"] - _squares(rows)).clamp_min(0), constant, targets)
        return sketch, mean, target_mean, means.get("target_power")

    def _whitening(self, rows: Tensor, targets: Tensor | None) -> Tensor:
        """Center Ωᵀ E[x xᵀ] and Ωᵀ E[x yᵀ] in place; return (Ωᵀ C Ω)^-½ (groups, k, k), which turns them into rows."""
        shift = torch.zeros_like(rows[:, 1:, :1])
        square = torch.zeros_like(shift).expand(-1, -1, self.size).clone()
        for part, probe in self._probes():
            shift += probe.mT @ rows[:, 0, part, None]
        rows[:, 1:].addcmul_(shift, rows[:, :1], value=-1)
        if targets is not None:
            targets[:, 1:].addcmul_(shift, targets[:, :1], value=-1)
        for part, probe in self._probes():
            square += rows[:, 1:, part] @ probe
        values, vectors = torch.linalg.eigh(symmetrize_(square))
        # Smaller eigenvalues are rounding errors of the products that were summed.
        kept = values > 10 * self._eps * values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny)
        inverse = torch.where(kept, values, torch.ones_like(values)).rsqrt() * kept
        turn: Tensor = inverse.unsqueeze(-1) * vectors.mT
        return turn

    def _probes(self) -> Iterator[tuple[slice, Tensor]]:
        """Iterate over Ω (n, k) in float64, some rows at a time."""
        if self._probe is not None:
            for part in _parts(len(self._probe), self.size):
                yield part, self._probe[part].double()


def _parts(width: int, height: int) -> Iterator[slice]:
    step = max(1, _CHUNK // height)
    for start in range(0, width, step):
        yield slice(start, start + step)


def _squares(rows: Tensor) -> Tensor:
    """Return the sums of squares of the columns of (groups, k, n), without a copy of them."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-2)
    return norms.square()
