"""Compression of tensors to a core in orthonormal bases of their modes before CP (CANDELINC; Bro & Andersson 1998)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import torch
from torch import Tensor

# Gram matrices are summed in float64 over so many columns at a time.
_PIECE = 1024

# A basis pays where it leaves less than this share of a mode.
_WORTH = 0.9


@dataclass(frozen=True, eq=False)
class TuckerCompression:
    """A batch of tensors as a core in orthonormal bases: X = core ×_1 Q_1 ×_2 Q_2 … (a lossless Tucker decomposition).

    Attributes:
        core: (batch, r_1, …, r_N).
        bases: for each mode the basis (batch, n, r); None where the mode is not compressed.
        lossless: whether the core is all there is of the tensors, but for rounding.
    """

    core: Tensor
    bases: tuple[Tensor | None, ...]
    lossless: bool = True

    @classmethod
    def trivial(cls, tensor: Tensor) -> Self:
        """Return the tensors uncompressed."""
        return cls(tensor, (None,) * (tensor.dim() - 1))

    @classmethod
    def of(cls, tensor: Tensor, most: int | None = None) -> Self:
        """Return tensors (batch, n_1, …) in bases that keep all but rounding: 1e-7 of the norm, in float64 3e-8.

        With ``most``, modes that need more columns than that keep their leading ones (a truncated HOSVD).
        """
        total = torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64).square()
        share = 1e-14 if tensor.dtype == torch.float32 else 1e-15
        core = tensor
        bases: list[Tensor | None] = [None] * (tensor.dim() - 1)
        lossless = True
        for mode in sorted(range(len(bases)), key=lambda m: -tensor.shape[m + 1]):
            side = core.movedim(mode + 1, 1)
            basis, whole = _range(side.flatten(2), total * share, most)
            lossless = lossless and whole
            if basis is not None:
                core = (basis.mT @ side.flatten(2)).unflatten(2, side.shape[2:]).movedim(1, mode + 1).contiguous()
            bases[mode] = basis
        return cls(core, tuple(bases), lossless)

    def lift(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return factors (batch, n, R) of the tensors from those of the core."""
        return [f if b is None else b @ f for f, b in zip(factors, self.bases, strict=True)]

    def project(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return factors (batch, r, R) for the core from those of the tensors."""
        return [f if b is None else b.mT @ f for f, b in zip(factors, self.bases, strict=True)]


def _range(matrix: Tensor, negligible: Tensor, most: int | None) -> tuple[Tensor | None, bool]:
    """Return a basis (batch, n, r) of the columns of (batch, n, m), and whether it spans them but for rounding.

    ``negligible`` are the squares that count as rounding. None where a basis would not pay.
    """
    rows, columns = matrix.shape[1:]
    if rows == 1:
        return None, True
    frame = None
    if rows > columns:
        frame, triangle = torch.linalg.qr(matrix.double())
        square = triangle @ triangle.mT
    else:  # piece by piece: the whole of it in float64 would be the largest thing in memory
        pieces = (piece.double() for piece in matrix.split(_PIECE, dim=2))
        square = reduce(torch.add, (piece @ piece.mT for piece in pieces))
    values, vectors = torch.linalg.eigh(square)
    needed = max(int((values.clamp_min(0).cumsum(-1) > negligible[:, None]).sum(-1).max()), 1)
    size = needed if most is None else min(needed, most)
    if size > _WORTH * rows:
        return None, True
    basis = vectors[..., -size:].flip(-1)
    whole: Tensor = basis if frame is None else frame @ basis
    return whole.to(matrix.dtype), size == needed
