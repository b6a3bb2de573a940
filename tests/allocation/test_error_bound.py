"""The rule ``error``: smallest ranks that reach a bound, against looking at all of them, and what is kept on disk."""

from __future__ import annotations

import dataclasses
import json
from math import ceil, log2
from pathlib import Path

import pytest
import torch
from tenfold.ranks import Choose, Keep, RankProblem, error_bound, rule_from
from tenfold.ranks.bracket import smallest_within
from tenfold.ranks.error_bound import ErrorBound, saving

from tenfold.decompositions import Moments, Sketch, decompose
from tenfold.errors import BudgetError, DataError, TenfoldError
from tenfold.formats import FORMATS, Rank, join_groups
from tenfold.parallel import Workers
from tests.allocation.test_rules import problem


def steep(out: int = 12, inner: int = 10, decay: float = 0.6) -> torch.Tensor:
    weight = torch.randn(out, inner, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for axis, n in ((0, out), (1, inner)):
        shape = [1] * 4
        shape[axis] = -1
        weight = weight * (decay ** torch.arange(n, dtype=torch.float64)).reshape(shape)
    return weight


def layer(format: str, weight: torch.Tensor, **options: object) -> RankProblem:
    out, inner = weight.shape[:2]
    return problem(out, inner, formats=(format,), weight=weight, **options)


def error_of(at: RankProblem, format: str, rank: Rank) -> float:
    return decompose(join_groups(at.load_weight(), at.spec), format, rank, spec=at.spec).rel_error


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
    weight = steep() if format != "low_rank" else steep()[:, :, :1, :1].clone()
    at = layer(format, weight, k=1 if format == "low_rank" else 3)
    (choice,) = ErrorBound(rel_error=0.3, within=0.0).select([at])
    assert isinstance(choice, Choose)
    ranks = saving(at, format)
    place = ranks.index(choice.rank)
    assert error_of(at, format, choice.rank) <= 0.3 * 1.02  # another start may end a little apart
    if place:
        assert error_of(at, format, ranks[place - 1]) > 0.3 * (1 if FORMATS.get(format).svd_bounds_error else 0.97)


def test_a_bound_that_no_saving_rank_reaches_keeps_the_layer() -> None:
    flat = torch.randn(12, 10, 3, 3, generator=torch.Generator().manual_seed(0))
    (choice,) = ErrorBound(rel_error=0.05).select([layer("cp3", flat)])
    assert isinstance(choice, Keep)


def test_data_decide_where_there_are_moments() -> None:
    x = torch.randn(400, 90, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x * 0.9 ** torch.arange(90, dtype=torch.float64)
    blind = layer("cp3", steep(decay=0.8))
    seeing = dataclasses.replace(blind, metric=Moments.of(x))
    first, second = (ErrorBound(rel_error=0.3).select([p])[0] for p in (blind, seeing))
    assert isinstance(first, Choose)
    assert isinstance(second, Choose)
    assert second.rank["rank"] < first.rank["rank"]
    fit = decompose(blind.load_weight()[0], "cp3", second.rank, spec=blind.spec, moments=seeing.metric)
    assert fit.output_error is not None
    assert fit.output_error <= 0.31
    assert "output error" in second.note


def test_an_interrupted_search_goes_on_from_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "errors.json"
    problems = [layer("cp3", steep(), path="a"), layer("cp3", steep(decay=0.7), path="b")]
    steps: list[tuple[int, int]] = []
    rule = ErrorBound(rel_error=0.3, table=file, progress=lambda done, total: steps.append((done, total)))
    whole = ErrorBound(rel_error=0.3).select(problems)
    assert rule.select(problems[:1]) == whole[:1]
    calls: list[Rank] = []
    real = error_bound.decompose

    def counted(weight: torch.Tensor, format: str, rank: Rank, *args: object, **options: object):
        calls.append(rank)
        return real(weight, format, rank, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(error_bound, "decompose", counted)
    assert rule.select(problems) == whole
    new = len(calls)
    assert steps == [(1, 1), (1, 2), (2, 2)]
    assert new == len(list(json.loads(file.read_text())["errors"].values())[1])  # of the second layer only
    assert rule.select(problems) == whole
    assert len(calls) == new
    other = [layer("cp3", 2 * steep(decay=0.5), path="a")]  # another weight under the same name
    rule.select(other)
    assert len(calls) > new


def test_a_table_tells_weights_under_other_data_apart() -> None:
    x = torch.randn(50, 90, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = Moments.of(x, x[:, :12])
    sketched = exact.replace(input_second_moment=Sketch.of(x), cross=None)
    wider = exact.replace(input_second_moment=Sketch.of(2 * x), cross=None)
    at = layer("cp3", steep())
    metrics = (None, exact, exact.replace(cross=-exact.cross), sketched, wider)
    assert len({error_bound._digest(at.load_weight(), at.spec, metric) for metric in metrics}) == 5
    again = exact.replace(input_second_moment=Sketch.of(x.clone()), cross=None)
    assert again.digest() == sketched.digest()


def test_two_searches_on_one_table_keep_what_the_other_found(tmp_path: Path) -> None:
    file = tmp_path / "errors.json"
    problems = [layer("cp3", steep(decay=0.5 + i / 10), path=str(i)) for i in range(3)]

    def meanwhile(done: int, total: int) -> None:
        if done == 1:
            ErrorBound(rel_error=0.3, table=file).select(problems[2:])

    ErrorBound(rel_error=0.3, table=file, progress=meanwhile).select(problems[:2])
    assert len(json.loads(file.read_text())["errors"]) == 3


def test_two_processes_find_what_one_finds() -> None:
    pytest.importorskip("joblib")
    problems = [layer("cp3", steep(), path="a"), layer("tucker2", steep(), path="b")]
    assert ErrorBound(rel_error=0.3, workers=Workers(2)).select(problems) == ErrorBound(rel_error=0.3).select(problems)


def test_a_budget_sets_the_bound() -> None:
    problems = [layer("cp3", steep(16, 16), path="a"), layer("cp3", steep(16, 16, 0.8), path="b")]
    total = sum(p.cost.macs for p in problems)
    choices = rule_from("error").select(problems, {"macs": 0.4 * total})
    used = sum(p.cost_at(c.format, c.rank).macs for p, c in zip(problems, choices, strict=True))  # type: ignore[union-attr]
    assert 0.3 * total < used <= 0.4 * total
    assert choices[0].rank["rank"] < choices[1].rank["rank"]  # type: ignore[union-attr]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TenfoldError, match=r"rel_error=1\.5"):
        ErrorBound(rel_error=1.5)
    with pytest.raises(TenfoldError, match="sweeps=0"):
        ErrorBound(rel_error=0.3, sweeps=0)
    with pytest.raises(BudgetError, match="a number of its own or a budget"):
        ErrorBound().select([layer("cp3", steep())])
    (tmp_path / "t.json").write_text("[1]")
    with pytest.raises(DataError, match="not a table"):
        ErrorBound(rel_error=0.3, table=tmp_path / "t.json").select([layer("cp3", steep())])


def test_the_plan_says_the_rule_without_how_it_was_run(tmp_path: Path) -> None:
    rule = ErrorBound(rel_error=0.3, table=tmp_path / "t.json", workers=Workers(2))
    assert rule.to_dict() == {"name": "error", "rel_error": 0.3, "within": 0.02, "sweeps": 30, "seed": 0}
