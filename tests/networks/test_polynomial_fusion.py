"""Polynomial fusion: the polynomial with all its coefficients multiplied out is the oracle."""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import RankError, WeightError
from tenfold.networks import PolynomialFusion

SIZES = (4, 3, 5)


def inputs(batch: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, d, generator=generator, dtype=torch.float64) for d in SIZES]


def written_out(fusion: PolynomialFusion, given: list[Tensor]) -> Tensor:
    choose = combinations_with_replacement if fusion.repeats else combinations
    out = torch.zeros(len(given[0]), fusion.out_features, dtype=torch.float64)
    if fusion.bias is not None:
        out = out + fusion.bias
    for order in range(1, fusion.order + 1):
        for chosen in choose(range(len(given)), order):
            term = fusion.weight(*chosen).expand(len(given[0]), *fusion.weight(*chosen).shape)
            for k in reversed(chosen):
                term = (term * given[k].view(len(given[k]), *[1] * (term.dim() - 2), -1)).sum(-1)
            out = out + term
    return out


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("order", "repeats"), [(1, False), (2, False), (3, False), (2, True), (4, True)])
def test_equals_the_polynomial_written_out(order: int, repeats: bool, shared: bool) -> None:
    torch.manual_seed(0)
    fusion = PolynomialFusion(SIZES, 2, 3, order=order, repeats=repeats, shared=shared, dtype=torch.float64)
    nn.init.normal_(fusion.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(fusion(*inputs()), written_out(fusion, inputs()))


@pytest.mark.parametrize("shared", [True, False])
def test_counts_are_the_real_ones(shared: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    fusion = PolynomialFusion(SIZES, 7, 3, order=2, shared=shared)
    sets = 1 if shared else 2
    assert sum(p.numel() for p in fusion.parameters()) == sets * 3 * (sum(SIZES) + 7) + 7
    with FlopCounterMode(display=False) as counter:
        fusion(*(x[:1].float() for x in inputs()))
    products = 3 * 3 * (2 if shared else 3)
    assert fusion.macs() == counter.get_total_flops() // 2 + products


@pytest.mark.parametrize(("order", "repeats"), [(2, False), (3, False)])
def test_outputs_begin_with_the_variance_of_a_linear_layer(order: int, repeats: bool) -> None:
    torch.manual_seed(0)
    fusion = PolynomialFusion((50, 40, 60), 400, 200, order=order, repeats=repeats)
    out = fusion(*(torch.randn(300, d) for d in (50, 40, 60)))
    assert float(out.detach().var()) == pytest.approx(1 / 3, rel=0.15)


def test_from_a_trained_layer_is_exact_and_products_can_grow() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(12, 5).double().eval()
    fusion = PolynomialFusion.from_linear(dense, SIZES, rank=6, order=3)
    torch.testing.assert_close(fusion(*inputs()), dense(torch.cat(inputs(), 1)))
    assert not fusion.training
    fusion(*inputs()).square().sum().backward()
    assert float(fusion.outer.grad[2].abs().max()) > 0  # type: ignore[index]
    short = PolynomialFusion.from_linear(dense, SIZES, rank=2, order=2)
    best = torch.linalg.svdvals(dense.weight.detach())[2:].norm()
    found = torch.cat([short.weight(k).detach() for k in range(3)], 1) - dense.weight.detach()
    assert float(found.norm()) == pytest.approx(float(best))


def test_leading_axes_are_kept() -> None:
    fusion = PolynomialFusion(SIZES, 2, 3, dtype=torch.float64, bias=False)
    wide = fusion(*(x.view(2, 3, -1) for x in inputs()))
    torch.testing.assert_close(wide.flatten(0, 1), fusion(*inputs()))


def test_refusals_say_why() -> None:
    with pytest.raises(WeightError, match="two inputs or more"):
        PolynomialFusion((4,), 2, 3)
    with pytest.raises(WeightError, match=r"order=3: products of 2 different inputs have order 1 to 2; repeats=True"):
        PolynomialFusion((4, 4), 2, 3, order=3)
    with pytest.raises(RankError, match="rank=0"):
        PolynomialFusion((4, 4), 2, 0)
    with pytest.raises(WeightError, match=r"last axes \(4, 3, 5\) are asked for"):
        PolynomialFusion(SIZES, 2, 3, dtype=torch.float64)(*inputs()[:2])
    with pytest.raises(WeightError, match="add up to 12"):
        PolynomialFusion.from_linear(nn.Linear(12, 5), (4, 4), 2)
