"""Recurrence of higher order: torch's own networks and all coefficients multiplied out are the oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import RankError, UnknownNameError, WeightError
from tenfold.networks import (
    OPERATIONS,
    Forecaster,
    GeneralizedTTNetwork,
    HigherOrderCell,
    HigherOrderLSTM,
    HigherOrderRNN,
    taught_steps,
)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize(("order", "ranks"), [(1, ()), (2, 3), (3, (2, 4))])
def test_gates_are_the_polynomial_of_the_whole_tensor(order: int, ranks: Any) -> None:
    torch.manual_seed(0)
    cell = HigherOrderCell(3, 4, 2, lags=2, order=order, ranks=ranks or 1, dtype=torch.float64)
    for core in cell.cores:
        nn.init.normal_(core)
    history, projected = randn(5, 8), randn(5, 8)
    s = torch.cat([torch.ones(5, 1, dtype=torch.float64), history], 1)
    wanted = []
    for row in s:
        rest = cell.weight()
        for _ in range(order):
            rest = rest @ row
        wanted.append(rest)
    torch.testing.assert_close(cell(projected, history), projected + torch.stack(wanted))


@pytest.mark.parametrize(("made", "dense"), [(HigherOrderLSTM, nn.LSTM), (HigherOrderRNN, nn.RNN)])
@pytest.mark.parametrize("options", [{"lags": 1, "order": 1}, {"lags": 3, "order": 3, "ranks": 2}])
@pytest.mark.parametrize("bias", [True, False])
def test_a_trained_network_is_represented_exactly(made: Any, dense: Any, options: Any, bias: bool) -> None:
    torch.manual_seed(0)
    source = dense(3, 4, num_layers=2, bias=bias, batch_first=True).double()
    net, x = made.from_dense(source, **options), randn(2, 6, 3)
    found, wanted = net(x)[0], source(x)[0]
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    if net.cells[0].order > 1:  # what is to grow gets gradients
        assert float(net.cells[0].cores[-1].grad[1].abs().max()) > 0


def test_states_go_on_where_they_ended_and_axes_may_be_swapped() -> None:
    torch.manual_seed(0)
    net = HigherOrderLSTM(3, 4, num_layers=2, lags=3, dtype=torch.float64)
    x = randn(7, 2, 3)
    whole, last = net(x)
    first, states = net(x[:4])
    rest, ended = net(x[4:], states)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    for one, other in zip(last, ended, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(last[1][0][:, :4], whole[-1])  # the latest state comes first
    torch.testing.assert_close(last[1][0][:, 4:8], whole[-2])
    net.batch_first = True
    torch.testing.assert_close(net(x.transpose(0, 1))[0].transpose(0, 1), whole)


def test_costs_are_the_real_ones() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    net = HigherOrderLSTM(3, 16, lags=2, order=3, ranks=2)
    cell: Any = net.cells[0]
    assert sum(p.numel() for p in net.parameters()) == 3 * 64 + 33 * (2 + 2 * 2 + 2 * 64)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 1, 3))
    assert cell.macs() == counter.get_total_flops() // 2 + 2 * 2 * 33


@pytest.mark.parametrize("kind", ["hot-lstm", "hot-rnn", "lstm", "rnn"])
def test_forecasts_run_freely_or_are_taught(kind: Any) -> None:
    torch.manual_seed(0)
    model = Forecaster(2, 5, horizon=4, kind=kind).double()
    past, truth = randn(3, 6, 2), randn(3, 4, 2)
    free = model(past)
    assert free.shape == (3, 4, 2)
    never, always = torch.zeros(3, 4), torch.ones(3, 4)
    torch.testing.assert_close(model(past, truth, never), free)
    taught = model(past, truth, always)
    torch.testing.assert_close(taught[:, 0], free[:, 0])
    assert not torch.allclose(taught[:, 1], free[:, 1])
    changed = truth.clone()
    changed[:, -1] += 1  # the last true step begins no prediction
    torch.testing.assert_close(model(past, changed, always), taught)
    one = always.clone()
    one[1] = 0
    mixed = model(past, truth, one)
    torch.testing.assert_close(mixed[0], taught[0])
    torch.testing.assert_close(mixed[1], free[1])


def test_taught_steps_are_as_many_as_asked_for() -> None:
    found = taught_steps((200, 50), 0.3, torch.Generator().manual_seed(0))
    assert float(found.mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_steps_are_what_they_are_said_to_be(operation: str) -> None:
    torch.manual_seed(0)
    net = GeneralizedTTNetwork(4, 2, rank=3, features=5, operation=operation, dtype=torch.float64)
    features, state = randn(2, 5), randn(2, 3)
    wanted = torch.zeros(2, 3, dtype=torch.float64)
    for i in range(5):
        for j in range(3):
            joined = OPERATIONS[operation](features[:, i], state[:, j])
            wanted += joined[:, None] * net.core.detach()[j, i]
    torch.testing.assert_close(net.step(features, state), wanted)


def test_products_are_a_tensor_train_of_the_features_of_all_steps() -> None:
    torch.manual_seed(0)
    net = GeneralizedTTNetwork(4, 2, rank=3, features=5, operation="product", dtype=torch.float64)
    net.norm = nn.Identity()  # type: ignore[assignment]
    x = randn(1, 4, 4)
    features = net.features_of(x)[0]
    whole = net.first[None]
    for _ in range(4):
        whole = torch.tensordot(whole, net.core, 1)  # (1, d, d, d, d, R)
    rest = whole[0]
    for row in features:
        rest = torch.tensordot(row, rest, 1)
    torch.testing.assert_close(net(x)[0], net.head(rest))


@pytest.mark.parametrize("operation", ["product", "rectifier"])
def test_long_sequences_neither_vanish_nor_explode(operation: str) -> None:
    torch.manual_seed(0)
    net = GeneralizedTTNetwork(4, 2, rank=8, features=6, operation=operation)
    x = torch.randn(3, 300, 4, requires_grad=True)
    out = net(x)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert float(net.core.grad.norm()) > 1e-6  # type: ignore[union-attr]


def test_refusals_say_why() -> None:
    with pytest.raises(RankError, match="2 ranks"):
        HigherOrderRNN(3, 4, order=3, ranks=(2,))
    with pytest.raises(WeightError, match="lags=0"):
        HigherOrderRNN(3, 4, lags=0)
    with pytest.raises(WeightError, match="num_layers=0"):
        HigherOrderLSTM(3, 4, 0)
    with pytest.raises(WeightError, match="two axes and then 3"):
        HigherOrderLSTM(3, 4)(torch.randn(2, 5, 4))
    with pytest.raises(WeightError, match="made from a RNN of one direction with tanh"):
        HigherOrderRNN.from_dense(nn.RNN(3, 4, nonlinearity="relu"))
    with pytest.raises(WeightError, match="kind='gru', horizon=3: a kind is one of hot-lstm"):
        Forecaster(3, 4, horizon=3, kind="gru")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="Did you mean rectifier"):
        GeneralizedTTNetwork(3, 2, rank=2, features=2, operation="rectified")
    with pytest.raises(WeightError, match=r"\(batch, steps, 4\) is asked for"):
        GeneralizedTTNetwork(4, 2, rank=3, features=5)(torch.randn(2, 4))
