"""Scores that are no fractions are shown as what they are, wherever scores are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenfold.checkpoint.card import model_card
from tenfold.records import (
    Cost,
    LayerSensitivity,
    Metric,
    RunRecord,
    SensitivityKey,
    SensitivityPoint,
    SensitivityTable,
    TradeOff,
    TradeOffPoint,
)
from tenfold.reporting import as_text, render_record
from tenfold.reporting.charts import sensitivity, stage_path, trade_offs, training
from tenfold.reporting.comparison import best, compare
from tenfold.reporting.comparison_page import comparison
from tenfold.reporting.pictures import plot_sensitivity
from tenfold.reporting.report import report, tiles
from tenfold.reporting.run_files import Run
from tenfold.reporting.sensitivity_tables import sensitivity_tables
from tenfold.reporting.tabular import as_csv, as_latex
from tests.reporting.runs import record

PPL = Metric(name="perplexity", better="lower")
PSNR = Metric(name="PSNR", unit="dB")


def scored(metric: Metric, before: float, after: float, macs: int = 0) -> RunRecord:
    """Return a record with these scores in all places."""
    made = record()
    stages = tuple(s.replace(scores={"compressed": after, "tuned": after}) for s in made.stages)
    return made.replace(
        metric=metric,
        before=made.before.replace(score=before),
        after=made.after.replace(score=after, macs=made.after.macs + macs),
        scores={"original": before, "tuned": after},
        stages=stages,
    )


@pytest.mark.parametrize(
    ("metric", "values", "old", "new", "change", "tone"),
    [
        (PPL, (7.25, 8.5), "7.25", "8.5", "+1.25", "bad"),
        (PPL, (8.5, 7.25), "8.5", "7.25", "−1.25", "good"),
        (PSNR, (31.5, 31.25), "31.5 dB", "31.25 dB", "−0.25 dB", "bad"),
    ],
)
def test_a_run_shows_its_metric(
    metric: Metric, values: tuple[float, float], old: str, new: str, change: str, tone: str
) -> None:
    made = scored(metric, *values)
    name = metric.name
    text = render_record(made)
    row = next(line for line in text.splitlines() if line.strip().startswith(name))
    assert all(part in row for part in (old, new, change))
    tile = next(tile for tile in tiles(made) if tile["name"].lower() == name.lower())
    assert (tile["before"], tile["after"], tile["change"], tile["tone"]) == (old, new, change, tone)
    assert f"| {name} ({metric.better} is better) | {old} | {new} | {change} |" in model_card(made.plan, made)
    chart = training(made)["score"]
    assert chart["y"]["label"] == metric.label
    assert chart["rules"][-1] == {"y": values[0], "label": f"dense {old}"}
    assert all(point[1] == values[1] for point in chart["series"][0]["points"])
    path = stage_path(made)
    assert path["y"]["label"] == metric.label
    assert path["series"][0]["points"][0][1] == values[0]
    page = report(Run("run", made))
    for shown in (text, page):
        assert f"{100 * values[1]:.2f} %" not in shown
        assert "0 points" not in shown


def test_the_front_goes_in_the_direction_of_the_metric() -> None:
    def front(metric: Metric) -> set[str]:
        runs = [
            Run(name, scored(metric, 7.0, score, macs).replace(settings={"way": name}))
            for name, score, macs in (("a", 8.0, 0), ("b", 9.0, 1000), ("c", 7.5, 1000))
        ]
        return {run.name for group in best(compare(runs)) for run in group.runs}

    assert front(PPL) == {"a", "c"}
    assert front(PSNR) == {"a", "b"}


def test_comparisons_name_the_metric_and_never_mix_two() -> None:
    same = compare([Run("a", scored(PPL, 7.0, 7.5)), Run("b", scored(PPL, 7.0, 8.5))])
    assert len(same) == 1
    assert as_csv(same).splitlines()[0].endswith(",metric")
    assert as_csv(same).splitlines()[1].endswith(",perplexity")
    assert "& perplexity \\\\" in as_latex(same)
    assert "$8 \\pm 0.7071$" in as_latex(same)
    page = comparison(same)
    assert "perplexity by MACs" in page
    assert "score (%)" not in page
    mixed = compare([Run("a", scored(PPL, 7.0, 7.5)), Run("b", scored(PSNR, 31.0, 30.0))])
    assert len(mixed) == 2
    assert best(mixed) == set(mixed)
    assert "PSNR by MACs" in comparison(mixed)
    fractions = compare([Run("a", scored(record().metric, 0.9, 0.8))])
    assert "metric" not in as_csv(fractions)
    assert "score by MACs" in comparison(fractions)


def table(metric: Metric) -> SensitivityTable:
    cost = Cost(params=100, macs=100)
    points = [
        SensitivityPoint(format="low_rank", rank={"rank": r}, cost=Cost(params=p, macs=p), score=s)
        for r, p, s in ((1, 25, 9.5), (2, 50, 8.0))
    ]
    layer = LayerSensitivity(path="fc", kind="Linear", before=cost, state="compressible", points=tuple(points))
    return SensitivityTable(
        tenfold="0.1", model="Net", key=SensitivityKey(model="m"), baseline=7.5, metric=metric, layers=(layer,)
    )


def test_sensitivities_show_losses_in_the_direction_of_the_metric(tmp_path: Path) -> None:
    found = table(PPL)
    text = as_text(*sensitivity_tables(found))
    assert "perplexity of the model 7.5" in text
    assert "change of perplexity" in text
    assert "+2" in text
    chart = sensitivity(list(found.layers), "score", found)
    assert [y for _, y in chart["series"][0]["points"]] == [2.0, 0.5]
    assert chart["y"]["label"] == "perplexity added"
    assert sensitivity(list(found.layers), "score", table(PSNR))["y"]["label"] == "PSNR lost (dB)"
    pytest.importorskip("matplotlib")
    _, numbers, _ = plot_sensitivity(found, tmp_path / "s.png")
    assert [line.split(",")[-1] for line in numbers.read_text().splitlines()] == ["score_lost", "2.0", "0.5"]


def test_trade_offs_show_their_metric() -> None:
    cost = Cost(params=100, macs=100)
    points = (TradeOffPoint(budget=0.5, cost=Cost(params=50, macs=50), score=8.5),)
    curve = TradeOff(model="Net", budget="macs", before=cost, baseline=7.5, metric=PPL, points=points)
    chart = trade_offs(curve, points[0], "chosen")["score"]
    assert chart["y"]["label"] == "perplexity"
    assert chart["rings"][0]["words"] == "chosen: 50 % left, perplexity 8.5"
    assert chart["rules"] == [{"y": 7.5, "label": "dense 7.5"}]


def test_a_card_claims_no_factor_that_is_in_doubt() -> None:
    doubtful = {"ratio": 120, "low": 0.1, "high": 900, "rounds": 5, "doubt": "others were busy"}
    made = record(speedup=doubtful)
    assert "| 10.00 ms | 5.00 ms | not measured: others were busy |" in model_card(made.plan, made)
