"""What a prompt and a notebook show of the objects between the verbs."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

import tenfold
from tenfold.records import Introduced, OptionTable, Plan, Profile, RunRecord
from tenfold.reporting.cards import bars, card
from tenfold.reporting.charts import bars as described
from tests.reporting import runs

EVIL = "</b><script>alert(1)</script>&\"'"


def parsed(html: str) -> ET.Element:
    """Return a card as a tree: it is well-formed."""
    return ET.fromstring(html)  # noqa: S314 - made here


@pytest.fixture(scope="module")
def small() -> tenfold.Compressed:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 64)).eval()
    return tenfold.compress(net, torch.zeros(1, 64), "macs=0.5", data=torch.randn(256, 64))


@pytest.fixture(scope="module")
def known(small: tenfold.Compressed) -> dict[str, Introduced]:
    assert small.table is not None
    cost = tenfold.profile(small.original, torch.zeros(1, 64))
    return {"Profile": cost, "Plan": small.plan, "OptionTable": small.table, "RunRecord": small.record}


@pytest.mark.parametrize("kind", [Profile, Plan, OptionTable, RunRecord], ids=lambda kind: str(kind.__name__))
def test_each_has_a_line_tables_and_a_card(kind: type, known: dict[str, Introduced]) -> None:
    record = known[kind.__name__]
    assert re.fullmatch(rf"<{kind.__name__} (of|for) Sequential\b.*>", repr(record))
    assert str(record) == repr(record)
    assert len(repr(record)) < 160
    assert "Linear 64→96" in record.summary()
    html = record._repr_html_()
    assert html.startswith('<div class="tenfold"')
    parsed(html)


def test_a_line_has_the_numbers_of_the_record(known: dict[str, Introduced]) -> None:
    assert repr(known["Profile"]).startswith("<Profile of Sequential on 1×64: 12.6 k parameters, 12.3 k MACs")
    assert "2 of 3 layers factorized for macs=0.5" in repr(known["Plan"])
    assert "12.3 → 5.8 k MACs" in repr(known["RunRecord"])


def test_a_compressed_model_is_printed_in_a_few_lines(small: tenfold.Compressed) -> None:
    assert len(str(small).splitlines()) <= 15
    assert {"parameters", "MACs", "latency"} <= {line.split("  ")[0].strip() for line in str(small).splitlines()}
    assert repr(small).startswith("<Compressed of Sequential: ")
    assert small.summary() == small.record.summary()
    assert small._repr_html_() == small.record._repr_html_()


def test_a_card_shows_before_after_and_each_layer_that_costs_anything(small: tenfold.Compressed) -> None:
    tree = parsed(small._repr_html_())
    rows = [[cell.text or "" for cell in row] for row in tree.iter("tr")]
    assert rows[0] == ["", "before", "after", "change"]
    assert rows[2][0] == "MACs"
    titles = [title.text for title in tree.iter("title")]
    layers = [x for x in small.plan.layers if x.before.macs]
    assert [str(title).split(":")[0] for title in titles] == [x.path for x in layers]
    heights = [[float(rect.attrib["height"]) for rect in group.iter("rect")] for group in tree.iter("g")]
    for (before, after), layer in zip(heights, layers, strict=True):
        assert after / before == pytest.approx(layer.after.macs / layer.before.macs, rel=1e-3)


def test_nothing_of_a_record_is_markup() -> None:
    chart = described(EVIL, [EVIL], "macs", {"before": [2.0], "after": [1.0]})
    html = card(EVIL, EVIL, [(EVIL,)], chart)
    parsed(html)
    assert "<script" not in html
    plan = runs.record().plan
    named = plan.replace(model=EVIL, layers=(plan.layers[0].replace(path=EVIL), *plan.layers[1:]))
    for record in (named, runs.record(task=EVIL, plan=named)):
        html = record._repr_html_()
        parsed(html)
        assert "<script" not in html
        assert "&lt;script&gt;" in html


def test_a_picture_of_nothing_is_one_all_the_same() -> None:
    parsed(str(bars(described("nothing", [], "macs", {"now": []}))))
    parsed(str(bars(described("free", ["a"], "macs", {"now": [0.0]}))))


def test_other_records_show_what_is_not_the_default() -> None:
    assert repr(tenfold.Recipe.of("macs=0.5")) == "Recipe(budget=Budget(macs=0.5))"
    assert repr(tenfold.TuneConfig(epochs=7)) == "TuneConfig(epochs=7)"


def test_fits_and_moments_are_said_without_their_tensors(small: tenfold.Compressed) -> None:
    fit = tenfold.decompose(torch.randn(32, 16), "low_rank", {"rank": 4})
    assert re.fullmatch(r"<Fit of Linear 16→32 as low_rank rank=4, error 0\.\d+>", repr(fit))
    moments = tenfold.calibrate(small.original, [torch.randn(64, 64)])
    assert re.fullmatch(r"<Moments of \d+ rows of 64>", repr(moments["0"]))
