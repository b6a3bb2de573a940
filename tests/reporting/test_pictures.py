"""Plots carry every number beside the picture, and say what they cannot show."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tenfold.errors import DataError, MissingExtraError
from tenfold.records import (
    Cost,
    LayerSensitivity,
    SensitivityKey,
    SensitivityPoint,
    SensitivityTable,
    TradeOff,
    TradeOffPoint,
)
from tenfold.reporting import pictures
from tenfold.reporting.pictures import plot_sensitivity, plot_tradeoff

pytest.importorskip("matplotlib")

WHOLE = Cost(params=1000, macs=10_000)


def point(share: float, format: str = "tucker2", score: float | None = None) -> SensitivityPoint:
    cost = Cost(params=round(1000 * share), macs=round(10_000 * share))
    return SensitivityPoint(
        format=format, rank={"out": round(16 * share), "in": 4}, cost=cost, output_error=1 - share, score=score
    )


def table(layers: int = 3, *, scores: bool = True) -> SensitivityTable:
    found = [
        LayerSensitivity(
            path=f"layer{i}",
            kind="Conv2d 16→16 3×3",
            before=Cost(params=1000 + i, macs=10_000 + i),
            state="compressible",
            points=tuple(
                point(share, format, 0.9 - 0.2 * (1 - share) if scores else None)
                for format in ("tucker2", "low_rank")
                for share in (0.25, 0.5, 0.75)
            ),
        )
        for i in range(layers)
    ]
    fixed = LayerSensitivity(
        path="norm", kind="BatchNorm2d", before=Cost(params=3), state="not compressible", reason="has no kernel"
    )
    return SensitivityTable(
        tenfold="1",
        model="Net",
        key=SensitivityKey(model="x"),
        baseline=0.9 if scores else None,
        layers=(*found, fixed),
    )


def curve(**changes: Any) -> TradeOff:
    points = tuple(
        TradeOffPoint(budget=s, cost=Cost(params=900, macs=round(9_900 * s)), damage=1 - s, score=0.8 + s / 10)
        for s in (0.25, 0.5, 0.75)
    )
    whole = TradeOff(model="Net", budget="macs", rule={"name": "ratio"}, before=WHOLE, baseline=0.9, points=points)
    return whole.replace(**changes)


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list into which every figure drawn from now on goes."""
    figures: list[Any] = []
    make = pictures._figure
    monkeypatch.setattr(pictures, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    return figures


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_sensitivity_writes_picture_and_numbers(tmp_path: Path) -> None:
    written = plot_sensitivity(table(), tmp_path / "curves")
    assert [p.name for p in written] == ["curves.png", "curves.csv", "curves.json"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    found = rows(written[1])
    assert len(found) == 3 * 6 + 1
    assert found[0]["rank"] == "out=4 in=4"
    assert float(found[0]["score_lost"]) == pytest.approx(0.15)
    assert found[-1]["state"] == "not compressible"
    assert found[-1]["score"] == ""
    assert SensitivityTable.load(written[2]) == table()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.csv", "curves.json", "curves.png"]


def test_many_layers_are_the_costliest_and_the_numbers_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = drawn(monkeypatch)
    _, numbers, _ = plot_sensitivity(table(53), tmp_path / "many.png", layers=5)
    titles = [panel.get_title() for panel in figures[0].axes if panel.get_title()]
    assert [title.split(" ")[0] for title in titles] == [f"layer{i}" for i in range(48, 53)]
    assert len({row["path"] for row in rows(numbers)}) == 54


def test_curves_show_what_was_measured_and_never_rise_with_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = LayerSensitivity(
        path="a",
        kind="Conv2d",
        before=WHOLE,
        state="compressible",
        points=(point(0.25, score=0.7), point(0.5, score=0.85), point(0.75, score=0.8)),
    )
    figures = drawn(monkeypatch)
    plot_sensitivity(table().replace(layers=(noisy,)), tmp_path / "a.png")
    fitted, dots = figures[0].axes[0].get_lines()
    assert list(dots.get_xdata()) == [25, 50, 75]
    assert list(dots.get_ydata()) == pytest.approx([20, 5, 10])
    assert list(fitted.get_ydata()) == pytest.approx([20, 7.5, 7.5, 0], abs=1e-3)
    assert list(fitted.get_xdata()) == [25, 50, 75, 100]


def test_output_errors_without_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    plot_sensitivity(table(scores=False), tmp_path / "errors.png")
    assert "error of the layer" in figures[0].get_supylabel()
    assert list(figures[0].axes[0].get_lines()[1].get_ydata()) == [0.75, 0.5, 0.25]
    with pytest.raises(DataError, match="no score of any layer"):
        plot_sensitivity(table(scores=False), tmp_path / "scores.png", value="score")
    assert not (tmp_path / "scores.png").exists()


def test_tradeoff_marks_the_chosen_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    written = plot_tradeoff(curve(), tmp_path / "trade.png", chosen=0.52)
    found = rows(written[1])
    assert [row["chosen"] for row in found] == ["0", "1", "0"]
    assert [float(row["damage"]) for row in found] == [0.75, 0.5, 0.25]
    assert json.loads(written[2].read_text())["points"][1]["cost"] == {"params": 900, "macs": 4950}
    score, damage = figures[0].axes
    assert list(score.get_lines()[0].get_xdata()) == pytest.approx([24.75, 49.5, 74.25])
    assert list(score.get_lines()[0].get_ydata()) == pytest.approx([82.5, 85, 87.5])
    assert list(damage.get_lines()[1].get_xydata()[0]) == pytest.approx([49.5, 0.5])
    assert any("49.5 %" in text.get_text() for text in damage.texts)


def test_tradeoff_by_cost_by_latency_and_by_damage_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = curve(points=tuple(p.replace(score=None) for p in curve().points))
    written = plot_tradeoff(bare, tmp_path / "a.png", cost=Cost(macs=7000))
    assert [row["chosen"] for row in rows(written[1])] == ["0", "0", "1"]
    figures = drawn(monkeypatch)
    plot_tradeoff(bare.replace(budget="latency"), tmp_path / "b.png")
    assert list(figures[0].axes[0].get_lines()[0].get_xdata()) == [25, 50, 75]
    with pytest.raises(DataError, match="no budget of the curve can be met"):
        plot_tradeoff(curve(points=()), tmp_path / "c.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"tenfold\[plots\]"):
        plot_sensitivity(table(), tmp_path / "a.png")
