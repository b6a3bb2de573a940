"""Laws that a format obeys whatever found its factors: meaning, stages, parameters and MACs are one thing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from tenfold.errors import RankError
from tenfold.formats import Factorization, Rank, split_groups
from tenfold.layers import FactorizedLayer, build, spec_of
from tenfold.records import LayerSpec, chain_buffer_bytes, chain_macs, chain_params
from tenfold.testing.geometries import GEOMETRIES, Geometry, served
from tenfold.testing.laws import LawBroken, expect, expect_close, law
from tenfold.testing.weights import DTYPES, lowest_error, random_bias, random_factors, random_weight, some_ranks

Format = type[Factorization]


def dense_layer(spec: LayerSpec, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return torch's own layer that holds these parameters."""
    return build(spec, nn.Parameter(weight), None if bias is None else nn.Parameter(bias))


def check_ranks(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless the family of ranks rises from small to full, and ranks outside of it are refused."""
    spec = at.spec
    most, family, largest = format.max_rank(spec), format.rank_family(spec), format.largest_rank(spec)
    with law(1, format.name(), at):
        expect(set(most) == set(format.rank_names), f"max_rank names {list(most)}, rank_names {format.rank_names}")
        expect(format.check_rank(spec, {}) == most, "a rank left out does not stand for full rank")
        expect(bool(family) and family[-1] == most, f"the family of ranks does not end at {most}")
        for rank in family:
            inside = set(rank) == set(most) and all(1 <= rank[k] <= most[k] for k in most)
            expect(inside, f"the family holds the rank {rank}, outside of 1..{most}")
        for below, above in pairwise(family):
            expect(all(below[k] <= above[k] for k in most) and below != above, f"the family falls: {below} to {above}")
        for name in most:
            for value in (0, -1, largest[name] + 1, True, 1.5):
                _expect_refused(format, spec, {name: value})  # type: ignore[dict-item]
        _expect_refused(format, spec, {"no such rank": 1})


def _expect_refused(format: Format, spec: LayerSpec, rank: Rank) -> None:
    try:
        format.num_params(spec, rank)
    except RankError:
        return
    expect(kept=False, seen=f"the rank {rank} was taken without a RankError")


def check_family_costs(format: Format, at: Geometry) -> None:
    """Raise LawBroken if a larger rank of the family has fewer parameters or MACs: a rule would walk in circles.

    The full rank may be cheaper than the one before, where a format then leaves a stage out.
    """
    spec = at.spec
    most = format.max_rank(spec)
    costs = [(r, format.num_params(spec, r), format.macs(spec, r, at.in_shape)) for r in format.rank_family(spec)]
    with law(3, format.name(), at, "costs along the family"):
        for (low, *cheap), (high, *dear) in pairwise(costs):
            dropped = any(high[k] == most[k] > low[k] for k in most)
            expect(dropped or cheap <= dear, f"{low} costs {cheap}, {high} only {dear}")


def check_costs(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless ``cost`` at many ranks at once is what ``structure`` costs at each of them."""
    spec = at.spec
    ranks = np.array(list(product(*(_some_below(top) for top in format.max_rank(spec).values()))), dtype=np.int64)
    with law(3, format.name(), at, "costs of many ranks"):
        params, macs = format.cost(spec, ranks, at.in_shape)
        for row, *found in zip(ranks.tolist(), params, macs, strict=True):
            rank = dict(zip(format.max_rank(spec), row, strict=True))
            stages = format.structure(spec, format.check_rank(spec, rank))
            wanted = [chain_params(stages), chain_macs(stages, at.in_shape)]
            expect(found == wanted, f"cost says {found} at {rank}, the structure {wanted}")


def check_channels(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless ``channels``, where a format says them, are those of ``structure`` at each rank."""
    spec, most = at.spec, format.max_rank(at.spec)
    for full in product((False, True), repeat=len(most)):
        options = [(top,) if whole else _some_below(top)[:-1] for top, whole in zip(most.values(), full, strict=True)]
        ranks = np.array(list(product(*options)), dtype=np.int64).reshape(-1, len(most))
        channels = format.channels(spec, ranks) if len(ranks) else None
        for row, values in enumerate(ranks.tolist() if channels is not None else ()):
            rank = dict(zip(most, values, strict=True))
            wanted = [(stage.in_channels, stage.out_channels) for stage in format.structure(spec, rank)]
            found = [tuple(int(np.broadcast_to(side, len(ranks))[row]) for side in pair) for pair in channels or ()]
            with law(3, format.name(), at, rank):
                expect(found == wanted, f"channels says {found}, the structure {wanted}")


def _some_below(top: int) -> tuple[int, ...]:
    """Return the ends of 1..top, their neighbours, and some numbers in between."""
    numbers = {1, 2, 3, top // 3, top // 2, 2 * top // 3, top - 1, top}
    return tuple(sorted(n for n in numbers if 1 <= n <= top))


def check_unfoldings(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless every unfolding holds all entries of the weight once, group by group, and zeros.

    A format may keep the row of a padding apart.
    """
    spec = at.spec
    entries = torch.arange(1, random_weight(spec).numel() + 1, dtype=torch.float64).view(spec.weight_shape)
    weight = split_groups(entries, spec)
    whole = [weight.flatten(1).sort(1).values]
    if spec.padding_idx is not None:
        used = torch.arange(spec.in_channels) != spec.padding_idx
        whole.append(weight[..., used].flatten(1).sort(1).values)
    with law(6, format.name(), at, "unfoldings"):
        found = format.unfoldings(weight, spec)
        expect(set(found) == set(format.rank_names), f"unfoldings for {sorted(found)}, not {format.rank_names}")
        for name, matrix in found.items():
            expect(matrix.dim() == 3 and len(matrix) == spec.groups, f"{name}: shape {tuple(matrix.shape)}")
            seen = matrix.flatten(1).sort(1).values
            same = any(torch.equal(seen[:, -w.shape[1] :], w) and not seen[:, : -w.shape[1]].any() for w in whole)
            expect(same, f"the unfolding for {name} is no permutation of the weight's entries")


def check_round_trips(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless ``from_stages`` inverts ``stages`` and ``from_chain`` inverts ``chain``, to the bit."""
    for rank in some_ranks(format, at.spec):
        with law(8, format.name(), at, rank):
            value = random_factors(format, at.spec, rank)
            expect(value.rank == rank, f"the factors have rank {value.rank}")
            again = format.from_stages(at.spec, rank, [s.weight for s in value.stages()])
            chained = format.from_chain(at.spec, rank, value.chain())
            for name, other in (("from_stages", again), ("from_chain", chained)):
                expect(other.rank == rank, f"{name} gives rank {other.rank}")
                for key, tensor in value.tensors().items():
                    expect(torch.equal(other.tensors()[key], tensor), f"{name} changes {key}")
            expect_close("the weight of balanced factors", value.balanced().to_dense(), value.to_dense(), 1e-12)
            expect_close("the scaled weight", value.scaled(3.0).to_dense(), 3.0 * value.to_dense(), 1e-12)
            expect(tuple(value.to_dense().shape) == at.spec.weight_shape, f"dense shape {value.to_dense().shape}")
            expect(all(len(t) == at.spec.groups for t in value.tensors().values()), "a tensor lacks the group axis")


def check_params(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless parameters, and bytes beside them, are what the built layer holds, filled or empty."""
    for rank in some_ranks(format, at.spec):
        with law(3, format.name(), at, rank):
            value = random_factors(format, at.spec, rank)
            filled = FactorizedLayer.of(value, random_bias(at.spec))
            empty = FactorizedLayer.empty(at.spec, format.name(), rank, like=torch.zeros(1))
            wanted = format.num_params(at.spec, rank)
            for layer in (filled, empty):
                counted = sum(p.numel() for p in layer.parameters())
                expect(counted == wanted, f"num_params says {wanted}, the layer has {counted}")
            stored = sum(b.numel() * b.element_size() for n, b in empty.named_buffers() if n in empty.state_dict())
            beside = chain_buffer_bytes(format.structure(at.spec, rank))
            expect(beside == stored, f"the structure says {beside} bytes of buffers, the layer has {stored}")
            shapes = {k: v.shape for k, v in filled.state_dict().items()}
            expect(shapes == {k: v.shape for k, v in empty.state_dict().items()}, "an empty layer has other tensors")


def check_macs(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless ``macs`` and ``LayerSpec.macs`` are half of what torch's flop counter sees."""
    x, bias = at.inputs(), random_bias(at.spec)
    with law(4, "dense", at):
        dense = dense_layer(at.spec, random_weight(at.spec), bias)
        _expect_macs(dense, x, at.spec.macs(at.in_shape))
    for rank in some_ranks(format, at.spec):
        with law(4, format.name(), at, rank):
            layer = FactorizedLayer.of(random_factors(format, at.spec, rank), bias)
            _expect_macs(layer, x, format.macs(at.spec, rank, at.in_shape))


def _expect_macs(layer: nn.Module, x: Tensor, wanted: int) -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    flops = counter.get_total_flops()
    expect(flops == 2 * wanted, f"macs says {wanted}, the flop counter {flops / 2:g}")


def check_equals_dense(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless outputs and all gradients are those of the dense layer that holds ``to_dense()``."""
    for rank in some_ranks(format, at.spec):
        with law(5, format.name(), at, rank):
            _compare(FactorizedLayer.of(random_factors(format, at.spec, rank), random_bias(at.spec)), at)


def _compare(layer: FactorizedLayer, at: Geometry) -> None:
    """Compare with a dense layer that shares no code with the stages, down to the gradients of the factors."""
    spec = at.spec.replace(sparse=False)
    x, other = at.inputs(), at.inputs()
    for tensor in (x, other) if x.is_floating_point() else ():
        tensor.requires_grad_()
    own = dict(layer.named_parameters())
    mirror = {k: p.detach().clone().requires_grad_() for k, p in own.items()}
    names = {id(p): k for k, p in own.items()}
    weights: list[Any] = [mirror[names[id(w)]] if id(w) in names else w for w in (s.weight for s in layer.stages)]
    tensors = {"weight": type(layer.factorization()).from_stages(layer.spec, layer.rank, weights).to_dense()}
    if spec.bias:
        tensors["bias"] = next(p for k, p in mirror.items() if k.endswith(".bias"))
    dense = dense_layer(spec, torch.zeros(spec.weight_shape).double(), random_bias(spec))
    found, wanted = layer(x), functional_call(dense, tensors, (other,))
    expect_close("the output", found, wanted, 1e-10)
    expect(tuple(found.shape) == at.spec.out_shape(at.in_shape), f"out_shape says {at.spec.out_shape(at.in_shape)}")
    weighting = torch.linspace(-1, 1.3, found.numel(), dtype=found.dtype).view_as(found)
    for output in (found, wanted):
        (output * weighting).sum().backward()
    if x.is_floating_point():
        expect_close("the gradient of the input", _gradient(x), _gradient(other), 1e-9)
    for name, parameter in own.items():
        expect_close(f"the gradient of {name}", _gradient(parameter), _gradient(mirror[name]), 1e-9)


def _gradient(tensor: Tensor) -> Tensor:
    gradient = tensor.grad
    if gradient is None:
        msg = "a gradient is missing"
        raise LawBroken(msg)
    return gradient.to_dense()


def check_dtypes(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless a layer in any dtype stays in that dtype and computes what it does in float64."""
    rank = some_ranks(format, at.spec)[0]
    exact = random_factors(format, at.spec, rank)
    for dtype in DTYPES[1:]:
        with law(5, format.name(), at, rank, dtype):
            bias = random_bias(at.spec, dtype)
            layer = FactorizedLayer.of(exact.to(dtype), bias)
            wide = FactorizedLayer.of(exact.to(dtype).to(torch.float64), None if bias is None else bias.double())
            x = at.inputs(dtype)
            found = layer(x)
            expect(found.dtype == layer.weight.dtype == dtype, f"the output is {found.dtype}")
            expect_close("the output", found, wide(x.double() if x.is_floating_point() else x), lowest_error(dtype))


def check_face(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless the layer has the face of the dense one: options, weight and bias, by torch's names."""
    bias = random_bias(at.spec)
    value = random_factors(format, at.spec, some_ranks(format, at.spec)[0])
    dense, layer = dense_layer(at.spec, value.to_dense(), bias), FactorizedLayer.of(value, bias)
    options: Any = dense.__constants__
    with law(5, format.name(), at, "the face of the layer"):
        spec, reason = spec_of(dense)
        expect(spec == at.spec, f"spec_of says {spec} {reason}")
        for name in options:
            if hasattr(dense, name):
                wanted = getattr(dense, name)
                found = getattr(layer, name, "missing")
                expect(found == wanted, f"{name} is {found}, not {wanted}")
        expect_close("the weight", layer.weight, value.to_dense(), 0.0)
        expect((layer.bias is None) == (bias is None), "there is a bias too many, or one is missing")


FORMAT_LAWS: dict[str, Callable[[Format, Geometry], None]] = {
    "ranks": check_ranks,
    "family_costs": check_family_costs,
    "costs": check_costs,
    "channels": check_channels,
    "unfoldings": check_unfoldings,
    "round_trips": check_round_trips,
    "params": check_params,
    "macs": check_macs,
    "equals_dense": check_equals_dense,
    "dtypes": check_dtypes,
    "face": check_face,
}


def check_format_laws(format: Format, name: str, geometries: tuple[Geometry, ...] = GEOMETRIES) -> None:
    """Raise LawBroken unless a format obeys one of ``FORMAT_LAWS`` at every geometry that it serves."""
    found = served(format, geometries)
    with law(1, format.name()):
        expect(bool(found), "the format refuses every geometry of the table")
    for at in found:
        FORMAT_LAWS[name](format, at)
