"""Cells of factorized layers run in torch's kernel or by steps: the dense network of their products is the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from tenfold.layers import FactorizedLayer, Recurrent
from tenfold.layers.recurrence import Way
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.surgery import apply, unroll_rnns

KINDS = (nn.LSTM, nn.GRU)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
)


def factorized(dense: nn.Module, sides: str = "ih hh", rank: int = 4, format: str = "low_rank") -> Any:
    """Return a copy of a recurrent network with matrices of this rank on these sides."""
    opened, x = unroll_rnns(dense), torch.randn(3, 3, 12, dtype=next(dense.parameters()).dtype)
    ranks = {path: rank for path, m in opened.named_modules() if isinstance(m, nn.Linear) and path[-2:] in sides}
    recipe = {"rule": {"name": "fixed", "ranks": ranks}, "formats": (format,)}
    found = apply(dense, plan(opened, profile(opened, x), recipe))
    assert sum(isinstance(m, FactorizedLayer) for m in found.modules()) == len(ranks) > 0
    return found.train(dense.training)


def made(kind: Any, *, double: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    net = kind(12, 10, **options).eval()
    return net.double() if double else net


def state_of(kind: Any, net: Any, batch: int) -> Any:
    h = torch.randn(net.num_layers * (1 + net.bidirectional), batch, 10, dtype=torch.float64)
    return (h, h.flip(0).cos()) if kind is nn.LSTM else h


def flat(result: Any) -> list[Tensor]:
    out, state = result
    return [out if isinstance(out, Tensor) else out.data, *((state,) if isinstance(state, Tensor) else state)]


def graded(net: Any, *inputs: Any) -> tuple[list[Tensor], Any]:
    """Return outputs and the gradients of a sum of them that tells all apart."""
    net.zero_grad()
    outs = flat(net(*inputs))
    sum((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outs).backward()  # type: ignore[union-attr]
    return outs, {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.fixture(params=[True, False], ids=["kernel", "steps"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run everything in the kernel, and everything by steps."""
    monkeypatch.setattr(Way, "fuses", lambda *_, **__: request.param)
    return bool(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sides", ["ih hh", "hh"])
def test_both_ways_equal_torch_with_the_products(kind: Any, options: dict[str, Any], sides: str) -> None:
    net = factorized(made(kind, **options), sides)
    dense, x = net.close(), torch.randn(3, 5, 12, dtype=torch.float64)
    batch = 3 if options.get("batch_first") else 5
    packed = pack_padded_sequence(
        x, torch.tensor([2, 5, 4] if batch == 3 else [1, 3, 2, 3, 1]), enforce_sorted=False, batch_first=batch == 3
    )
    for given in ((x,), (x, state_of(kind, net, batch)), (packed,), (packed, state_of(kind, net, batch))):
        with torch.no_grad():
            torch.testing.assert_close(flat(net(*given)), flat(dense(*given)))
        found, _ = graded(net, *given)
        torch.testing.assert_close(found, flat(dense(*given)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_reach_the_factors_alike(kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = factorized(made(kind, **options)).train(), torch.randn(3, 5, 12, dtype=torch.float64)
    found = []
    for fused in (True, False):
        monkeypatch.setattr(Way, "fuses", lambda *_, fused=fused, **__: fused)
        found.append(graded(net, x)[1])
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_half_precision_run_as_well(kind: Any) -> None:
    net = factorized(made(kind, double=False), rank=2, format="tt_matrix")
    x = torch.randn(7, 2, 12)
    torch.testing.assert_close(flat(net(x)), flat(net.close()(x)), rtol=1e-4, atol=1e-5)
    net = factorized(made(kind, double=False))
    wanted = net(x)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(net(x)[0].float(), wanted, atol=0.05)
    half = net.bfloat16()(x.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), wanted, atol=0.05)


def kernels(net: nn.Module, x: Tensor) -> set[str]:
    """Return which operations of torch's own networks a forward runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, torch.no_grad():
        net(x)
    return {event.key for event in seen.key_averages()} & {"aten::lstm", "aten::gru"}


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_run_in_the_kernel_and_small_steps_of_large_matrices_do_not(kind: Any) -> None:
    with torch.device("meta"):
        narrow, wide = (nn.Linear(size, 4 * size) for size in (64, 2048))
    x, onednn = torch.zeros(1), kind is nn.LSTM
    assert Way((narrow,), narrow, narrow).fuses(x, 128, 128 * 8, onednn=onednn)
    assert Way((wide,), wide, wide).fuses(x, 128, 128 * 8, onednn=onednn)
    assert Way((wide,), wide, wide).fuses(x, 1, 1, onednn=True) is False  # a copy of 64 MiB for one product
    net = factorized(made(kind, double=False))
    assert kernels(net, torch.randn(40, 2, 12)) == {f"aten::{kind.__name__.lower()}"}


@pytest.mark.parametrize("kind", KINDS)
def test_watched_and_wrapped_layers_run_step_by_step(kind: Any) -> None:
    net, x = factorized(made(kind, double=False)), torch.randn(40, 2, 12)
    wanted, calls = net(x)[0], [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = net.cells[0].hh.stages[0].register_forward_hook(count)
    assert kernels(net, x) == set()
    assert calls == [40]
    assert torch.allclose(net(x)[0], wanted, atol=1e-6)
    handle.remove()
    net.cells[0].hh = nn.Sequential(net.cells[0].hh)
    assert kernels(net, x) == set()
    before = profile(net, x).macs
    net.cells[0].hh = net.cells[0].hh[0]
    net(x)
    assert profile(net, x).macs == before  # those of the factors, however it runs otherwise


def double_by_data(factor: nn.Parameter) -> None:
    factor.data.mul_(2)


def double(factor: nn.Parameter) -> None:
    with torch.no_grad():
        factor.mul_(2)


def replace_data(factor: nn.Parameter) -> None:
    factor.data = 2 * factor.data


@pytest.mark.parametrize("change", [double_by_data, double, replace_data])
@torch.no_grad()
def test_factors_that_change_are_multiplied_out_again(change: Callable[[nn.Parameter], None]) -> None:
    net, x = factorized(made(nn.LSTM, double=False)), torch.randn(40, 2, 12)
    for layer in (net.cells[0].hh, net.cells[0].ih):
        net(x)
        change(layer.stages[1].weight)
        assert torch.allclose(net(x)[0], net.close()(x)[0], atol=1e-5)


@torch.no_grad()
def test_layers_that_change_are_noticed() -> None:
    net, x = factorized(made(nn.GRU, double=False)), torch.randn(40, 2, 12)
    net(x)
    twin = copy.deepcopy(net)
    assert isinstance(twin, Recurrent)
    net.cells[0].hh.stages[0] = nn.Linear(10, 4, bias=False)
    assert torch.allclose(net(x)[0], net.close()(x)[0], atol=1e-6)
    net.cells[0].hh = nn.Linear(10, 30)
    assert torch.allclose(net(x)[0], net.close()(x)[0], atol=1e-6)
    assert not torch.allclose(twin(x)[0], net(x)[0], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_functions_and_compilers_are_served(kind: Any) -> None:
    net, x = factorized(made(kind, double=False)), torch.randn(4, 40, 2, 12)
    with torch.no_grad():
        wanted = torch.stack([net(each)[0] for each in x])
        assert torch.allclose(torch.func.vmap(lambda each: net(each)[0])(x), wanted, atol=1e-6)
        sizes: list[int] = []

        def backend(graph: Any, _: Any) -> Any:
            sizes.append(len(graph.graph.nodes))
            return graph.forward

        compiled = torch.compile(nn.Sequential(nn.Linear(12, 12), net), backend=backend)
        compiled(x[0])
    assert sum(sizes) < 40  # of whatever stands around the network: its 40 steps are not unrolled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exported_programs_hold_the_operator(kind: Any, options: dict[str, Any]) -> None:
    net = factorized(made(kind, double=False, **options)).eval()
    axis = 0 if options.get("batch_first") else 1
    program = torch.export.export(net, (torch.randn(5, 5, 12),), dynamic_shapes=({axis: torch.export.Dim("batch")},))
    name = f"{kind.__name__.lower()}.input"
    assert sum(name in str(node.target) for node in program.graph.nodes) == len(net.cells)
    shape = [5, 5, 12]
    shape[axis] = 3
    x = torch.randn(shape)
    torch.testing.assert_close(program.module()(x)[0], net(x)[0], atol=1e-5, rtol=1e-4)
