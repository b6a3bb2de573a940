"""The record of a data flow: what made which tensor, what took it and how often, in place or not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from tenfold.tracing.replay import Replay
from tenfold.tracing.trace import Tracer, Use, trace

X = torch.randn(4, 6)


class Flow(nn.Module):
    """Two linear layers, batch norm, and what ``way`` does between them."""

    def __init__(self, way) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.drop, self.relu = nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.way = way

    def forward(self, x: Tensor):
        return self.way(self, x)


def flow(way):
    return trace(Flow(way).eval(), X)


@torch.jit.script
def scripted_sum(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def test_a_chain_is_a_chain():
    found = flow(lambda m, x: m.last(m.norm(m.first(x))))
    assert found.calls == {"": 1, "first": 1, "norm": 1, "last": 1}
    assert [(v.makers, v.uses) for v in found.values] == [
        (["first"], [Use("norm")]),
        (["norm"], [Use("last")]),
        (["last", ""], [Use("")]),
    ]
    assert found.follower("first") == "norm"
    assert found.follower("last") is None
    assert [v.shape for v in found.values] == [(4, 6)] * 3
    assert found.spans["first"] < found.spans["norm"] < found.spans["last"]


def test_what_hands_a_tensor_on_is_one_of_its_makers():
    (value, *_) = flow(lambda m, x: m.norm(m.drop(m.first(x)).contiguous())).values
    assert (value.makers, value.uses) == (["first", "drop"], [Use("norm")])


@pytest.mark.parametrize(
    "way",
    [
        lambda m, x: (m.norm(y := m.first(x)), y),  # returned as well
        lambda m, x: m.norm(y := m.first(x)) * y,
        lambda m, x: m.norm((y := m.first(x)).view(-1, 6)) * y[0],
        lambda m, x: m.norm(m.first(m.first(x))),
        lambda m, x: m.norm(m.norm(m.first(x))),
        lambda m, x: m.norm(m.first(x).add_(1)),
        lambda m, x: m.norm(m.first(x).relu()),
        lambda m, x: scripted_sum(y := m.first(x), m.norm(y)),
        lambda m, x: F.linear(m.first(x), m.norm.weight.diag()),
    ],
)
def test_who_is_not_alone_does_not_follow(way):
    assert flow(way).follower("first") is None


def test_a_change_in_place_makes_another_value():
    found = flow(lambda m, x: m.norm(m.relu(m.first(x))))
    before, after = found.values[:2]
    assert (before.makers, before.uses) == (["first"], [Use("relu")])
    assert (after.makers, after.uses, after.changed_from) == (["relu"], [Use("norm")], before)
    by_hand = flow(lambda m, x: m.norm(m.first(x).mul_(2))).taken_by("norm")
    assert by_hand.makers == []
    assert by_hand.changed_from.makers == ["first"]


@pytest.mark.parametrize(
    "join", [torch.add, lambda x, y: x.add_(y), lambda x, y: torch.add(x, y, out=torch.empty(4, 6)), scripted_sum]
)
def test_sums_are_seen_however_they_are_written(join):
    found = flow(lambda m, x: join(m.first(x), m.last(x)))
    assert found.is_added("first")
    assert found.is_added("last")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_checkpointed_blocks_are_seen_through(reentrant):
    found = flow(lambda m, x: x + m.last(m.norm(checkpoint(m.first, x, use_reentrant=reentrant))))
    assert found.follower("first") == "norm"
    assert found.is_added("last")


def test_forwards_stop_within_scripted_code_too():
    model = Flow(lambda m, x: scripted_sum(m.first(x), m.last(x))).eval()
    ((x, y, shortcut),) = Replay(model, [X]).branches("last", "last")
    with torch.no_grad():
        torch.testing.assert_close((x, y, shortcut), (X, model.last(X), model.first(X)))


@pytest.mark.parametrize(
    ("way", "read"),
    [
        (lambda m, x: m.first(x) @ m.last.weight.data.T, {"last"}),
        (lambda m, x: m.first(x) + m.last.bias.sum(), {"last"}),
        (lambda m, x: scripted_sum(m.first(x), m.norm.weight.expand_as(x)), {"norm"}),
        (lambda m, x: m.last(m.first(x)), set()),
        (lambda m, x: m.first(x).view(m.last.weight.T.shape[0], -1).type_as(m.last.weight), set()),
        (lambda m, x: m.first(x) + torch.ones_like(m.last.weight)[0] + m.last.weight.new_zeros(6), set()),
    ],
)
def test_weights_that_others_compute_with(way, read):
    assert flow(way).read_outside == read


def test_weights_that_share_memory_are_told_apart():
    model = Flow(lambda m, x: m.last(m.first(x)) @ m.last.weight)
    whole = torch.randn(2, 6, 6)
    model.first.weight, model.last.weight = nn.Parameter(whole[0]), nn.Parameter(whole[1])
    assert trace(model, X).read_outside == {"last"}


def test_errors_that_the_model_catches_leave_the_rest_of_the_record_right():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.norm, self.first = Fails(), nn.BatchNorm1d(6), nn.Linear(6, 6)

        def forward(self, x):
            y = self.first(x)
            try:
                self.fails(y)
            except ValueError:
                return self.norm(y)

    found = trace(Tries().eval(), X)
    assert found.calls["fails"] == 1
    assert found.follower("first") == "norm"


def test_no_tensor_is_held_and_all_is_as_it_was():
    kept = []

    def way(m, x):
        kept.append(weakref.ref(y := m.first(x)))
        return m.last(y)

    model = Flow(way).train()
    found = trace(model, X)
    gc.collect()
    assert len(found.values) == 2
    assert kept[0]() is None
    assert model.training
    with pytest.raises(RuntimeError), Tracer(dict(model.named_modules())):
        model(torch.zeros(1, 5))
    assert not _get_current_dispatch_mode_stack()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_scripted_modules_count_as_part_of_whoever_calls_them():
    model = nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.BatchNorm1d(6).eval()))
    found = trace(model, X)
    assert found.values[0].uses[0] == Use("")
    assert found.follower("0") is None
