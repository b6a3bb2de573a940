"""Rings and blocks by alternating least squares: against NumPy's least squares, TensorLy, HOOI, and planted weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import tensor_ring
from tensorly.tr_tensor import tr_to_tensor

from tenfold.decompositions import DECOMPOSITIONS, Moments, Sketch, decompose, error_curve
from tenfold.decompositions.block_als import btd_als, tr_updates
from tenfold.decompositions.block_als.base import QUICK
from tenfold.decompositions.block_als.btd_als import BlockTermLayout, BlockTermLeastSquares, balanced, deflated
from tenfold.decompositions.block_als.descent import descend
from tenfold.decompositions.block_als.tr_updates import RingLayout, RingLeastSquares
from tenfold.decompositions.block_als.weighted_descent import WeightedLeastSquares
from tenfold.decompositions.roots import Whitening
from tenfold.formats import FORMATS
from tenfold.records import LayerSpec
from tenfold.tensors import rings
from tenfold.testing.weights import random_factors

F64 = torch.float64
CONV = LayerSpec(kind="conv", in_channels=12, out_channels=16, kernel=(3, 3), padding=(1, 1))
LINEAR = LayerSpec(kind="linear", in_channels=48, out_channels=36)
TRALS, TRSVD, BTDALS = (DECOMPOSITIONS.get(name) for name in ("tr_als", "tr_svd", "btd_als"))


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def blocks_of(parts):
    outer, core, inner = parts
    return torch.einsum("zcop,zcpqk,zciq->czoik", outer, core, inner)


def blocks_to_dense(parts):
    return blocks_of(parts).sum(0)


def slices_of(cores):
    """The terms of a ring: one for each value of the closing bond."""
    first, *others, last = cores
    closed = [(first[:, [a]], *others, last[..., [a]]) for a in range(first.shape[1])]
    return torch.stack([rings.tr_to_dense(one) for one in closed])


def ring_parts(modes, ranks):
    return tuple(
        random_tensor(1, r, n, ranks[(k + 1) % len(ranks)], seed=k)
        for k, (r, n) in enumerate(zip(ranks, modes, strict=True))
    )


def block_parts(out, inner, taps, blocks, p, q):
    return tuple(
        random_tensor(1, *shape, seed=k)
        for k, shape in enumerate([(blocks, out, p), (blocks, p, q, taps), (blocks, inner, q)])
    )


def least_squares_sweep(tensor, parts, to_terms, order, root=None, ridge=0.0):
    """One sweep with NumPy: each part by lstsq on the matrix of the map from its entries to what is to be small.

    That is the tensor missed, and √ridge times the terms. ``root`` is the square root of a metric on the last mode of
    the flattened (out, n) tensor.
    """
    parts = list(parts)
    flat = (len(tensor[0]), -1)

    def rows(parts):
        terms = to_terms(tuple(parts))
        dense = terms.sum(0).reshape(flat)
        return torch.cat([(dense if root is None else dense @ root).flatten(), ridge**0.5 * terms.flatten()])

    target = tensor.reshape(flat)
    goal = torch.zeros_like(rows(parts))
    goal[: target.numel()] = (target if root is None else target @ root).flatten()
    for k in order:
        units = torch.eye(parts[k].numel(), dtype=F64).unbind()
        columns = [rows([*parts[:k], unit.view_as(parts[k]), *parts[k + 1 :]]) for unit in units]
        solution, *_ = np.linalg.lstsq(torch.stack(columns, 1).numpy(), goal.numpy(), rcond=None)
        parts[k] = torch.from_numpy(solution).view_as(parts[k])
    return tuple(parts), float((goal - rows(parts)).square().sum())


@pytest.mark.parametrize(("modes", "ranks"), [((6, 4, 5), (2, 3, 2)), ((4, 3, 3, 4), (2, 2, 3, 2))])
@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("direct", [512, 1])
def test_each_core_is_the_least_squares_solution(modes, ranks, ridge, direct, monkeypatch):
    monkeypatch.setattr(tr_updates, "DIRECT", direct)
    tensor, start = random_tensor(1, *modes, seed=9), ring_parts(modes, ranks)
    wanted, goal = least_squares_sweep(tensor, start, slices_of, range(len(modes)), ridge=ridge)
    found, square, terms = RingLeastSquares(tensor).sweep(start, torch.tensor([ridge], dtype=F64))
    close = 1e-8 if direct == 512 else 1e-4  # as many conjugate gradients as there are unknowns solve exactly, nearly
    assert float(square + ridge * terms) == pytest.approx(goal, rel=close)
    assert float(terms) == pytest.approx(float(slices_of(found).square().sum()), rel=close)
    torch.testing.assert_close(rings.tr_to_dense(found), rings.tr_to_dense(wanted), rtol=close, atol=10 * close)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("direct", [512, 1])
def test_factors_and_cores_of_all_blocks_are_the_least_squares_solutions(ridge, direct, monkeypatch):
    monkeypatch.setattr(btd_als, "DIRECT", direct)
    tensor, start = random_tensor(1, 7, 6, 4, seed=9), block_parts(7, 6, 4, 2, 2, 2)
    wanted, goal = least_squares_sweep(tensor, start, blocks_of, (0, 2, 1), ridge=ridge)
    found, square, terms = BlockTermLeastSquares(tensor).sweep(start, torch.tensor([ridge], dtype=F64))
    close = 1e-8 if direct == 512 else 1e-4
    assert float(square + ridge * terms) == pytest.approx(goal, rel=close)
    assert float(terms) == pytest.approx(float(blocks_of(found).square().sum()), rel=close)
    torch.testing.assert_close(blocks_to_dense(found), blocks_to_dense(wanted), rtol=close, atol=10 * close)


def under(weight, square, modes, layout):
    frame = Whitening.of(square, modes)
    return WeightedLeastSquares(frame.whiten(weight[None]).flatten(2), frame, square, layout, 60), frame


def test_under_a_covariance_the_parts_are_the_weighted_least_squares_solutions():
    mixing = random_tensor(24, 24, seed=3)
    square = (mixing @ mixing.T + torch.eye(24, dtype=F64))[None]
    root = torch.linalg.cholesky(square[0])
    weight, start = random_tensor(7, 6, 4, seed=9), block_parts(7, 6, 4, 2, 2, 2)
    problem, frame = under(weight, square, (6, 4), BlockTermLayout())
    found, error, _ = problem.sweep(start, torch.zeros(1))
    unwhitened = BlockTermLayout().along_inputs(start, frame.inverses)
    wanted, missed = least_squares_sweep(weight[None], unwhitened, blocks_of, (0, 1, 2), root)
    assert float(error) == pytest.approx(missed, rel=1e-5)
    dense = blocks_to_dense(BlockTermLayout().along_inputs(found, frame.inverses))
    torch.testing.assert_close(dense, blocks_to_dense(wanted), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "spec", [CONV.replace(in_channels=4, out_channels=6), LINEAR.replace(in_channels=12, out_channels=8)]
)
def test_rings_under_a_covariance_are_the_weighted_least_squares_solutions(spec):
    kind = FORMATS.get("tensor_ring")
    width = spec.in_channels * 9 if spec.axes else spec.in_channels
    mixing = random_tensor(width, width, seed=3)
    square = (mixing @ mixing.T + torch.eye(width, dtype=F64))[None]
    weight = random_tensor(*spec.weight_shape, seed=9)
    ranks = kind.bonds(spec, {"r1": 2, "r2": 2, "r3": 2})
    layout = RingLayout(len(ranks))
    problem, frame = under(weight, square, kind.input_modes(spec), layout)
    start = ring_parts(kind.modes(spec), ranks)
    found, error, _ = problem.sweep(start, torch.zeros(1))

    def to_terms(cores):
        return torch.stack([kind.from_tensor(one, spec) for one in slices_of(cores)])

    unwhitened = layout.along_inputs(start, frame.inverses)
    root = torch.linalg.cholesky(square[0])
    _, missed = least_squares_sweep(weight[None], unwhitened, to_terms, range(len(ranks)), root)
    assert float(error) == pytest.approx(missed, rel=0.05)  # the cores of the outputs take a few steps only
    dense = to_terms(layout.along_inputs(found, frame.inverses)).sum(0)
    seen = ((dense[0] - weight).flatten(1) @ root).square().sum()
    assert float(seen) == pytest.approx(float(error), rel=1e-8)


@pytest.mark.parametrize("problem", ["ring", "blocks"])
def test_no_sweep_ends_worse(problem):
    tensor = random_tensor(1, 10, 9, 8)
    if problem == "ring":
        made, start = RingLeastSquares(tensor), ring_parts((10, 9, 8), (2, 3, 3))
    else:
        made, start = BlockTermLeastSquares(tensor), deflated(tensor, 2, 3, 3)
    errors = [float(descend(made, start, n_iter=n, tol=0).errors) for n in range(1, 40, 3)]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize(
    ("problem", "terms", "start"),
    [
        (RingLeastSquares, slices_of, ring_parts((6, 5, 4), (2, 2, 2))),
        (BlockTermLeastSquares, blocks_of, block_parts(6, 5, 4, 2, 2, 2)),
    ],
)
def test_terms_do_not_cancel(problem, terms, start):
    """The derivative of a term is a limit of sums of two of them, whose terms grow without end."""
    near = [random_tensor(*part.shape, seed=10 + k) for k, part in enumerate(start)]
    tensor = sum(terms((*start[:k], near[k], *start[k + 1 :]))[0] for k in range(len(start)))
    tensor = tensor + 0.2 * tensor.norm() / tensor.numel() ** 0.5 * random_tensor(*tensor.shape, seed=99)
    begun = tuple(random_tensor(*part.shape, seed=30 + k) for k, part in enumerate(start))
    plain = descend(problem(tensor), begun, n_iter=300, tol=0)
    held = descend(problem(tensor), begun, n_iter=300, tol=0, penalty=3e-3)

    def spread(found):
        return float(terms(found.blocks).norm() / tensor.norm())

    assert float(held.errors.sqrt()) < float(plain.errors.sqrt()) + 0.01
    assert spread(plain) > 50
    assert spread(held) < 5


@pytest.mark.parametrize(
    ("spec", "format", "rank"),
    [
        (CONV, "tensor_ring", {"r1": 2, "r2": 4, "r3": 3}),
        (CONV, "tensor_ring", {"r1": 3, "r2": 3, "r3": 2}),
        (LINEAR, "tensor_ring", {"r1": 2, "r2": 3, "r3": 3}),
        (CONV, "block_term", {"blocks": 3, "out": 3, "in": 2}),
        (CONV, "block_term", {"blocks": 2, "out": 4, "in": 4}),
        (CONV.replace(groups=2), "block_term", {"blocks": 2, "out": 3, "in": 2}),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_a_weight_of_such_a_form_is_found_again(spec, format, rank, scale):
    weight = random_factors(FORMATS.get(format), spec, rank).to_dense() * scale
    fit = decompose(weight, format, rank, spec=spec)
    assert fit.rel_error < 1e-6
    assert fit.converged


@pytest.mark.parametrize("ranks", [(2, 4, 3), (3, 3, 3), (1, 6, 6)])
def test_rings_are_at_least_as_near_as_those_of_tensorly(ranks):
    weight = random_tensor(*CONV.weight_shape)
    rank = dict(zip(("r1", "r2", "r3"), ranks, strict=True))
    mine = decompose(weight, "tensor_ring", rank).rel_error
    tensor = FORMATS.get("tensor_ring").to_tensor(weight[None], CONV)[0].numpy()
    with tensorly.backend_context("numpy"):
        missed = tr_to_tensor(tensor_ring(tensor, [*ranks, ranks[0]])) - tensor
    theirs = np.linalg.norm(missed) / np.linalg.norm(tensor)
    assert mine <= theirs * (1 + 1e-9)
    direct = decompose(weight, "tensor_ring", rank, TRSVD()).rel_error
    assert mine <= direct * (1 + 1e-9)


def test_a_tr_svd_begins_where_it_drops_the_least():
    weight = random_tensor(*CONV.weight_shape)
    tensor = FORMATS.get("tensor_ring").to_tensor(weight[None], CONV)[0]
    fit = decompose(weight, "tensor_ring", {"r1": 2, "r2": 4, "r3": 3}, TRSVD())
    from_outputs = rings.tr_to_dense(rings.tr_svd(tensor, (2, 4, 3)))
    from_inputs = rings.tr_to_dense(rings.tr_svd(tensor.permute(2, 0, 1), (3, 2, 4))).permute(1, 2, 0)
    errors = [float((dense - tensor).norm() / tensor.norm()) for dense in (from_outputs, from_inputs)]
    assert fit.rel_error == pytest.approx(min(errors))


@pytest.mark.parametrize("format", ["tensor_ring", "block_term"])
def test_one_slice_or_block_is_as_near_as_hooi(format):
    weight = random_tensor(*CONV.weight_shape)
    hooi = decompose(weight, "tucker2", {"out": 6, "in": 5}, DECOMPOSITIONS.get("hooi")(n_iter=200, tol=1e-9))
    one = {"r1": 1, "r2": 6, "r3": 5} if format == "tensor_ring" else {"blocks": 1, "out": 6, "in": 5}
    assert decompose(weight, format, one).rel_error == pytest.approx(hooi.rel_error, rel=2e-3)


def test_factors_of_blocks_have_orthogonal_columns_and_the_same_norms():
    parts = block_parts(7, 6, 4, 3, 2, 2)
    outer, core, inner = balanced(parts)
    torch.testing.assert_close(blocks_to_dense((outer, core, inner)), blocks_to_dense(parts))
    square = outer[0, 1].T @ outer[0, 1]
    torch.testing.assert_close(square, torch.diag(square.diagonal()))
    torch.testing.assert_close(outer[0, :, :, 0].norm(dim=1), core[0].flatten(1).norm(dim=1))
    torch.testing.assert_close(inner[0, :, :, 0].norm(dim=1), core[0].flatten(1).norm(dim=1))


@pytest.mark.parametrize(
    ("spec", "format", "rank"),
    [
        (CONV, "tensor_ring", {"r1": 2, "r2": 4, "r3": 3}),
        (LINEAR, "tensor_ring", {"r1": 3, "r2": 3, "r3": 3}),
        (CONV.replace(groups=2), "block_term", {"blocks": 2, "out": 3, "in": 2}),
    ],
)
def test_with_data_the_output_error_is_less(spec, format, rank):
    groups, width = spec.groups, spec.in_channels // spec.groups * (9 if spec.axes else 1)
    x = random_tensor(groups, 400, width) * torch.logspace(0, -1.5, width, dtype=F64)
    x = x @ torch.linalg.qr(random_tensor(width, width, seed=4)).Q
    weight, moments = random_tensor(*spec.weight_shape, seed=2), Moments.of(x)
    plain_algorithm = DECOMPOSITIONS.get(FORMATS.get(format).default_algorithm)
    aware = decompose(weight, format, rank, spec=spec, moments=moments)
    plain = decompose(weight, format, rank, spec=spec)
    apart = weight.reshape(groups, -1, width)
    unaware = moments.errors(apart, plain.value.to_grouped().flatten(2))
    assert aware.output_error < 0.9 * float(unaware[0].sum() / unaware[1].sum()) ** 0.5
    few = decompose(weight, format, rank, plain_algorithm(data_iter=1), spec=spec, moments=moments)
    assert aware.output_error <= few.output_error * (1 + 1e-9)


def test_a_sketch_of_the_moments_serves_as_well():
    x = random_tensor(500, 48) * torch.logspace(0, -1.5, 48, dtype=F64)
    weight, rank = random_tensor(36, 48, seed=2), {"r1": 3, "r2": 3, "r3": 3}
    whole = Moments.of(x)
    sketch = whole.replace(input_second_moment=Sketch.of(x))
    found = decompose(weight, "tensor_ring", rank, moments=sketch).output_error
    assert found == pytest.approx(decompose(weight, "tensor_ring", rank, moments=whole).output_error, rel=0.02)


@pytest.mark.parametrize("format", ["tensor_ring", "block_term"])
@pytest.mark.parametrize("data", [False, True])
def test_curves_are_the_errors_of_quick_fits(format, data):
    spec = CONV.replace(in_channels=6, out_channels=8)
    weight, kind = random_tensor(*spec.weight_shape), FORMATS.get(format)
    moments = Moments.of(random_tensor(300, 54) * torch.logspace(0, -1.5, 54, dtype=F64)) if data else None
    default = DECOMPOSITIONS.get(kind.default_algorithm)
    quick = default(**QUICK)

    def error(row, algorithm):
        rank = dict(zip(kind.rank_names, row, strict=True))
        given = weight if data else weight.float()
        fit = decompose(given, format, rank, algorithm, moments=moments)
        if moments is None:
            return fit.rel_error**2
        return moments.distortion(weight[None].flatten(2), fit.value.to_grouped().flatten(2))

    ranks = np.array([[c, r, r] for c in (2, 4) for r in (1, 2)])
    curve = error_curve(weight[None], spec, kind, moments)
    told = curve(ranks)
    assert told == pytest.approx([error(row, quick) for row in ranks.tolist()], rel=1e-6)
    full = np.array([list(kind.max_rank(spec).values())])
    assert curve(full) == pytest.approx(0, abs=1e-9)
    careful = np.array([error(row, default()) for row in ranks.tolist()])
    assert bool(((told >= 0.98 * careful) & (told <= 1.25 * careful)).all())  # attained, so no better than the best
