"""MoDeGPT (ICLR 2025, arXiv 2408.09632): MLPs by Nyström, values and outputs by one SVD, shares by block influence.

Queries and keys stay: the RMS norms that the model puts on them see all directions of a head, so that none can be left
out exactly. What they do not give, the other two parts give.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.language.pairs import RIDGE, shrunk
from benchmarks.language.protocol import Protocol
from benchmarks.language.statistics import Statistics

SPREADS = (0.1, 0.3, 1.0, 10.0)  # ε of the softmax over blocks, chosen by the divergence on held-out sequences
MOST = 0.8  # of a block's parts is removed at most


def modegpt(protocol: Protocol) -> Callable[[float], nn.Module]:
    """Return what makes a model of a share of the linear parameters."""
    known = Statistics.of(protocol)
    order = {block: _by_leverage(known.inputs[f"{block}.mlp.down_proj"]) for block in protocol.blocks}

    def at(share: float) -> nn.Module:
        best, least = None, np.inf
        for spread in SPREADS:
            model = _reduced(protocol, known, order, _shares(protocol, known, share, spread))
            divergence = protocol.divergence(model)
            print(f"MoDeGPT at {share}: epsilon {spread}: KL {divergence:.4f}", flush=True)
            if best is None or divergence < least:
                best, least = model, divergence
        assert best is not None
        return best

    return at


def _shares(protocol: Protocol, known: Statistics, share: float, spread: float) -> dict[str, float]:
    """Return how much of the reducible parts of each block is kept: less where it changes little (equation 10)."""
    parts = {b: sum(_numbers(protocol, b, name) for name in REDUCED) for b in protocol.blocks}
    wanted = (1 - share) * protocol.linear_params / sum(parts.values())  # removed, on average
    weights = np.exp(-np.array([known.change[block] for block in protocol.blocks]) / spread)
    removed = np.zeros(len(weights))
    for _ in range(len(weights)):  # what is above the most is spread over the others
        free = removed < MOST
        left = wanted * len(weights) - removed[~free].sum()
        removed[free] = np.minimum(left * weights[free] / weights[free].sum(), MOST)
        if np.isclose(removed.sum(), wanted * len(weights)):
            break
    return {block: 1 - float(own) for block, own in zip(protocol.blocks, removed, strict=True)}


REDUCED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj")


def _numbers(protocol: Protocol, block: str, name: str) -> int:
    return protocol.layers[f"{block}.{name}"].weight.numel()


def _by_leverage(moment: Tensor) -> Tensor:
    """Return the numbers of hidden units, that of the largest ridge leverage first."""
    moment = moment.double()
    ridge = moment.trace() / len(moment) * torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.solve(moment + ridge, moment).diagonal().argsort(descending=True)


def _reduced(protocol: Protocol, known: Statistics, order: dict[str, Tensor], shares: dict[str, float]) -> nn.Module:
    model = protocol.copied()
    with torch.no_grad():
        for block, share in shares.items():
            own = model.get_submodule(block)
            moment, kept = known.inputs[f"{block}.mlp.down_proj"], max(1, int(share * len(order[block])))
            _narrow_mlp(own.get_submodule("mlp"), moment, order[block][:kept].sort().values)
            _narrow_values(own.get_submodule("self_attn"), known.inputs[f"{block}.self_attn.v_proj"], share)
    return model


def _narrow_mlp(mlp: nn.Module, moment: Tensor, kept: Tensor) -> None:
    """Keep these hidden units, and refit the second matrix (algorithm 1)."""
    moment = shrunk(moment, RIDGE)
    down = mlp.get_submodule("down_proj").weight.double()  # type: ignore[operator, union-attr]
    refit = torch.linalg.solve(moment[kept][:, kept], (down @ moment[:, kept]).mT).mT
    mlp.down_proj = _linear(refit)
    for name in ("gate_proj", "up_proj"):
        weight: Tensor = mlp.get_submodule(name).weight  # type: ignore[assignment]
        setattr(mlp, name, _linear(weight[kept]))


def _narrow_values(attention: nn.Module, moment: Tensor, share: float) -> None:
    """Keep the best directions of each value head for all query heads that read it (algorithm 3).

    Values and outputs keep their shape, with a projection of that rank between them: the same function as with heads of
    that size, which this attention could not hold.
    """
    value: Tensor = attention.get_submodule("v_proj").weight  # type: ignore[assignment]
    output: Tensor = attention.get_submodule("o_proj").weight  # type: ignore[assignment]
    size = int(attention.head_dim)  # type: ignore[arg-type]
    heads, readers = value.shape[0] // size, output.shape[1] // value.shape[0]
    rank = max(1, int(share * size))
    root = torch.linalg.cholesky(shrunk(moment, RIDGE))
    made = []
    for head, rows in enumerate(value.double().split(size)):
        first = head * readers * size
        read = output[:, first : first + readers * size].double().view(len(output), readers, size)
        stacked = read.permute(1, 0, 2).reshape(-1, size)  # the outputs of all its readers, one below the other
        outer = torch.linalg.qr(stacked).R
        inner = outer @ rows @ root
        basis = torch.linalg.svd(inner, full_matrices=False).U[:, :rank]
        made.append(torch.linalg.solve(outer, basis @ (basis.mT @ (outer @ rows))))
    assert len(made) == heads
    attention.v_proj = _linear(torch.cat(made))
    attention.v_proj.counted = rank * heads * value.shape[1]
    attention.o_proj.counted = rank * heads * readers * output.shape[0]  # type: ignore[union-attr]


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.float().clone()
    return made.eval()
