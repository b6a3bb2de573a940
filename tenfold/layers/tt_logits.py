"""Products of hidden states with the transposed table of a train: scores of all words without the table."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from tenfold.records import TrainShape


def train_logits(cores: Sequence[Tensor], shape: TrainShape, hidden: Tensor) -> Tensor:
    """Return hidden (..., ∏ column modes) @ tableᵀ, shape (..., ∏ row modes), contracted core by core.

    Args:
        cores: shapes ``shape.core_shapes``.
        shape: modes and ranks.
        hidden: of the dtype of the cores.
    """
    lead = hidden.shape[:-1]
    forwards, backwards = _sweep_macs(shape), _sweep_macs(_mirrored(shape))
    flat = hidden.reshape(-1, *shape.col_modes)
    if forwards <= backwards:
        found = _sweep(cores, flat)
    else:
        turned = [core.transpose(1, 3) for core in reversed(cores)]
        axes = range(1, flat.dim())
        found = _sweep(turned, flat.permute(0, *reversed(axes)))
        found = found.permute(0, *reversed(axes))
    return found.reshape(*lead, prod(shape.row_modes))


def _sweep(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Contract the first core with the first column mode, and so on: (batch, n₁, ..., n_d) to (batch, m₁, ..., m_d)."""
    batch, modes = len(x), list(x.shape[1:])
    done = 1
    x = x.reshape(batch, 1, modes[0], -1)  # (batch, rows so far, r·n, rest)
    for k, core in enumerate(cores):
        rows, left, columns, right = core.shape
        weight = core.permute(0, 3, 1, 2).reshape(rows * right, left * columns)
        x = torch.matmul(weight, x.reshape(batch * done, left * columns, -1))
        done *= rows
        if k + 1 < len(cores):
            x = x.reshape(batch, done, right * modes[k + 1], -1)
    return x.reshape(batch, *(core.shape[0] for core in cores))


def _sweep_macs(shape: TrainShape) -> int:
    """Return the multiply-accumulates of ``_sweep`` for one hidden state."""
    sides, total = shape.sides, 0
    for k, (m, n) in enumerate(zip(shape.row_modes, shape.col_modes, strict=True)):
        done, rest = prod(shape.row_modes[:k]), prod(shape.col_modes[k + 1 :])
        total += done * sides[k] * n * m * sides[k + 1] * rest
    return total


def _mirrored(shape: TrainShape) -> TrainShape:
    return TrainShape(row_modes=shape.row_modes[::-1], col_modes=shape.col_modes[::-1], ranks=shape.ranks[::-1])
