"""Measurement grids: every useful rank lies on a curve, and coarse levels are small parts of fine ones."""

from __future__ import annotations

import numpy as np
import pytest

from tenfold.formats import FORMATS
from tenfold.profiling.latency.grid import (
    LEVELS,
    Point,
    ladder,
    measurement_grid,
    sample_ranks,
    stage_columns,
    stage_points,
)
from tenfold.records import LayerSpec

CONV = LayerSpec(kind="conv", in_channels=64, out_channels=128, kernel=(3, 3), stride=(2, 2), padding=(1, 1), bias=True)
SHAPE = (2, 64, 14, 14)


@pytest.mark.parametrize("format", ["tucker2", "spatial", "low_rank"])
def test_every_rank_that_multiplies_less_lies_on_a_curve(format):
    kind, found = FORMATS.get(format), measurement_grid(format, CONV, SHAPE)
    for rank in kind.rank_family(CONV):
        if kind.macs(CONV, rank, SHAPE) > CONV.macs(SHAPE):
            continue
        for point in stage_points(format, CONV, SHAPE, rank):
            curve = found.curve(point, *map(np.array, point.at))
            assert curve is not None
            assert point.at[0] <= max(curve.xs)
            assert point.at[1] <= max(curve.ys)


def test_tucker2_has_two_lines_and_a_plane_with_the_partial_cores_at_its_edge():
    found = measurement_grid("tucker2", CONV, SHAPE)
    lines = {(c.xs, c.ys) for c in found.curves if 1 in (len(c.xs), len(c.ys))}
    (plane,) = (c for c in found.curves if 1 not in (len(c.xs), len(c.ys)))
    assert {xs for xs, ys in lines if len(ys) > 1} == {(64,)}
    assert {ys for xs, ys in lines if len(xs) > 1} == {(128,)}
    assert plane.xs[-1] == 64  # full rank on the input side: the first stage is left out
    assert "k3x3 s2x2 p1x1" in plane.family


def test_levels_grow_and_coarse_points_are_among_the_fine_ones():
    found = measurement_grid("tucker2", CONV, SHAPE)
    assert len(found.levels) == LEVELS
    for coarse, fine in zip(found.levels, found.levels[1:], strict=False):
        assert len(coarse) < len(fine)
        assert set(coarse) <= set(fine)
    assert len(found.levels[0]) < 30


@pytest.mark.parametrize("top", [1, 2, 3, 7, 8, 16, 100, 512, 1000])
def test_ladders_end_at_the_top_and_keep_to_the_step(top):
    for level in range(LEVELS):
        rungs = ladder(top, level=level)
        assert rungs[-1] == top
        assert rungs[0] >= 1
        assert top < 64 or all(r % 4 == 0 for r in rungs[:-1])
    assert set(ladder(top, level=0)) <= set(ladder(top, level=2))


def test_bias_and_nothing_else_is_left_out_of_a_point():
    assert Point.of(CONV, SHAPE).key == Point.of(CONV.replace(bias=False), SHAPE).key
    others = [
        Point.of(CONV.replace(stride=(1, 1)), SHAPE),
        Point.of(CONV.replace(dilation=(2, 2)), SHAPE),
        Point.of(CONV.replace(groups=2), SHAPE),
        Point.of(CONV.replace(padding_mode="reflect"), SHAPE),
        Point.of(CONV.replace(padding="valid"), SHAPE),
        Point.of(CONV.replace(out_channels=64), SHAPE),
        Point.of(CONV, (1, *SHAPE[1:])),
    ]
    assert len({p.key for p in (Point.of(CONV, SHAPE), *others)}) == len(others) + 1


def test_sampled_ranks_save_and_there_is_always_one():
    kind = FORMATS.get("tucker2")
    ranks = sample_ranks("tucker2", CONV, SHAPE, level=1)
    assert all(kind.macs(CONV, r, SHAPE) <= CONV.macs(SHAPE) for r in ranks)
    tiny = LayerSpec(kind="conv", in_channels=2, out_channels=2, kernel=(2, 2))
    assert sample_ranks("tucker2", tiny, (1, 2, 4, 4), level=0)


@pytest.mark.parametrize("format", ["tucker2", "spatial", "low_rank"])
@pytest.mark.parametrize("groups", [1, 2])
def test_columns_are_the_stages_rank_by_rank(format, groups):
    spec = CONV.replace(groups=groups)
    if FORMATS.get(format).unsupported_reason(spec):
        pytest.skip("the format refuses groups")
    most = FORMATS.get(format).max_rank(spec)
    ranks = [{k: max(1, v * n // 7) for k, v in most.items()} for n in range(8)]
    ranks += [{k: v if k == name else 1 for k, v in most.items()} for name in most]
    ranks += [{k: v if k == name else 5 for k, v in most.items()} for name in most]
    expected = sorted((i, p.key) for i, r in enumerate(ranks) for p in stage_points(format, spec, SHAPE, r))
    found = []
    for point, rows, xs, ys in stage_columns(format, spec, SHAPE, ranks):
        found += [(int(i), f"{point.family} {x}->{y}") for i, x, y in zip(rows, xs, ys, strict=True)]
    assert sorted(found) == expected
