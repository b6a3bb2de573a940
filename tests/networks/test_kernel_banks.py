"""Banks of kernels: convolutions with the kernels that they stand for are the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tenfold.decompositions import Moments, decompose
from tenfold.errors import BudgetError, RankError, WeightError
from tenfold.networks import BankProblem, KernelBank, SharedConv, TrainBank, TuckerBank, choose_ranks, fit_bank_
from tenfold.records import LayerSpec

KINDS: list[type[KernelBank]] = [TuckerBank, TrainBank]
RANKS = [{"layers": 2, "out": 4, "in": 3}, {"layers": 3, "in": 3}, {"out": 4}, {}]


def _spec(kernel: tuple[int, ...], **options: Any) -> LayerSpec:
    return LayerSpec(kind="conv", in_channels=5, out_channels=6, kernel=kernel, bias=True, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_shared_convolution_is_the_convolution_with_its_kernel(kind: Any, ranks: dict[str, int]) -> None:
    torch.manual_seed(0)
    bank = kind(4, 6, 5, (3, 2), ranks, dtype=torch.float64)
    spec = _spec((3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
    layer = SharedConv(bank, 3, spec, nn.Parameter(torch.randn(6, dtype=torch.float64)))
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    wanted = nn.functional.conv2d(x, layer.weight, layer.bias, (1, 2), (1, 0), (2, 1))
    with FlopCounterMode(display=False) as counter:
        found = layer(x)
    torch.testing.assert_close(found, wanted)
    assert counter.get_total_flops() == 2 * bank.macs(2 * 7 * 8, found[:, 0].numel())
    torch.testing.assert_close(bank.weights()[3], layer.weight)
    assert sum(p.numel() for p in bank.parameters()) == kind.count(bank.full_shape, bank.ranks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [(3,), (2, 3, 2)])
def test_other_numbers_of_axes(kind: Any, kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = SharedConv(kind(3, 6, 5, kernel, {"out": 4, "in": 3}), 1, _spec(kernel))
    run: Any = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(kernel) - 1]
    x = torch.randn(2, 5, *(k + 3 for k in kernel))
    torch.testing.assert_close(layer(x), run(x, layer.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_begin_with_the_variance_of_he(kind: Any) -> None:
    torch.manual_seed(0)
    bank = kind(6, 16, 16, (3, 3), {"out": 8, "in": 8, "layers": 4})
    assert float(bank.weights().detach().square().mean()) == pytest.approx(2 / 144, rel=1e-4)


def _layers(count: int = 4, out: int = 8, into: int = 6) -> tuple[list[torch.Tensor], list[Moments]]:
    """Return kernels that have filters in common, and moments whose inputs and outputs differ in what they count."""
    draw = torch.Generator().manual_seed(1)
    basis = torch.randn(3, out, into, 3, 3, generator=draw)
    mixes = torch.randn(count, 3, generator=draw)
    kernels = torch.einsum("la,a...->l...", mixes, basis) + 0.6 * torch.randn(count, out, into, 3, 3, generator=draw)
    moments = []
    for _ in range(count):
        rows = torch.randn(400, into * 9, generator=draw).double() * torch.logspace(0, -1.5, into * 9).double()
        gram = torch.diag(torch.logspace(0, -2, out, dtype=torch.float64))[None]
        moments.append(Moments.of(rows).replace(output_gram=gram))
    return list(kernels), moments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [False, True])
def test_full_ranks_are_exact_and_errors_fall_with_rank(kind: Any, *, seen: bool) -> None:
    kernels, moments = _layers()
    problem = BankProblem.of(kernels, moments if seen else None)
    bank = kind(4, 8, 6, (3, 3), {}, dtype=torch.float64)
    assert fit_bank_(bank, problem) < 1e-12
    torch.testing.assert_close(bank.weights(), torch.stack(kernels).double(), rtol=0, atol=1e-8)
    lost = []
    for size in (2, 3, 4):
        bank = kind(4, 8, 6, (3, 3), {"layers": size, "out": 2 * size, "in": size}, dtype=torch.float64)
        lost.append(fit_bank_(bank, problem, steps=30))
        assert lost[-1] == pytest.approx(float(problem.error(bank.weights()).detach()), abs=1e-9)
    assert lost[0] > lost[1] > lost[2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_joint_fit_beats_the_start_and_a_fit_without_data(kind: Any) -> None:
    kernels, moments = _layers()
    problem = BankProblem.of(kernels, moments)
    ranks = {"layers": 2, "out": 5, "in": 4}

    def lost(known: BankProblem, steps: int) -> float:
        bank = kind(4, 8, 6, (3, 3), ranks, dtype=torch.float64)
        fit_bank_(bank, known, steps=steps)
        return float(problem.error(bank.weights()).detach())

    best = lost(problem, 60)
    assert best < 0.97 * lost(problem, 0)
    assert best < 0.8 * lost(BankProblem.of(kernels), 60)
    nothing = torch.zeros(1, 8, 54).double()
    exact = [m.distortion(k.double().flatten(1)[None], nothing) for m, k in zip(moments, kernels, strict=True)]
    assert problem.errors(torch.zeros_like(problem.weights)) == pytest.approx(exact, rel=2e-3)  # but for the ridges


def test_with_all_layers_kept_and_one_layer_a_bank_is_tucker2() -> None:
    kernel = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    bank = TuckerBank(1, 8, 6, (3, 3), {"out": 5, "in": 4}, dtype=torch.float64)
    lost = fit_bank_(bank, BankProblem.of([kernel]))
    fit = decompose(kernel, "tucker2", {"out": 5, "in": 4})
    assert lost == pytest.approx(fit.rel_error**2, rel=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_chosen_within_the_parameters_and_where_errors_count(kind: Any) -> None:
    kernels, moments = _layers()
    loud = [m.replace(output_gram=100 * m.output_gram) for m in moments]  # type: ignore[operator]
    problems = [BankProblem.of(kernels, moments), BankProblem.of(kernels, loud)]
    limit = 2 * 1100
    quiet, heard = choose_ranks(problems, limit, kind)
    shape = (4, 8, 6, 3, 3)
    assert kind.count(shape, quiet) < kind.count(shape, heard)
    assert kind.count(shape, quiet) + kind.count(shape, heard) <= limit
    with pytest.raises(BudgetError):
        choose_ranks(problems, 10, kind)


def test_bad_input_is_told() -> None:
    with pytest.raises(RankError, match=r"rank out=7 is outside 1\.\.6"):
        TuckerBank(4, 6, 5, (3, 3), {"out": 7})
    with pytest.raises(RankError, match="layers, out, in, not width"):
        TrainBank(4, 6, 5, (3, 3), {"width": 2})
    with pytest.raises(WeightError, match="one to three spatial axes"):
        TuckerBank(4, 6, 5, ())
    bank = TuckerBank(4, 6, 5, (3, 3))
    with pytest.raises(WeightError, match="is none of the bank's"):
        SharedConv(bank, 4, _spec((3, 3)))
    with pytest.raises(WeightError, match="grouped"):
        SharedConv(bank, 0, LayerSpec(kind="conv", in_channels=10, out_channels=12, kernel=(3, 3), groups=2))
    with pytest.raises(WeightError, match="'reflect'"):
        SharedConv(bank, 0, _spec((3, 3), padding_mode="reflect"))
    with pytest.raises(WeightError, match="kernels of one shape"):
        BankProblem.of([torch.zeros(6, 5, 3, 3), torch.zeros(6, 5, 1, 1)])
    with pytest.raises(WeightError, match="the bank is for kernels"):
        fit_bank_(bank, BankProblem.of([torch.ones(6, 5, 3, 3)]))


def test_a_copied_network_shares_among_its_own_layers() -> None:
    bank = TuckerBank(2, 6, 6, (3, 3), {"out": 3})
    spec = LayerSpec(kind="conv", in_channels=6, out_channels=6, kernel=(3, 3))
    net = nn.Sequential(SharedConv(bank, 0, spec), SharedConv(bank, 1, spec))
    twin: Any = copy.deepcopy(net)
    assert twin[0].bank is twin[1].bank is not bank
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in bank.parameters())
