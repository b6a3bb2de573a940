"""What is seen of a forward: decisions that route rows, values left behind, numbers drawn, and what is set back."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tenfold.tracing.decisions import Imposed, Recorder
from tenfold.tracing.memory import Memory
from tenfold.tracing.randomness import Randomness, same_state
from tenfold.tracing.side_effects import SideEffects
from tenfold.tracing.trace import trace

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))


class Does(nn.Module):
    """A forward that is a function of the output of one layer."""

    def __init__(self, what) -> None:
        super().__init__()
        self.what, self.same, self.result = what, nn.Identity(), None

    def forward(self, x: Tensor) -> Tensor:
        self.result = self.what(self.same(x + 0))
        return x


def made(what, x: Tensor = X) -> list:
    recorder = Recorder()
    trace(Does(what), x, watchers=[recorder])
    return [decision.result for decision in recorder.decisions.made.values()]


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x.argsort(0).tolist(),
        lambda x: x.argmax(-1).tolist(),
        lambda x: x.max(-1).indices + 1,
        lambda x: x[x[:, 0] > 0],
        lambda x: x[(x[:, 0] > 0) & (x[:, 1] < 1)],
        lambda x: (x[:, 0] > 0).float() @ x,
        lambda x: x.masked_select(~(x > 0)),
        lambda x: torch.multinomial(x.exp(), 2),
        lambda x: x[: int(x.abs().sum())],
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x.index_add(0, x[:, 0].abs().long() % 12, x),
    ],
)
def test_decisions_that_route_rows_are_recorded_and_imposed(what):
    recorder = Recorder()
    first, second = Does(what), Does(what)
    trace(first, X, watchers=[recorder])
    assert recorder.decisions.made
    trace(second, OTHER, watchers=[Imposed(recorder.decisions)])
    again = Recorder()
    trace(Does(what), OTHER, watchers=[Imposed(recorder.decisions), again])
    own, others = (list(found.decisions.made.values()) for found in (recorder, again))
    assert len(own) == len(others)
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one.result, other.result)
    if isinstance(first.result, Tensor):
        assert first.result.shape == second.result.shape


@pytest.mark.parametrize(
    "what",
    [
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x * (x > 0),
        lambda x: x.masked_fill(x < 0, 0).relu(),
        lambda x: x.max(-1)[0],
        lambda x: x.topk(2).values * 2,
        lambda x: x[:, [0, 2, 1]],
        lambda x: x[torch.arange(4)],
        lambda x: nn.functional.max_pool1d(x, 2, return_indices=True),
    ],
)
def test_signs_and_values_are_no_decisions(what):
    assert not made(what)


@pytest.mark.parametrize(
    ("what", "axis"),
    [
        (lambda x: x.topk(2, dim=0), 0),
        (lambda x: x.max(1, keepdim=True), 1),
        (lambda x: x.sort(0, descending=True), 0),
        (lambda x: [part[..., None] for part in x.min(-1)], -1),
    ],
)
def test_values_are_those_at_the_places_that_are_imposed(what, axis):
    recorder, model = Recorder(), Does(lambda x: [part + 0 for part in what(x)])
    trace(model, X, watchers=[recorder])
    places = model.result[1]
    trace(model, OTHER, watchers=[Imposed(recorder.decisions)])
    assert torch.equal(model.result[1], places)
    assert torch.equal(model.result[0], OTHER.take_along_dim(places, axis))


KEPT: list[Tensor] = []


class Leaves(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc, self.relu = how, nn.Linear(5, 5), nn.ReLU()
        self.register_buffer("cache", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        match self.how:
            case "input":
                self.seen = x
            case "inner":
                self.seen = y * 2
            case "list":
                KEPT.append(y * 2)
            case "buffer":
                self.cache.copy_(y[0])
        return self.relu(y)


class Reads(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Sequential(Leaves(how), nn.Identity()), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x + 1)
        if self.how in ("input", "inner"):
            return y + self.inner[0].seen
        return y + KEPT.pop() if self.how == "list" else y + self.inner[0].cache


@pytest.mark.parametrize("how", ["nothing", "input", "inner", "list", "buffer"])
def test_what_is_left_behind_is_found_with_who_left_it(how):
    model = Reads(how)
    effects = SideEffects(model, Randomness(model))
    trace(model, X, watchers=[effects])
    assert effects.leaves - {""} == (set() if how == "nothing" else {"inner", "inner.0"})
    assert effects.hidden == (how == "list")
    assert not effects.draws


def test_who_draws_is_found_whatever_draws():
    for draw in (partial(torch.rand, 1), np.random.rand, random.random):

        class Draws(nn.Module):
            def forward(self, x: Tensor, draw=draw) -> Tensor:
                return x * float(draw())

        model = nn.Sequential(nn.Identity(), nn.Sequential(Draws()), nn.ReLU())
        effects = SideEffects(model, Randomness(model))
        trace(model, X, watchers=[effects])
        assert effects.draws == {"", "1", "1.0"}


def test_generators_draw_the_same_from_a_seed_and_are_set_back():
    model = nn.Identity()
    model.held = [torch.Generator()]
    model.own, model.numbers = torch.Generator(), np.random.default_rng()
    model.legacy, model.plain = np.random.RandomState(), random.Random()  # noqa: S311
    known = Randomness(model)

    def drawn() -> list[float]:
        return [
            torch.rand(1).item(),
            torch.rand(1, generator=model.own).item(),
            model.numbers.random(),
            model.legacy.rand(),
            model.plain.random(),
            np.random.rand(),  # noqa: NPY002
            random.random(),  # noqa: S311
        ]

    before, rows = known.state(), []
    for seed in (3, 3, 4):
        with known.seeded(seed):
            rows.append(drawn())
        assert same_state(known.state(), before)
    assert rows[0] == rows[1]
    assert not set(rows[0]) & set(rows[2])


def test_attributes_containers_and_buffers_are_set_back():
    model = nn.Sequential(nn.Linear(2, 2))
    model.number, model.seen, model.state = 1, [torch.ones(1)], torch.ones(2)
    model.register_buffer("steps", torch.zeros(2))
    model[0].register_buffer("replaced", torch.zeros(2))
    kept = (model.seen, model.seen[0], model.state, model.steps, model[0].replaced)
    memory = Memory(model)
    assert memory.restore() == (False, set())
    model.number += 1
    model.seen.append(model.state)
    model.state = model.state * 2
    model.fresh = 3
    model.steps += 1
    model[0].replaced = model[0].replaced + 1
    assert memory.restore() == (True, {""})
    assert (model.number, len(model.seen), hasattr(model, "fresh")) == (1, 1, False)
    now = (model.seen, model.seen[0], model.state, model.steps, model[0].replaced)
    assert all(a is b for a, b in zip(now, kept, strict=True))
    assert not model.steps.any()
