"""Workers compute what the rule is going to read, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from tenfold.ranks import base, error_bound, rule_from
from torch import nn

from tenfold.calibration import calibrate
from tenfold.decompositions import curves
from tenfold.parallel import Workers
from tenfold.planning import plan
from tenfold.profiling import profile

X = torch.randn(40, 4, 5, 5, generator=torch.Generator().manual_seed(0))


class Elsewhere(Workers):
    """Workers in this process that tell when they are at work."""

    busy = False

    @property
    def here(self) -> bool:
        return False

    def map(self, function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            type(self).busy = True
            try:
                found = function(shared, item)
            finally:
                type(self).busy = False
            yield found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Return what is computed of weights, by name, each with whether workers did."""
    made: list[tuple[str, bool]] = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            made.append((real.__name__, Elsewhere.busy))
            return real(*args, **options)

        return call

    for module, name in ((base, "singular_values"), (curves, "decompose"), (error_bound, "decompose")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return made


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()


@pytest.mark.parametrize("step", [None, 3])
@pytest.mark.parametrize("seeing", [False, True])
def test_a_rule_that_weighs_distortions_waits_for_nothing(
    calls: list[tuple[str, bool]], *, step: int | None, seeing: bool
) -> None:
    model = net()
    cost = profile(model, X[:1])
    moments = calibrate(model, [X]) if seeing else None
    options: dict[str, Any] = {"formats": ["cp3"], "moments": moments, "budget": {"macs": 0.6}, "keep_ends": False}
    rule = rule_from("global", step=step)
    alone = plan(model, cost, rule=rule, **options)
    calls.clear()
    assert plan(model, cost, rule=rule, workers=Elsewhere(), **options) == alone
    assert set(calls) == {("decompose", True)}  # no spectrum bounds the error of cp3, so none is asked for


def test_the_rule_error_searches_by_the_workers_of_the_plan(calls: list[tuple[str, bool]]) -> None:
    model = net()
    rule, options = rule_from("error", rel_error=0.6), {"formats": ["cp3"], "keep_ends": False}
    alone = plan(model, profile(model, X[:1]), rule=rule, **options)
    assert set(calls) == {("decompose", False)}
    calls.clear()
    assert plan(model, profile(model, X[:1]), rule=rule, workers=Elsewhere(), **options) == alone
    assert set(calls) == {("decompose", True)}
