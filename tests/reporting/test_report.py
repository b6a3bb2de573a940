"""The report: whole, right, in one file, from records alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tenfold.errors import DataError
from tenfold.records import Analysis, Cost, RunRecord, TradeOff, TradeOffPoint
from tenfold.reporting.charts import equal_error, error_curve, spectrum
from tenfold.reporting.report import report, tiles
from tenfold.reporting.run_files import Run, read_run, read_runs
from tests.reporting import runs

CHECKPOINTS = sorted(Path(__file__).parents[2].glob("benchmarks/checkpoints/*/record.json"))
VOID = {"wbr", "meta", "link", "input", "br", "hr", "img", "col", "rect"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps what a test wants to know."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.data = ""
        self._in_data = False
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [str(values[name]) for name in ("src", "href", "action", "srcset") if name in values]
        assert not any(name == "style" or name.startswith("on") for name in values), "the page's own policy forbids it"
        if "id" in values:
            self.ids.append(str(values["id"]))
        self._in_data = values.get("id") == "data"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        self._in_data = False

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data
        elif self.tables and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return read_run(runs.write(tmp_path / "half"))


def test_the_page_is_whole_and_asks_for_nothing(run: Any) -> None:
    text = report(run)
    page = Page(text)
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http://www.w3.org/2000/svg" in text  # the name of a vocabulary, which nobody fetches
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in text
    assert "<b>net" not in text  # a name stays a name
    assert set(json.loads(page.data)["charts"]) >= {"costs", "equal", "training-loss", "training-score", "stages"}


def test_every_layer_is_in_the_table_with_its_numbers(run: Any) -> None:
    table = Page(report(run)).tables[0]
    head, rows = table[0], table[1:]
    assert [row[0] for row in rows] == [layer.path for layer in run.record.plan.layers]
    first = dict(zip(head, rows[0], strict=True))
    assert first["was"] == "Conv2d 64→64 3×3"
    assert first["now"].split() == ["tucker2", "out=24", "in=20"]
    assert (first["error"], first["params"], first["MACs"]) == ("0.300", "36.9 → 7.1 k", "37.7 → 7.3 M")
    assert (first["left"], first["ms before"], first["ms after"]) == ("19 % 5.2×", "1.50", "0.500")
    assert first["sensitivity"].split() == ["3.5", "largest", "term", "1.25"]
    assert first["why"] == "best for the whole model"
    kept = dict(zip(head, rows[2], strict=True))
    assert (kept["now"], kept["ms before"]) == ("kept", "—")
    assert kept["why"].startswith("BatchNorm2d is not")


def test_headline(run: Any) -> None:
    found = {tile["name"]: tile for tile in tiles(run.record)}
    assert found["Latency, batch 8"]["change"] == "2.00× faster"
    assert "1.90–2.10" in found["Latency, batch 8"]["note"]
    assert (found["Score"]["change"], found["Score"]["tone"]) == ("−2.00 points", "bad")
    assert found["MACs"]["share"] == run.record.after.macs / run.record.before.macs


def test_a_speed_up_that_may_be_none_is_not_claimed() -> None:
    doubtful = runs.record(speedup={"ratio": 1.05, "low": 0.95, "high": 1.2, "rounds": 9})
    found = {tile["name"]: tile for tile in tiles(doubtful)}
    assert (found["Latency, batch 8"]["change"], found["Latency, batch 8"]["tone"]) == ("no difference seen", "")
    doubtful = runs.record(speedup={"ratio": 2, "low": 1.2, "high": 2.9, "rounds": 9, "doubt": "others were busy"})
    tile = next(tile for tile in tiles(doubtful) if tile["name"].startswith("Latency"))
    assert (tile["change"], tile["tone"], tile["share"]) == ("between 1.2 and 2.9 times", "", None)
    assert tile["note"] == "others were busy"


def test_charts_mark_what_was_chosen(run: Any) -> None:
    plan = run.record.plan.factorized[0]
    known = run.analysis.layer(plan.path)
    assert [(rule["x"], rule["label"]) for rule in spectrum(known, plan)["rules"]] == [
        (24, "out = 24"),
        (20, "in = 20"),
    ]
    curve = error_curve(known, plan)
    assert curve["rings"][0]["x"] == pytest.approx(100 * plan.after.macs / plan.before.macs)
    assert curve["rings"][0]["y"] == plan.rel_error
    assert curve["series"][0]["points"][-1][:2] == [100.0, 0.0]


def test_equal_error_takes_the_cheapest_rank_that_is_no_worse(run: Any) -> None:
    """Against the definition, layer by layer."""
    plan = run.record.plan
    chart = equal_error(plan, run.analysis)
    assert chart is not None
    for x, y, words in chart["series"][0]["points"]:
        allowed, macs, lost = float(words.split()[-1]), 0.0, 0.0
        for layer in plan.layers:
            curve = run.analysis.layer(layer.path).curve if layer.format else ()
            own = [(p.cost.macs, p.error) for p in curve if p.error <= allowed + 1e-9]
            cost, error = min([o for o in own if o[0] < layer.before.macs], default=(layer.before.macs, 0.0))
            macs, lost = macs + cost, lost + error**2
        assert x == pytest.approx(100 * macs / plan.before.macs)
        assert y == pytest.approx((lost / len(plan.factorized)) ** 0.5)


def test_a_layer_without_a_curve_shows_its_spectrum_alone_and_counts_as_it_is(run: Any) -> None:
    first, *others = run.analysis.layers
    bare = Run("bare", run.record, run.analysis.replace(layers=(first.replace(curve=()), *others)))
    own = next(layer for layer in json.loads(Page(report(bare)).data)["layers"] if layer["path"] == first.path)
    assert own["curve"] is None
    assert own["spectrum"]["series"]
    plan = run.record.plan
    chart = equal_error(plan, bare.analysis)
    assert chart is not None
    assert chart["rings"][0]["x"] == pytest.approx(100 * plan.after.macs / plan.before.macs)


@pytest.mark.parametrize("record", CHECKPOINTS, ids=lambda path: path.parent.name)
def test_committed_checkpoints_show_real_spectra(record: Path) -> None:
    """Of every factorized layer: descending from 1, with an error that falls as ranks grow."""
    run = read_run(record)
    shown = json.loads(Page(report(run)).data)["layers"]
    assert [layer["path"] for layer in shown] == [layer.path for layer in run.record.plan.factorized]
    for layer in shown:
        for line in layer["spectrum"]["series"]:
            values = [y for _, y in line["points"]]
            assert values[0] == 1.0
            assert values == sorted(values, reverse=True)
        errors = [point[1] for point in layer["curve"]["series"][0]["points"]]
        assert errors[0] > errors[len(errors) // 2] > errors[-1] == 0.0


def test_a_bare_record_will_do(tmp_path: Path) -> None:
    """As it was printed with --json, of a run that measured nothing."""
    bare = runs.record(2, stages=(), scores={}, speedup=None, command=None, settings={})
    bare = bare.replace(before={"params": 73728, "macs": 0}, after={"params": 14272, "macs": 0})
    (tmp_path / "printed.json").write_text(json.dumps(bare.model_dump(mode="json") | {"out": "x"}), encoding="utf-8")
    found = read_run(tmp_path / "printed.json")
    assert found.record == bare
    assert found.analysis is None
    assert 'id="pick"' not in report(found)
    assert "5.2× fewer parameters" in report(found)


def test_records_round_trip() -> None:
    made = runs.record()
    assert RunRecord.from_text(made.to_json()) == made
    found = runs.analysis(made.plan)
    assert Analysis.from_text(found.model_dump_json()) == found


def test_trade_off_is_drawn_with_the_nearest_point_marked(tmp_path: Path) -> None:
    folder = runs.write(tmp_path / "half")
    before = runs.record().plan.before
    points = tuple(
        TradeOffPoint(budget=s, cost=Cost(params=1, macs=int(s * before.macs)), distortion=1 - s)
        for s in (0.1, 0.2, 0.5)
    )
    curve = TradeOff(model="Net", budget="macs", rule={"name": "global"}, before=before, points=points)
    (tmp_path / "budgets.json").write_text(curve.to_json(), encoding="utf-8")
    data = json.loads(Page(report(read_run(folder, curves=[tmp_path / "budgets.json"]))).data)
    assert data["charts"]["distortion"]["rings"][0]["x"] == pytest.approx(20, abs=0.1)  # the plan has 19 %


def test_a_large_model_stays_small(tmp_path: Path) -> None:
    text = report(read_run(runs.write(tmp_path / "large", layers=300)))  # 200 factorized, 100 kept
    assert len(text.encode()) < 6_000_000
    assert len(Page(text).tables[0]) == 301


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read"), ("{", "is not JSON"), ("[]", "not the record of a run"), ('{"a": 1}', "not the record")],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "record.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_run(file)


def test_a_folder_without_record_and_foreign_curves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no record\.json"):
        read_run(tmp_path)
    folder = runs.write(tmp_path / "half")
    with pytest.raises(DataError, match="neither a trade-off curve"):
        read_run(folder, curves=[folder / "record.json"])
    (folder / "analysis.json").write_text('{"version": 99, "tenfold": "9", "layers": []}', encoding="utf-8")
    with pytest.raises(DataError, match="upgrade tenfold"):
        read_run(folder)


def test_records_inside_of_a_benchmark_are_found(tmp_path: Path) -> None:
    inside = {"runs": {"plain": runs.record().model_dump(mode="json")}, "note": [1, "x"]}
    (tmp_path / "result.json").write_text(json.dumps(inside), encoding="utf-8")
    (found,) = read_runs(tmp_path / "result.json")
    assert found.name == "result: runs / plain"
    (tmp_path / "none.json").write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(DataError, match="no record of a run"):
        read_runs(tmp_path / "none.json")


def test_no_torch(tmp_path: Path) -> None:
    folder = runs.write(tmp_path / "half")
    code = f"""if True:
        import sys
        from tenfold.reporting.comparison import compare
        from tenfold.reporting.comparison_page import write_comparison
        from tenfold.reporting.run_files import read_run
        from tenfold.reporting.report import write_report
        run = read_run({str(folder)!r})
        write_report(run, {str(tmp_path / "report.html")!r})
        write_comparison(compare([run]), {str(tmp_path / "compare.html")!r})
        sys.exit("torch" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "report.html").stat().st_size > 10_000
