"""Workers give the same table, and they alone decompose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.calibration import calibrate
from tenfold.decompositions import curves
from tenfold.parallel import Workers
from tenfold.planning import error_search, tabulate
from tenfold.profiling import profile
from tenfold.progress import Event
from tenfold.runtime import Runtime

X = torch.randn(40, 4, 5, 5, generator=torch.Generator().manual_seed(0))


class Elsewhere(Workers):
    """Workers in this process that tell when they are at work."""

    busy = False

    @property
    def is_local(self) -> bool:
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
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return for each decomposition whether workers did it."""
    made: list[bool] = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            made.append(Elsewhere.busy)
            return real(*args, **options)

        return call

    for module in (curves, error_search):
        monkeypatch.setattr(module, "decompose", watched(module.decompose))
    return made


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()


@pytest.mark.parametrize(
    ("rule", "seeing"),
    [
        ({"name": "global"}, False),
        ({"name": "global", "step": 3}, False),
        ({"name": "global"}, True),
        ({"name": "error", "rel_error": 0.6}, False),
    ],
)
def test_workers_give_the_same_table(calls: list[bool], rule: dict[str, Any], *, seeing: bool) -> None:
    model, steps = net(), list[Event]()
    cost = profile(model, X[:1])
    moments = calibrate(model, [X]) if seeing else None
    recipe = {"rule": rule, "formats": "cp3", "budget": {"macs": 0.6}, "keep_ends": False}
    alone = tabulate(model, cost, recipe, moments=moments)
    assert set(calls) == {False}
    calls.clear()
    runtime = Runtime(workers=Elsewhere(), on_event=steps.append)
    table = tabulate(model, cost, recipe, moments=moments, runtime=runtime)
    for ours, theirs in zip(table.eligible, alone.eligible, strict=True):
        (own,), (other,) = ours.options, theirs.options
        assert own.ranks.tolist() == other.ranks.tolist()
        for name, column in own.columns.items():
            np.testing.assert_allclose(column, other.columns[name], rtol=1e-6, equal_nan=True)
    assert set(calls) == {True}
    assert steps == [Event("weigh options", done, 2) for done in (1, 2)]
