"""Weights to decompose: random ones, ones of a known rank, and the odd ones that break naive code."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.formats import Factorization, Rank
from tenfold.records import LayerSpec, ReorderSpec, SubLayerSpec

DTYPES: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random_weight(spec: LayerSpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return normal numbers in torch's own layout for this layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(spec.weight_shape, generator=generator, dtype=torch.float64).to(dtype)


def random_bias(spec: LayerSpec, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor | None:
    """Return normal numbers (out_channels,), or None for a layer without bias."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(spec.out_channels, generator=generator, dtype=torch.float64).to(dtype) if spec.bias else None


def random_factors(format: type[Factorization], spec: LayerSpec, rank: Rank, seed: int = 0) -> Factorization:
    """Return a factorization of exactly this rank, its stage weights normal numbers in float64.

    The row of a ``padding_idx`` is zero, as torch makes it: only then has it no part in any gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    structure = format.structure(spec, format.check_rank(spec, rank))
    weights = [_drawn(s, generator) for s in structure]
    first = structure[0]
    if isinstance(first, LayerSpec) and first.padding_idx is not None:
        weights[0][first.padding_idx] = 0.0
    return format.from_stages(spec, rank, weights)


def _drawn(stage: SubLayerSpec, generator: torch.Generator) -> Tensor:
    if not isinstance(stage, ReorderSpec):
        return torch.randn(stage.weight_shape, generator=generator, dtype=torch.float64)
    size = stage.channels // stage.groups // stage.block
    return torch.cat([torch.randperm(size, generator=generator) + size * group for group in range(stage.groups)])


def some_ranks(format: type[Factorization], spec: LayerSpec, count: int = 4) -> tuple[Rank, ...]:
    """Return up to ``count`` ranks of the family, evenly spread, the smallest and the full one among them."""
    family = format.rank_family(spec)
    if len(family) <= count:
        return family
    return tuple(family[round(i * (len(family) - 1) / (count - 1))] for i in range(count))


def lowest_error(dtype: torch.dtype) -> float:
    """Return the relative error that an exact factorization may show when stored in ``dtype``."""
    return {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 16 * torch.finfo(dtype).eps)


def odd_weights(spec: LayerSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return finite weights that break naive code, by name: zero, constant, tiny, huge, one large entry."""
    weight = random_weight(spec, torch.float64).clamp(-2, 2)
    small, large = (1e-4, 1e4) if dtype == torch.float16 else (1e-30, 1e30)
    spiked = weight.clone()
    spiked.view(-1)[0] = 100.0
    cases = {
        "zero": torch.zeros_like(weight),
        "constant": torch.full_like(weight, 0.3),
        "tiny": weight * small,
        "huge": weight * large,
        "spiked": spiked,
    }
    return {name: value.to(dtype) for name, value in cases.items()}


def broken_weights(spec: LayerSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights that no algorithm may accept: with a NaN, or with an infinite entry."""
    cases = {"NaN": float("nan"), "infinite": float("inf"), "negative infinite": float("-inf")}
    weights = {}
    for name, value in cases.items():
        weight = random_weight(spec, dtype)
        weight.view(-1)[-1] = value
        weights[name] = weight
    return weights
