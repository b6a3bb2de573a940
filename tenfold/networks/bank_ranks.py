"""How much each bank of kernels keeps: ranks of least error within a number of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from tenfold.allocation.knapsack import solve
from tenfold.networks.joint_fit import BankProblem
from tenfold.networks.kernel_bank import KernelBank
from tenfold.networks.tucker_bank import TuckerBank
from tenfold.tensors import gram, mode_product

_STEPS = 16  # ranks of each mode that are tried
_BONDS = 12

Option = tuple[dict[str, int], int, float]


def choose_ranks(
    problems: Sequence[BankProblem], limit: int, kind: type[KernelBank] = TuckerBank
) -> tuple[dict[str, int], ...]:
    """Return the ranks of banks that lose least together, of at most ``limit`` parameters in all.

    The error at every rank comes from one HOSVD of the whitened kernels of each bank: what its core has outside of the
    leading ranks, of a train besides the tail of the singular values between layers and taps. The exact knapsack then
    chooses, as for the layers of a plan; shared factors count once. Full ranks, the dense kernels, are an option too.

    Args:
        problems: of the banks.
        limit: parameters of all banks together.
        kind: ``TuckerBank`` or ``TrainBank``.

    Raises:
        BudgetError: the limit cannot be met.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> kernels = [torch.randn(16, 16, 3, 3, generator=draw) for _ in range(4)]
        >>> (ranks,) = choose_ranks([BankProblem.of(kernels)], 4000)
        >>> TuckerBank.count((4, 16, 16, 3, 3), ranks) <= 4000
        True
    """
    tables = [_options(problem, kind) for problem in problems]
    errors = [[error for _, _, error in table] for table in tables]
    costs = [[cost for _, cost, _ in table] for table in tables]
    chosen = solve(errors, costs, [limit], names=["params"]).choice
    return tuple(table[at][0] for table, at in zip(tables, chosen, strict=True))


def _options(problem: BankProblem, kind: type[KernelBank]) -> list[Option]:
    """Return ranks, parameters and error of the options of one bank, the full ranks the last."""
    white = problem.whitened()
    core = _rotated(white.weights)
    shape = tuple(problem.weights.shape)
    # The scale at which errors of different banks compare: that of the exact measure.
    scale = float(sum(problem.errors(torch.zeros_like(problem.weights)))) / float(core.square().sum())
    if issubclass(kind, TuckerBank):
        found = _tucker(core, shape)
    else:
        found = _train(core, shape, kind)
    dense = prod(shape)
    options = [(ranks, kind.count(shape, ranks), scale * error) for ranks, error in found]
    full = dict(zip(kind.rank_names, (shape[0], *shape[1:3]), strict=True))
    own = kind.check_ranks(shape, {} if not issubclass(kind, TuckerBank) else full)
    return [option for option in options if option[1] < dense] + [(own, kind.count(shape, own), 0.0)]


def _rotated(weights: Tensor) -> Tensor:
    """Return the HOSVD core of weights, of full size, its leading slices first along layers, outputs and inputs."""
    core = weights
    for mode in range(3):
        vectors = torch.linalg.eigh(gram(weights.movedim(mode, 0).flatten(1))).eigenvectors.flip(-1)
        core = mode_product(core, vectors.mT, mode)
    return core


def _tucker(core: Tensor, shape: tuple[int, ...]) -> list[tuple[dict[str, int], float]]:
    energy = core.flatten(3).square().sum(-1)
    kept = energy.cumsum(0).cumsum(1).cumsum(2)
    total = float(kept[-1, -1, -1])
    axes = [_axis(n) for n in shape[:3]]
    axes[0] = list(range(1, shape[0] + 1))
    return [
        ({"layers": a, "out": b, "in": c}, max(total - float(kept[a - 1, b - 1, c - 1]), 0.0))
        for a in axes[0]
        for b in axes[1]
        for c in axes[2]
    ]


def _train(core: Tensor, shape: tuple[int, ...], kind: type[KernelBank]) -> list[tuple[dict[str, int], float]]:
    total = float(core.square().sum())
    found = []
    for out in _axis(shape[1]):
        for into in _axis(shape[2]):
            part = core[:, :out, :into].flatten(3)
            values = torch.linalg.svdvals(part.transpose(0, 1).flatten(0, 1).flatten(1))
            kept = values.square().cumsum(0)
            most = kind.max_ranks(shape, {"out": out, "in": into})["layers"]
            for bond in np.unique(np.linspace(1, most, _BONDS).round().astype(int)).tolist():
                lost = max(total - float(kept[bond - 1]), 0.0)
                found.append(({"layers": bond, "out": out, "in": into}, lost))
    return found


def _axis(size: int) -> list[int]:
    """Return the ranks of a mode that are tried, the full one among them."""
    return sorted({round(float(n)) for n in np.linspace(max(1, size / _STEPS), size, min(_STEPS, size))})
