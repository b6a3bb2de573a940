"""Candidates on disk: strict, versioned, whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenfold.errors import DataError
from tenfold.records import Candidates, Cost, ForwardTime, LayerCandidates, LayerPlan, Merged, Options, Plan

DENSE = Cost(params=100, macs=1000)


def options(**changes: Any) -> Options:
    values: dict[str, Any] = {
        "format": "tucker2",
        "names": ("out", "in"),
        "ranks": ((1, 2), (3, 4)),
        "params": (10, 20),
        "macs": (100, 200),
        "distortion": (0.1 + 0.2, 1e-300),
    }
    return Options(**values | changes)


def candidates(**changes: Any) -> Candidates:
    kept = LayerPlan(path="fc", kind="Linear", action="keep", reason="", before=DENSE, after=DENSE)
    plan = Plan(tenfold="0.1", model="Net", before=DENSE, after=DENSE, layers=(kept,))
    layer = LayerCandidates(path="fc", options=(options(),))
    return Candidates(**{"tenfold": "0.1", "plan": plan, "layers": (layer,)} | changes)


def test_every_bit_comes_back(tmp_path: Path) -> None:
    made = candidates()
    made.save(tmp_path / "deep" / "candidates.json")
    assert Candidates.load(tmp_path / "deep" / "candidates.json") == made
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["candidates.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": (10,)}, "columns"),
        ({"distortion": (0.1, 0.2, 0.3)}, "columns"),
        ({"latency_ms": (0.1,)}, "columns"),
        ({"ranks": ((1,), (3,))}, "columns"),
        ({"merged": (Merged(option=2, rank={"out": 1}, cost=DENSE, note=""),)}, "not among them"),
        ({"params": (-1, 2)}, "greater than or equal to 0"),
    ],
)
def test_columns_fit_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        options(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "upgrade tenfold"),
        ({"layers": (LayerCandidates(path="conv"),)}, "'conv' has candidates and is not in the plan"),
        ({"time": ForwardTime(dense_ms=1.0, whole_ms=1.0)}, "either all layers have milliseconds"),
        ({"layers": (LayerCandidates(path="fc", latency_ms=1.0),)}, "either all layers have milliseconds"),
    ],
)
def test_the_whole_fits_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        candidates(**changes)


@pytest.mark.parametrize(
    ("text", "words"), [(None, "cannot read"), ("{", "does not hold"), ('{"a": 1}', "does not hold")]
)
def test_what_is_something_else_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "candidates.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        Candidates.load(file)


def test_options_by_format() -> None:
    layer = candidates().layers[0]
    assert layer.of("tucker2").rank(1) == {"out": 3, "in": 4}
    with pytest.raises(KeyError):
        layer.of("low_rank")
