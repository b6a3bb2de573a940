"""The rule ``error``: smallest ranks that reach a bound, against looking at all of them, and what is kept on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.allocation import Pick, rule_from
from tenfold.allocation.rules.threshold import ErrorBound
from tenfold.decompositions import Moments, Sketch, decompose
from tenfold.errors import BudgetError, DataError, TenfoldError
from tenfold.formats import FORMATS, Rank
from tenfold.parallel import Workers
from tenfold.planning import error_search
from tenfold.planning.error_search import ErrorSearch, smallest_within
from tenfold.runtime import Event, Runtime
from tenfold.testing.tables import SideBySide
from tests.allocation.small import beside, conv, picks

CP = ("cp3",)


def steep(out: int = 12, inner: int = 10, decay: float = 0.6) -> torch.Tensor:
    weight = torch.randn(out, inner, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for axis, n in ((0, out), (1, inner)):
        shape = [1] * 4
        shape[axis] = -1
        weight = weight * (decay ** torch.arange(n, dtype=torch.float64)).reshape(shape)
    return weight


def layers(*weights: torch.Tensor) -> SideBySide:
    return beside(*(conv(*weight.shape[:3], weight=weight) for weight in weights))


def searched(model: SideBySide, formats: tuple[str, ...] = CP, **options: Any) -> tuple[Pick, ...]:
    """What the rule finds at a bound of 0.3, however it is run."""
    return picks(model, ErrorBound(rel_error=0.3), formats=formats, **options)


@pytest.mark.parametrize("size", [1, 2, 9, 100])
@pytest.mark.parametrize("curve", [lambda x: 1 - x, lambda x: (1 - x) ** 4, lambda x: float(x < 0.7)])
def test_the_bracket_finds_what_looking_everywhere_finds(size: int, curve) -> None:
    errors = [curve((i + 1) / size) for i in range(size)]
    for bound in (0.0, 0.05, 0.3, 0.99):
        asked: list[int] = []

        def error_at(index: int, asked: list[int] = asked) -> float:
            assert index not in asked, "asked twice"
            asked.append(index)
            return errors[index]

        found = smallest_within(error_at, size, bound)
        assert found == next((i for i, e in enumerate(errors) if e <= bound), None)
        assert len(asked) <= 2 * ceil(log2(size + 1)) + 4


def test_a_coarse_bracket_stops_earlier_and_never_below_the_bound() -> None:
    asked: list[int] = []
    found = smallest_within(lambda i: asked.append(i) or 1 - (i / 1000) ** 0.3, 1000, 0.2, within=0.05)  # type: ignore[func-returns-value]
    assert found is not None
    assert 475 <= found <= 475 * 1.06
    assert found in asked


@pytest.mark.parametrize("format", ["low_rank", "spatial", "tucker2", "cp3", "cp4", "tucker_cp"])
def test_the_rank_meets_the_bound_and_the_one_below_does_not(format: str) -> None:
    weight = steep().float() if format != "low_rank" else steep()[:, :, :1, :1].float()
    model = layers(weight)
    (found,) = picks(model, ErrorBound(rel_error=0.3, within=0.0), formats=(format,))
    assert found.rank is not None
    ranks = [rank for rank, _ in model.eligible("layer0").saving_family(format)]
    place = ranks.index(found.rank)
    assert decompose(weight, format, found.rank).rel_error <= 0.3 * 1.02  # another start may end a little apart
    if place:
        below = decompose(weight, format, ranks[place - 1]).rel_error
        assert below > 0.3 * (1 if FORMATS.get(format).svd_bounds_error else 0.97)


def test_a_bound_that_no_saving_rank_reaches_keeps_the_layer() -> None:
    flat = torch.randn(12, 10, 3, 3, generator=torch.Generator().manual_seed(0))
    (found,) = picks(layers(flat), ErrorBound(rel_error=0.05), formats=CP)
    assert found.format is None


def test_data_decide_where_there_are_moments() -> None:
    x = torch.randn(400, 90, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x * 0.9 ** torch.arange(90, dtype=torch.float64)
    weight, moments = steep(decay=0.8).float(), Moments.of(x)
    model = layers(weight)
    (blind,), (seeing,) = searched(model), searched(model, moments={"layer0": moments})
    assert blind.rank is not None
    assert seeing.rank is not None
    assert seeing.rank["rank"] < blind.rank["rank"]
    fit = decompose(weight, "cp3", seeing.rank, spec=model.eligible("layer0").spec, moments=moments)
    assert fit.output_error is not None
    assert fit.output_error <= 0.31


def test_an_interrupted_search_goes_on_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, steps = tmp_path / "errors.json", list[tuple[int | None, int | None]]()
    runtime = Runtime(cache=file, on_event=lambda event: steps.append((event.done, event.total)))
    first, second = steep(), steep(decay=0.7)
    both = layers(first, second)
    whole = searched(both)
    assert searched(layers(first), runtime=runtime) == whole[:1]
    calls: list[Rank] = []
    real = error_search.decompose

    def counted(weight: torch.Tensor, format: str, rank: Rank, *args: object, **options: object):
        calls.append(rank)
        return real(weight, format, rank, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(error_search, "decompose", counted)
    assert searched(both, runtime=runtime) == whole
    new = len(calls)
    assert steps == [(1, 1), (1, 2), (2, 2)]
    assert new == len(list(json.loads(file.read_text())["entries"].values())[1])  # of the second layer only
    assert searched(both, runtime=runtime) == whole
    assert len(calls) == new
    searched(layers(2 * steep(decay=0.5)), runtime=runtime)  # another weight under the same name
    assert len(calls) > new


def test_a_cache_tells_weights_under_other_data_apart() -> None:
    x = torch.randn(50, 90, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = Moments.of(x, x[:, :12])
    sketched = exact.replace(input_second_moment=Sketch.of(x), cross=None)
    wider = exact.replace(input_second_moment=Sketch.of(2 * x), cross=None)
    layer = layers(steep()).eligible("layer0")
    rule = ErrorBound(rel_error=0.3)
    moments = (None, exact, exact.replace(cross=-exact.cross), sketched, wider)
    searches = [ErrorSearch(replace(layer, moments=own), layer.load_weight(), rule) for own in moments]
    assert len({search.key("cp3") for search in searches}) == 5
    again = exact.replace(input_second_moment=Sketch.of(x.clone()), cross=None)
    assert again.digest() == sketched.digest()


def test_two_searches_on_one_cache_keep_what_the_other_found(tmp_path: Path) -> None:
    file = tmp_path / "errors.json"
    weights = [steep(decay=0.5 + i / 10) for i in range(3)]

    def meanwhile(event: Event) -> None:
        if event.done == 1:
            searched(layers(weights[2]), runtime=Runtime(cache=file))

    searched(layers(*weights[:2]), runtime=Runtime(cache=file, on_event=meanwhile))
    assert len(json.loads(file.read_text())["entries"]) == 3


def test_two_processes_find_what_one_finds() -> None:
    pytest.importorskip("joblib")
    model, formats = layers(steep(), steep(decay=0.7)), ("cp3", "tucker2")
    assert searched(model, formats, runtime=Runtime(workers=Workers(2))) == searched(model, formats)


def test_a_budget_sets_the_bound() -> None:
    model = layers(steep(16, 16), steep(16, 16, 0.8))
    total = model.profile.macs
    found = picks(model, rule_from("error"), {"macs": 0.4 * total}, formats=CP)
    assert 0.3 * total < sum(pick.cost.macs for pick in found) <= 0.4 * total
    assert (found[0].rank or {})["rank"] < (found[1].rank or {})["rank"]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TenfoldError, match=r"rel_error=1\.5"):
        ErrorBound(rel_error=1.5)
    with pytest.raises(TenfoldError, match="sweeps=0"):
        ErrorBound(rel_error=0.3, sweeps=0)
    with pytest.raises(BudgetError, match="a number of its own or a budget"):
        picks(layers(steep()), ErrorBound(), formats=CP)
    (tmp_path / "t.json").write_text("[1]")
    with pytest.raises(DataError, match="not a table"):
        searched(layers(steep()), runtime=Runtime(cache=tmp_path / "t.json"))
