"""TT ranks of layers that are tensor trains, of any kind: read the cores, write them, drop indices of bonds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import WeightError
from tenfold.formats import FORMATS
from tenfold.formats.train import TrainFormat
from tenfold.layers.factorized import FactorizedLayer
from tenfold.layers.tt_embedding import TTEmbedding, TTEmbeddingBag
from tenfold.layers.tt_linear import TTLinear

Cores = tuple[Tensor, ...]


def has_bonds(module: nn.Module) -> bool:
    """Return whether a layer is a tensor train of two or more cores: born as one, or factorized into one."""
    if isinstance(module, FactorizedLayer):
        return issubclass(FORMATS.get(module.format), TrainFormat) and len(bond_cores(module)) > 1
    return isinstance(module, TTLinear | TTEmbedding | TTEmbeddingBag) and len(module.cores) > 1


def bond_cores(module: nn.Module) -> Cores:
    """Return the cores (r, entries, r') of a layer, in order; gradients flow through them.

    All axes of a core other than its two bonds are one, those of several groups included.

    Example:
        >>> [tuple(c.shape) for c in bond_cores(TTLinear(12, 8, 3, in_modes=(3, 4), out_modes=(4, 2)))]
        [(1, 12, 3), (3, 8, 1)]
    """
    if isinstance(module, TTLinear):
        return tuple(core.flatten(1, 2) for core in module.cores)
    if isinstance(module, TTEmbedding | TTEmbeddingBag):
        return tuple(core.transpose(0, 1).flatten(1, 2) for core in module.cores)
    if isinstance(module, FactorizedLayer):
        return tuple(core.movedim(0, 1).flatten(1, 2) for core in _value(module).cores)
    msg = f"a {type(module).__name__} is no tensor train"
    raise WeightError(msg)


@torch.no_grad()
def write_bonds_(module: nn.Module, cores: Sequence[Tensor]) -> None:
    """Put other cores of the same shapes, as ``bond_cores`` has them, into a layer."""
    if isinstance(module, FactorizedLayer):
        value = _value(module)
        names = [name for name in value.tensors() if name.startswith("core")]
        apart = (
            new.unflatten(1, (old.shape[0], -1)).movedim(1, 0) for new, old in zip(cores, value.cores, strict=True)
        )
        weights = [stage.weight for stage in value.map(**dict(zip(names, apart, strict=True))).stages()]
        for stage, weight in zip(module.stages, weights, strict=True):
            stage.get_parameter("weight").copy_(weight)
        return
    for own, new in zip(_own(module), cores, strict=True):
        if isinstance(module, TTLinear):
            own.copy_(new.reshape(own.shape))
        else:
            own.copy_(new.reshape(own.shape[1], own.shape[0], *own.shape[2:]).transpose(0, 1))


def scale_bonds_(module: nn.Module, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Multiply, for every bond, the slices before it by the first vector (r,) and those after it by the second."""
    cores = [core.detach() for core in bond_cores(module)]
    for k, (before, after) in enumerate(factors):
        cores[k], cores[k + 1] = cores[k] * before, cores[k + 1] * after[:, None, None]
    write_bonds_(module, cores)


def without_indices(module: nn.Module, kept: Sequence[Tensor]) -> tuple[nn.Module, list[tuple[nn.Parameter, Any]]]:
    """Return the layer with only the ``kept`` indices of every bond, and how its parameters come from the old ones.

    Both cores of a bond are sliced. The layer is a new one of the same kind; bias and modes stay as they are.

    Args:
        module: a layer that ``has_bonds``; not changed.
        kept: for every bond the indices that stay, ascending, at least one.

    Returns:
        The layer, and pairs (old parameter, function from a tensor of its shape to the part that stays) in the order of
        the new layer's cores, with which the state of an optimizer can follow. No pairs for a ``FactorizedLayer``: at
        smaller ranks its cores may meet the input in another order, so its optimizer must start again.

    Example:
        >>> layer = TTLinear(12, 8, 3, cores=2)
        >>> smaller, _ = without_indices(layer, [torch.tensor([0, 2])])
        >>> smaller.ranks
        (2,)
    """
    if isinstance(module, FactorizedLayer):
        return _refactorized(module, kept), []
    with torch.random.fork_rng(devices=[]):  # its first cores are drawn, and thrown away
        made = _alike(module, tuple(len(indices) for indices in kept))
    sides = pairwise([None, *kept, None])
    axis = 0 if isinstance(module, TTLinear) else 1
    moves = []
    for k, (core, (before, after)) in enumerate(zip(_own(module), sides, strict=True)):
        cut = _Cut(axis, before, after)
        made.cores[k] = nn.Parameter(cut(core.detach()), core.requires_grad)
        moves.append((core, cut))
    if getattr(module, "bias", None) is not None:
        made.bias = module.bias  # the very parameter
    return made.train(module.training), moves


class _Cut:
    """The part of a core, or of what an optimizer knows of it, that stays."""

    def __init__(self, axis: int, before: Tensor | None, after: Tensor | None) -> None:
        self.axis, self.before, self.after = axis, before, after

    def __call__(self, core: Tensor) -> Tensor:
        if self.before is not None:
            core = core.index_select(self.axis, self.before.to(core.device))
        if self.after is not None:
            core = core.index_select(core.dim() - 1, self.after.to(core.device))
        return core.clone()


def _alike(module: Any, ranks: tuple[int, ...]) -> Any:
    """Return a fresh layer like the one given, of other ranks."""
    like: Tensor = module.cores[0]
    common: dict[str, Any] = {"std": module.std, "device": like.device, "dtype": like.dtype}
    if isinstance(module, TTLinear):
        modes: dict[str, Any] = {"in_modes": module.in_modes, "out_modes": module.out_modes}
        return TTLinear(module.in_features, module.out_features, ranks, bias=module.bias is not None, **modes, **common)
    names: tuple[str, ...] = ("padding_idx", "max_norm", "norm_type")
    if isinstance(module, TTEmbeddingBag):
        names += ("mode", "include_last_offset")
    modes = {"row_modes": module.shape.row_modes, "col_modes": module.shape.col_modes}
    own = {name: getattr(module, name) for name in names}
    return type(module)(module.num_embeddings, module.embedding_dim, ranks, **modes, **own, **common)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.get_submodule("cores").parameters())


