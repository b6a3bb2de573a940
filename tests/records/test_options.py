"""Option tables on disk: strict, versioned, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenfold.errors import DataError
from tenfold.records import Cost, FormatOptions, ForwardTime, LayerOptions, OptionTable, Recipe

DENSE = Cost(params=100, macs=1000)


def options(**changes: Any) -> FormatOptions:
    values: dict[str, Any] = {
        "format": "tucker2",
        "names": ("out", "in"),
        "ranks": [[1, 2], [3, 4]],
        "params": [10, 20],
        "macs": [100, 200],
        "columns": {"distortion": [0.1 + 0.2, 1e-300], "measured_drop": [float("nan"), 0.5]},
    }
    return FormatOptions(**values | changes)


def table(**changes: Any) -> OptionTable:
    layer = LayerOptions(path="fc", aliases=("head",), before=DENSE, options=(options(),))
    values = {"tenfold": "0.1", "model": "Net", "recipe": Recipe.of("macs=0.5"), "before": DENSE, "layers": (layer,)}
    return OptionTable(**values | changes)


def test_every_bit_comes_back(tmp_path: Path) -> None:
    made = table()
    made.save(tmp_path / "deep" / "options.json")
    read = OptionTable.load(tmp_path / "deep" / "options.json")
    assert read.model_dump_json() == made.model_dump_json()
    (own,) = read.layers[0].options
    assert own.columns["distortion"].tolist() == [0.1 + 0.2, 1e-300]
    assert np.isnan(own.columns["measured_drop"][0])
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["options.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": [10]}, "columns"),
        ({"columns": {"distortion": [0.1, 0.2, 0.3]}}, "columns"),
        ({"latency_ms": [0.1]}, "columns"),
        ({"ranks": [[1], [3]]}, "columns"),
        ({"ranks": [[1, 2], [0, 4]]}, "ranks below 1"),
    ],
)
def test_columns_fit_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        options(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 99}, "upgrade tenfold"),
        ({"version": 1}, "make the plan again with this version"),
        ({"time": ForwardTime(dense_ms=1.0, whole_ms=1.0)}, "either all layers have milliseconds"),
        ({"layers": (LayerOptions(path="fc", before=DENSE, latency_ms=1.0),)}, "either all layers have milliseconds"),
    ],
)
def test_the_whole_fits_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        table(**changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot read"), ("{", "is not an option table"), (json.dumps({"a": 1}), "is not an option table")],
)
def test_what_is_something_else_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "options.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words) as caught:
        OptionTable.load(file)
    assert "\n" not in str(caught.value)


def test_layers_and_options_by_name_and_by_row() -> None:
    layer = table().layer("head")
    assert layer.path == "fc"
    own = layer.of("tucker2")
    assert own.rank(1) == {"out": 3, "in": 4}
    assert own.cost(1) == Cost(params=20, macs=200)
    assert own.only([1]).ranks.tolist() == [[3, 4]]
    assert layer.column("macs").tolist() == [1000, 100, 200]
    assert layer.column("distortion")[0] == 0
    assert layer.place(2)[1] == 1
    with pytest.raises(IndexError, match="no row 3"):
        layer.place(3)
    with pytest.raises(DataError, match="no latency of layer 'fc'"):
        layer.column("latency")
    with pytest.raises(KeyError):
        layer.of("low_rank")
    with pytest.raises(KeyError):
        table().layer("conv")


def test_layers_that_are_kept_have_no_options() -> None:
    less = table().kept({"fc": "not faster"})
    assert less.eligible == ()
    assert (less.layer("fc").keep_reason, less.layer("fc").options) == ("not faster", ())
