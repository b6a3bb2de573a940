"""EVBMF finds planted ranks and agrees with a plain NumPy version; the rule weakens what it finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tenfold.allocation import Pick, rule_from
from tenfold.allocation.rules.evbmf import EVBMF
from tenfold.errors import BudgetError, TenfoldError, WeightError
from tenfold.formats import FORMATS
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.records import LayerPlan, LayerSpec
from tenfold.surgery import apply
from tenfold.tensors.vbmf import evbmf
from tenfold.testing.tables import SideBySide
from tests.allocation.oracles import evbmf_rank
from tests.allocation.small import selection

PLANTED = [(64, 576, 12), (256, 2304, 40), (512, 512, 60)]


def spectrum(rows: int, columns: int, rank: int, *, seed: int = 0, noise: float = 1.0) -> np.ndarray:
    g = np.random.default_rng(seed)
    low = 0.35 * g.standard_normal((rows, rank)) @ g.standard_normal((rank, columns))
    square = low + noise * g.standard_normal((rows, columns))
    return np.sqrt(np.linalg.eigvalsh(square @ square.T)[::-1])


def conv(weight: Tensor) -> nn.Conv2d:
    """The convolution of a weight (groups, out, in, k, k), with padding that keeps the size."""
    groups, out, inner, k, _ = weight.shape
    layer = nn.Conv2d(groups * inner, groups * out, k, padding=k // 2, groups=groups, bias=False)
    layer.weight.data = weight.flatten(0, 1)
    return layer


def beside(*layers: nn.Conv2d, side: int = 8) -> SideBySide:
    named = {f"conv{i}": layer for i, layer in enumerate(layers)}
    return SideBySide(named, {name: (1, layer.in_channels, side, side) for name, layer in named.items()})


def choice(weight: Tensor, formats: tuple[str, ...] = ("tucker2",), **settings: object) -> Pick:
    (found,) = selection(beside(conv(weight)), EVBMF(**settings), formats=formats).picks
    return found


def extreme(weight: Tensor) -> dict[str, int]:
    """The ranks of EVBMF itself; a mode of noise stays whole."""
    rank = choice(weight, weaken=1, min_rank=1).rank
    assert rank is not None
    return rank


def kernel(
    out: int, inner: int, ranks: tuple[int, int], *, groups: int = 1, k: int = 3, noise: float = 0.1, seed: int = 0
) -> Tensor:
    """A kernel with these Tucker-2 ranks, plus noise."""
    g = torch.Generator().manual_seed(seed)
    core = torch.randn(groups, *ranks, k, k, generator=g)
    left = torch.randn(groups, out, ranks[0], generator=g)
    right = torch.randn(groups, inner, ranks[1], generator=g)
    signal = torch.einsum("gabxy,goa,gib->goixy", core, left, right)
    return signal / signal.std() + noise * torch.randn(groups, out, inner, k, k, generator=g)


# --- the solution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "rank"), PLANTED)
@pytest.mark.parametrize("threshold", ["approximate", "exact"])
def test_planted_rank_and_noise_are_found(rows: int, columns: int, rank: int, threshold: str) -> None:
    # For the square matrix the estimator is high by 2 % on average, give or take 0.3 % between draws.
    found = evbmf(spectrum(rows, columns, rank, seed=1), columns, threshold=threshold)
    assert found.rank == rank == len(found.shrunken)
    assert found.noise_variance == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("rows", "columns"), [(64, 576), (256, 2304), (512, 512), (3, 64), (1, 50)])
def test_pure_noise_has_rank_zero(rows: int, columns: int) -> None:
    for seed in range(3):
        assert evbmf(spectrum(rows, columns, 0, seed=seed), columns).rank == 0


@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1e-12, 1e6, 1e150])
def test_scale_does_not_matter(scale: float) -> None:
    values = np.arange(1, 257) ** -1.5  # where a search with an absolute tolerance goes wrong
    one, other = evbmf(values, 600), evbmf(values * scale, 600)
    assert one.rank == other.rank
    assert other.cutoff == pytest.approx(one.cutoff * scale, rel=1e-9)
    assert other.noise_variance == pytest.approx(one.noise_variance * scale * scale, rel=1e-9)
    np.testing.assert_allclose(other.shrunken, one.shrunken * scale, rtol=1e-9)


def random_spectrum(kind: str, size: int, g: np.random.Generator) -> np.ndarray:
    k = np.arange(1, size + 1)
    values = {
        "power": lambda: k ** -g.uniform(0.1, 2.5),
        "exponential": lambda: np.exp(-g.uniform(0.01, 0.1) * k),
        "random": lambda: g.exponential(size=size) + 1e-3,
        "planted": lambda: spectrum(size, 3 * size, size // 5, seed=int(g.integers(1000))),
        "plateaus": lambda: np.repeat(g.exponential(size=-(-size // 4)) + 1e-3, 4)[:size],
    }[kind]()
    return np.sort(values)[::-1] * 10.0 ** g.integers(-6, 6)


@pytest.mark.parametrize("kind", ["power", "exponential", "random", "planted", "plateaus"])
@pytest.mark.parametrize("exact", [False, True])
def test_equals_the_plain_version(kind: str, exact: bool) -> None:
    g = np.random.default_rng(7)
    for _ in range(25):
        size = int(g.integers(2, 80))
        columns = int(g.integers(size, 10 * size))
        values = random_spectrum(kind, size, g)
        rank, noise, cutoff = evbmf_rank(values, columns, exact=exact)
        found = evbmf(values, columns, threshold="exact" if exact else "approximate")
        assert found.rank == rank
        # The energy is flat at its minimum, and has kinks where a component passes the edge.
        assert found.noise_variance == pytest.approx(noise, rel=2e-3)
        assert found.cutoff == pytest.approx(cutoff, rel=1e-3)


def test_shrunken_values_solve_the_stationarity_condition() -> None:
    values = spectrum(64, 576, 12)
    found = evbmf(values, 576)
    alpha, x = 64 / 576, values[:12] ** 2 / (576 * found.noise_variance)
    tau = found.shrunken * values[:12] / (576 * found.noise_variance)
    np.testing.assert_allclose(tau + (1 + alpha) + alpha / tau, x, rtol=1e-10)
    assert (found.shrunken < values[:12]).all()


def test_exact_threshold_is_stricter_but_for_square_matrices() -> None:
    values = np.arange(1, 65) ** -0.7
    assert evbmf(values, 6400, threshold="exact").cutoff > evbmf(values, 6400).cutoff
    assert evbmf(values, 64, threshold="exact").cutoff == pytest.approx(evbmf(values, 64).cutoff, rel=1e-4)


def test_degenerate_spectra() -> None:
    assert evbmf(np.zeros(5), 9).rank == 0
    assert evbmf([3.0], 1).rank == 0
    assert evbmf(np.ones(8), 8).rank == 0
    assert evbmf([5e-324, 0, 0], 9).rank == evbmf([1, 0, 0], 9).rank == 1
    # An exact low rank, its tail rounding noise as a Gram matrix leaves it: half zeros, half 1e-8.
    tail = np.where(np.arange(50) % 2, 0.0, 2e-8)
    assert evbmf(np.concatenate([np.linspace(2, 1, 14), tail]), 576).rank == 14
    assert evbmf(torch.tensor([1.0, 3.0, 2.0]), 8).rank == evbmf([3, 2, 1], 8).rank  # in any order, as a tensor too


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [1.0, -1.0], [1.0] * 5, [[1.0, 2.0]]])
def test_spectra_that_cannot_be(bad: list[float]) -> None:
    with pytest.raises(WeightError):
        evbmf(bad, 4)


# --- the rule ----------------------------------------------------------------------------------------------------


def test_modes_of_a_kernel_get_their_own_ranks() -> None:
    weight = kernel(48, 32, (14, 9))
    found = choice(weight, weaken=1, min_rank=1)
    assert found.format == "tucker2"
    assert found.rank == {"out": 14, "in": 9}
    assert found.reason == "EVBMF ranks, weakened by 1"
    spec = LayerSpec(kind="conv", in_channels=32, out_channels=48, kernel=(3, 3))
    for name, rows in (("out", 48), ("in", 32)):
        unfolded = FORMATS.get("tucker2").unfoldings(weight, spec)[name][0].double().numpy()
        assert evbmf_rank(np.linalg.svd(unfolded, compute_uv=False), unfolded.shape[1])[0] == found.rank[name]
        assert unfolded.shape == (rows, 9 * 48 * 32 // rows)


@pytest.mark.parametrize(
    ("weaken", "min_rank", "expected"), [(1, 1, 14), (0.5, 1, 31), (0.8, 1, 20), (1, 21, 21), (0.9, 1, 17)]
)
def test_weakening_is_musco_s(weaken: float, min_rank: int, expected: int) -> None:
    found = choice(kernel(48, 48, (14, 14)), weaken=weaken, min_rank=min_rank)
    assert found.rank is not None
    assert found.rank["out"] == expected  # max(floor(48 − w(48 − 14)), R_min)


def test_a_mode_at_or_below_the_least_rank_stays_whole() -> None:
    assert choice(kernel(32, 8, (3, 2)), weaken=1, min_rank=8).rank == {"out": 8, "in": 8}


def test_noise_is_kept() -> None:
    noise = torch.randn(1, 32, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    found = choice(noise, ("tucker2", "low_rank", "spatial"))
    assert (found.format, found.reason) == (None, "EVBMF finds nothing but noise in this weight")
    assert choice(torch.zeros(1, 32, 32, 3, 3)).format is None


def test_a_mode_of_noise_keeps_its_rank_where_the_other_has_structure() -> None:
    g = torch.Generator().manual_seed(0)
    pattern = 1.8 * torch.randn(64, 3, 3, generator=g)  # one combination of outputs, over all inputs and taps alike
    weight = torch.einsum("o,ixy->oixy", torch.ones(32) / 32**0.5, pattern)
    weight = weight + torch.randn(32, 64, 3, 3, generator=g)
    assert choice(weight[None], weaken=1, min_rank=1).rank == {"out": 1, "in": 64}


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_groups_share_a_rank_and_their_noise_is_noise(groups: int) -> None:
    noise = torch.randn(groups, 32, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    assert choice(noise, weaken=1, min_rank=1).format is None
    assert extreme(kernel(32, 32, (6, 5), groups=groups)) == {"out": 6, "in": 5}


def test_further_compression_starts_from_the_present_rank() -> None:
    inner = kernel(24, 20, (6, 5), noise=0.1)[0]
    g = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, r, generator=g)).Q for n, r in ((64, 24), (64, 20)))
    weight = torch.einsum("abxy,oa,ib->oixy", inner, left, right)[None]
    model, x = nn.Sequential(conv(weight)), torch.zeros(1, 64, 8, 8)
    fixed = {"rule": {"name": "fixed", "ranks": {"0": {"out": 24, "in": 20}}}, "formats": "tucker2"}
    small = apply(model, plan(model, profile(model, x), fixed))

    def further(**settings: object) -> LayerPlan:
        rule = {"name": "evbmf", "min_rank": 1, **settings}
        recipe = {"rule": rule, "formats": "tucker2", "keep_ends": False}
        return plan(small, profile(small, x), recipe).layer("0")

    # The core's own ranks, as if it were the layer: of the dense weight, all 24 and 20 values stand out.
    assert further(weaken=1).rank == {"out": 6, "in": 5}
    half = further(weaken=0.5)
    assert (half.rank, half.reason) == ({"out": 15, "in": 12}, "EVBMF ranks, weakened by 0.5")
    assert further(weaken=0, min_rank=8).action == "keep"


# Kernels of the kind that one finds in networks: some wide, some with few channels, one 1×1, one grouped.
NETWORK = [(64, 3, 1, 7), (64, 64, 1, 3), (128, 64, 1, 3), (128, 64, 1, 1), (96, 32, 4, 3), (160, 40, 1, 5)]
FAMILIES = ("tucker2", "low_rank", "spatial")


@pytest.fixture(scope="module")
def network() -> SideBySide:
    layers = []
    for n, (out, inner, groups, k) in enumerate(NETWORK):
        ranks = (max(out // groups // 4, 1), max(inner // 3, 1))
        layers.append(conv(kernel(out // groups, inner, ranks, groups=groups, k=k, seed=n, noise=0.5)))
    return beside(*layers, side=14)


@pytest.mark.parametrize("settings", [{}, {"weaken": 1.0, "min_rank": 1}, {"weaken": 0.3}, {"threshold": "exact"}])
def test_choices_obey_the_laws(network: SideBySide, settings: dict[str, float]) -> None:
    found = selection(network, rule_from("evbmf", **settings), formats=FAMILIES).picks
    taken = [pick for pick in found if pick.format is not None]
    assert taken
    for pick in taken:
        layer = network.eligible(pick.path)
        assert FORMATS.get(pick.format).check_rank(layer.spec, pick.rank) == pick.rank
        assert layer.cost_at(pick.format, pick.rank) == pick.cost
        assert pick.cost.below(layer.cost)


def test_stronger_weakening_costs_less(network: SideBySide) -> None:
    shares = (1.0, 0.8, 0.5, 0.2, 0.0)
    costs = [selection(network, EVBMF(weaken=w), formats=FAMILIES).cost.macs for w in shares]
    assert costs == sorted(costs)
    assert costs[0] < costs[1] < costs[-1] == network.profile.macs


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_budgets_are_met_by_weakening(network: SideBySide, share: float) -> None:
    limit = share * network.profile.macs
    assert 0.93 * limit < selection(network, EVBMF(min_rank=4), {"macs": limit}, FAMILIES).cost.macs <= limit


def test_budgets_out_of_reach_name_the_range(network: SideBySide) -> None:
    least = selection(network, EVBMF(weaken=1), formats=FAMILIES).cost
    with pytest.raises(BudgetError, match=rf"EVBMF, .*max_macs={least.macs}\)"):
        selection(network, EVBMF(), {"macs": 0.9 * least.macs}, FAMILIES)
    assert selection(network, EVBMF(), {"macs": least.macs}, FAMILIES).cost == least


@pytest.mark.parametrize("settings", [{"weaken": 1.1}, {"weaken": -0.1}, {"min_rank": 0}, {"threshold": "exakt"}])
def test_settings_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(TenfoldError, match=next(iter(settings))):
        rule_from("evbmf", **settings)