def _value(module: FactorizedLayer) -> TrainFormat:
    value = module.factorization()
    if not isinstance(value, TrainFormat):
        msg = f"a layer in the format {module.format} is no tensor train"
        raise WeightError(msg)
    return value


@torch.no_grad()
def _refactorized(module: FactorizedLayer, kept: Sequence[Tensor]) -> FactorizedLayer:
    """Return the layer of the sliced cores; those between which nothing is dropped any more become one."""
    value, spec = _value(module), module.spec
    kind, runs = type(value), type(value).runs(module.spec, value.rank)
    sides = pairwise([None, *kept, None])
    cores = [_Cut(1, *side)(core) for core, side in zip(value.cores, sides, strict=True)]
    inner = [last for _, last in runs[:-1]]  # the bonds that are there, by number
    wanted = list(value.max_rank(spec).values())
    for bond, indices in zip(inner, kept, strict=True):
        wanted[bond] = len(indices)
    rank = kind.check_rank(spec, dict(zip(kind.rank_names, wanted, strict=True)))
    joined: dict[str, Tensor] = {}
    for first, last in kind.runs(spec, rank):
        parts = [core for core, (start, stop) in zip(cores, runs, strict=True) if first <= start and stop <= last]
        core = parts[0]
        for part in parts[1:]:
            core = (core.flatten(1, 2) @ part.flatten(2)).reshape(len(core), core.shape[1], -1, part.shape[-1])
        joined[f"core{first + 1}"] = core
    extra = {name: tensor for name, tensor in value.tensors().items() if not name.startswith("core")}
    trained = all(p.requires_grad for p in module.stages.parameters())
    made = FactorizedLayer.of(kind(spec, **joined, **extra), module.bias, requires_grad=(trained, trained))
    return made.train(module.training)
