"""TT-GRU, TT-LSTM and recurrent networks in the open: torch's own, with the dense weights, are the oracle."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from tenfold.errors import WeightError
from tenfold.layers import TTGRU, TTLSTM, TTLinear, open_recurrent

KINDS = [(TTGRU, nn.GRU), (TTLSTM, nn.LSTM)]
OPTIONS = [
    {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias}
    for layers, both, first, bias in product((1, 2), (False, True), (False, True), (True, False))
    if bias or (layers == 2 and both)
]


def _net(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(12, 8, ranks=3, in_modes=(2, 3, 2), hidden_modes=(2, 2, 2), dtype=torch.float64, **options)


def _state(net: Any, batch: int, kind: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    shape = (net.num_layers * net.directions, batch, 8)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(net.states)]
    return made[0] if kind is TTGRU else tuple(made)


def _flat(result: Any) -> list[Tensor]:
    out, state = result
    data = out if isinstance(out, Tensor) else out.data
    return [data, *((state,) if isinstance(state, Tensor) else state)]


def _expect_same(net: Any, dense: nn.Module, x: Any, hx: Any = None) -> None:
    for found, wanted in zip(_flat(net(x, hx)), _flat(dense(x, hx)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "dense"), KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sides", ["input", "both"])
def test_equals_torch(kind: Any, dense: Any, options: dict[str, Any], sides: str) -> None:
    net = _net(kind, sides=sides, **options)
    oracle = net.close()
    assert type(oracle) is dense
    x = torch.randn(5, 4, 12, dtype=torch.float64)
    _expect_same(net, oracle, x)
    batch = 5 if options["batch_first"] else 4
    _expect_same(net, oracle, x, _state(net, batch, kind))


@pytest.mark.parametrize(("kind", "dense"), KINDS)
@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences(kind: Any, dense: Any, in_order: bool) -> None:
    net = _net(kind, num_layers=2, bidirectional=True)
    oracle = net.close()
    lengths = torch.tensor([6, 4, 4, 1] if in_order else [4, 1, 6, 4])
    x = torch.randn(6, 4, 12, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=in_order)
    for hx in (None, _state(net, 4, kind)):
        _expect_same(net, oracle, packed, hx)
    padded, seen = pad_packed_sequence(net(packed)[0])
    wanted, _ = pad_packed_sequence(oracle(packed)[0])
    assert torch.equal(seen, lengths)
    torch.testing.assert_close(padded, wanted)


@pytest.mark.parametrize(("kind", "dense"), KINDS)
def test_one_sequence_without_a_batch(kind: Any, dense: Any) -> None:
    net = _net(kind, num_layers=2, bidirectional=True)
    oracle = net.close()
    x = torch.randn(6, 12, dtype=torch.float64)
    hx = _state(net, 1, kind)
    hx = hx[:, 0] if kind is TTGRU else tuple(h[:, 0] for h in hx)
    for given in (None, hx):
        found, wanted = _flat(net(x, given)), _flat(oracle(x, given))
        assert [t.shape for t in found] == [t.shape for t in wanted]
        _expect_same(net, oracle, x, given)


@pytest.mark.parametrize(("kind", "dense"), KINDS)
@pytest.mark.parametrize("sides", ["input", "both"])
def test_gradients_are_those_of_torch(kind: Any, dense: Any, sides: str) -> None:
    """The gradients of the cores are those of the dense weights, carried through ``weight``."""
    net = _net(kind, num_layers=2, bidirectional=True, sides=sides)
    oracle = net.close()
    x, hx = torch.randn(5, 4, 12, dtype=torch.float64), _state(net, 4, kind)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for model, given in ((net, mine), (oracle, theirs)):
        sum(
            (t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in _flat(model(given, hx))
        ).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    found = {k: p.grad.clone() for k, p in net.named_parameters()}
    net.zero_grad()
    layers = [layer for cell in net.cells for layer in (cell.ih, cell.hh)]
    names = [f"{s}_l{k}{e}" for k in range(2) for e in ("", "_reverse") for s in ("ih", "hh")]
    for layer, name in zip(layers, names, strict=True):
        (layer.weight * getattr(oracle, f"weight_{name}").grad).sum().backward()
        (layer.bias * getattr(oracle, f"bias_{name}").grad).sum().backward()
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, msg=key)


@pytest.mark.parametrize(("kind", "dense"), KINDS)
def test_full_rank_from_a_trained_network_is_exact(kind: Any, dense: Any) -> None:
    torch.manual_seed(1)
    source = dense(12, 8, num_layers=2, bidirectional=True, batch_first=True).double()
    for sides in ("input", "both"):
        net = kind.from_dense(source, 99, in_modes=(2, 3, 2), hidden_modes=(2, 2, 2), sides=sides)
        _expect_same(net, source, torch.randn(3, 5, 12, dtype=torch.float64))


def test_dropout_lies_between_layers_and_only_in_training() -> None:
    net = _net(TTGRU, num_layers=2, dropout=1.0)
    x = torch.randn(5, 4, 12, dtype=torch.float64)
    _expect_same(net.eval(), net.close().eval(), x)
    net.train()
    assert net.close().training
    _expect_same(net, net.close(), x)  # with p = 1 nothing is left to chance


@pytest.mark.parametrize(("kind", "wanted"), [(TTGRU, 3232), (TTLSTM, 3360)])
def test_parameters_of_the_sources(kind: Any, wanted: int) -> None:
    """Yang et al. 2017: UCF11, 57,600 inputs to 256 hidden states."""
    net = kind(57_600, 256, in_modes=(8, 20, 20, 18), hidden_modes=(4, 4, 4, 4), ranks=4)
    assert sum(core.numel() for core in net.cells[0].ih.cores) == wanted


@pytest.mark.parametrize(("kind", "dense"), KINDS)
def test_the_weights_begin_with_the_variance_of_torch(kind: Any, dense: Any) -> None:
    net = kind(600, 64, in_modes=(6, 10, 10), hidden_modes=(4, 4, 4), ranks=5, sides="both")
    for layer in (net.cells[0].ih, net.cells[0].hh):
        assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx((3 * 64) ** -0.5, rel=1e-4)


def test_refusals_say_why() -> None:
    with pytest.raises(WeightError, match="proj_size=2: a projection is a low-rank"):
        TTLSTM(12, 8, proj_size=2)
    with pytest.raises(WeightError, match="sides='output'"):
        TTGRU(12, 8, sides="output")  # type: ignore[arg-type]
    with pytest.raises(WeightError, match="made from a GRU, not from a LSTM"):
        TTGRU.from_dense(nn.LSTM(4, 4))
    with pytest.raises(WeightError, match="a RNN cannot be opened"):
        open_recurrent(nn.RNN(4, 4))
    with pytest.raises(WeightError, match=r"hx has the shape \(1, 3, 8\), it must be \(1, 4, 8\)"):
        _net(TTGRU)(torch.zeros(5, 4, 12, dtype=torch.float64), torch.zeros(1, 3, 8, dtype=torch.float64))
    with pytest.raises(WeightError, match="out_modes"):
        TTLinear(12, 8, in_modes=(3, 4), out_modes=(3, 3))


@pytest.mark.parametrize("dense", [nn.GRU, nn.LSTM])
def test_opening_and_closing_change_nothing(dense: Any) -> None:
    torch.manual_seed(2)
    source = dense(6, 5, num_layers=2, bidirectional=True, dropout=0.3).eval()
    opened = open_recurrent(source)
    assert not opened.training
    assert opened.cells[0].ih.weight is source.weight_ih_l0
    x = torch.randn(4, 3, 6)
    for found, wanted in zip(_flat(opened(x)), _flat(source(x)), strict=True):
        torch.testing.assert_close(found, wanted)
    closed = opened.close()
    assert all(torch.equal(v, closed.state_dict()[k]) for k, v in source.state_dict().items())
    assert closed.dropout == 0.3


@pytest.mark.parametrize(
    ("kind", "inputs", "words"),
    [
        (nn.LSTM, (torch.zeros(5),), r"LSTM has the shape \(5,\), its last axis is to have 5 entries"),
        (nn.GRU, (torch.zeros(2, 3, 4, 5),), r"GRU has the shape \(2, 3, 4, 5\)"),
        (nn.GRU, (torch.zeros(2, 3, 4),), r"GRU has the shape \(2, 3, 4\), its last axis is to have 5 entries"),
        (nn.LSTM, (pack_sequence([torch.zeros(3, 4)]),), r"LSTM has the shape \(3, 4\)"),
        (nn.LSTM, (torch.zeros(2, 3, 5), torch.zeros(1, 3, 4)), r"hx of LSTM is a pair of tensors.*not Tensor"),
        (nn.GRU, (torch.zeros(2, 3, 5), (torch.zeros(1, 3, 4),) * 2), r"hx of GRU is one tensor, not tuple"),
    ],
)
def test_what_an_unrolled_network_cannot_take_is_told(kind: Any, inputs: tuple[Any, ...], words: str) -> None:
    with pytest.raises(WeightError, match=words):
        open_recurrent(kind(5, 4))(*inputs)
