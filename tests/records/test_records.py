"""Records: strict, frozen, right about shapes and costs, and written whole or not at all."""

from __future__ import annotations

import json
import threading
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from pydantic import ValidationError
from torch import nn

from tenfold.errors import BudgetError, TenfoldError
from tenfold.layers import spec_of
from tenfold.records import (
    Budget,
    ContractSpec,
    Cost,
    LayerPlan,
    LayerProfile,
    LayerSpec,
    chain_macs,
    chain_params,
    locked,
    write_text,
)
from tenfold.testing import GEOMETRIES


def of_layer(spec):
    return LayerProfile(path="a", kind="x", spec=spec, params=0, bytes=0, macs=0)


@pytest.mark.parametrize("at", GEOMETRIES, ids=str)
def test_specs_survive_json_and_yaml(at):
    record = of_layer(at.spec)
    assert LayerProfile.from_text(record.to_json()) == record
    assert LayerProfile.from_text(record.to_yaml()) == record
    assert next(iter(record.model_dump(mode="json")["spec"].items())) == ("type", "layer")


def test_specs_fill_in_neutral_options_and_are_frozen():
    spec = LayerSpec(kind="conv", in_channels=4, out_channels=6, kernel=(3, 5))
    assert (spec.stride, spec.padding, spec.dilation, spec.output_padding) == ((1, 1), (0, 0), (1, 1), (0, 0))
    with pytest.raises(FrozenInstanceError):
        spec.stride = (2, 2)


MISFITS = (
    {"kind": "linear", "kernel": (3,)},
    {"kind": "conv"},
    {"kind": "conv", "kernel": (3, 3), "stride": (1,)},
    {"kind": "conv", "kernel": (3,), "groups": 3},
)


@pytest.mark.parametrize("wrong", MISFITS, ids=str)
def test_options_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(ValueError, match=r"cannot have the kernel|needs one entry|must divide"):
        LayerSpec(in_channels=4, out_channels=6, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *MISFITS,
        {"kind": "conv", "kernel": (3,), "padding_mode": "wrap"},
        {"kind": "linear", "colour": "red"},
        {"kind": "linear", "in_channels": 0},
        {"kind": "linear", "in_channels": "many"},
        {"kind": "folding"},
    ],
    ids=str,
)
def test_records_check_the_specs_that_are_read_with_them(wrong):
    spec = {"type": "layer", "in_channels": 4, "out_channels": 6, **wrong}
    values = of_layer(None).model_dump() | {"spec": spec}
    with pytest.raises(TenfoldError, match="not a valid LayerProfile: spec"):
        LayerProfile.from_text(json.dumps(values))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv2d(3, 8, 3, stride=2), "Conv2d 3→8 3×3 /2×2"),
        (nn.Conv1d(4, 8, 3, groups=2), "Conv1d 4→8 3 g2"),
        (nn.ConvTranspose2d(3, 8, (3, 4)), "ConvTranspose2d 3→8 3×4"),
        (nn.Linear(3, 8), "Linear 3→8"),
        (nn.Embedding(30, 8), "Embedding 30→8"),
    ],
)
def test_specs_read_like_layers(layer, text):
    assert str(spec_of(layer)[0]) == text


def test_costs_add_and_compare():
    assert Cost(params=1, macs=2) + Cost(params=3, macs=4) == Cost(params=4, macs=6)
    assert Cost(params=1, macs=4).below(Cost(params=2, macs=4))
    assert not Cost(params=2, macs=4).below(Cost(params=2, macs=4))
    assert not Cost(params=1, macs=5).below(Cost(params=2, macs=4))
    with pytest.raises(ValidationError):
        Cost(params=-1)


def test_chains_run_one_after_the_other():
    conv = LayerSpec(kind="conv", in_channels=4, out_channels=2, kernel=(3, 3), stride=(2, 2))
    mix = conv.mix(2, 8, bias=True)
    assert chain_params((conv, mix)) == 4 * 2 * 9 + 2 * 8 + 8
    assert chain_macs((conv, mix), (1, 4, 9, 9)) == 16 * (4 * 2 * 9 + 2 * 8)
    contract = ContractSpec(modes=(2, 3), equation="...ab,cb->...ca", weight_shape=(5, 3))
    assert contract.out_channels == 10
    assert contract.macs((7, 6)) == 7 * 2 * 3 * 5


def test_budgets_are_shares_and_absolutes():
    cost = Cost(params=1000, macs=50)
    both = Budget.parse("macs=0.5, max_params=400")
    assert both.allowance(cost) == {"params": 400.0, "macs": 25.0}
    assert both.limited == ("params", "macs")
    assert Budget.of({"macs": 1}).allowance(cost) == {"macs": 50.0}
    assert Budget(params=0.9, max_params=400).allowance(cost) == {"params": 400.0}  # the smaller holds
    assert Budget(params=0.3, max_params=400).allowance(cost) == {"params": 300.0}
    assert Budget(max_latency_ms=3.0).allowance(cost) == {"latency": 3.0}
    assert Budget(latency=0.5).allowance(cost, latency_ms=8.0) == {"latency": 4.0}
    with pytest.raises(BudgetError, match="a latency that was not measured"):
        Budget(latency=0.5).allowance(cost)
    assert Budget.at_most({"macs": 40, "latency": 0.5}) == Budget(max_macs=40, latency=0.5)
    assert Budget(macs=0.5, bytes=0.5, max_bytes=9, latency=0.5, max_latency_ms=3).of_cost() == Budget(macs=0.5)
    assert not Budget()
    assert Budget(macs=0.5)
    assert repr(Budget(macs=0.5)) == "Budget(macs=0.5)"
    assert str(both) == "macs=0.5,max_params=400"


@pytest.mark.parametrize(
    "text", ["macs", "macs=", "macs=half", "macs=0.5,macs=0.4", "flops=0.5", "macs=0", "macs=-1", "macs=inf"]
)
def test_budgets_that_cannot_be_read(text):
    with pytest.raises(BudgetError):
        Budget.parse(text)


@pytest.mark.parametrize("value", ["0.5", True, [0.5]])
def test_budgets_are_numbers(value):
    with pytest.raises(BudgetError, match=r"must be a positive number|without quotes"):
        Budget.of({"params": value})


def test_a_layer_to_factorize_needs_a_format_and_a_rank():
    common = {"path": "a", "kind": "Linear", "reason": "x", "before": Cost(), "after": Cost()}
    assert LayerPlan(action="keep", **common).format is None
    with pytest.raises(ValidationError, match="has no format or no rank"):
        LayerPlan(action="factorize", format="low_rank", **common)


def test_text_names_its_source_and_the_field():
    with pytest.raises(TenfoldError, match=r"mine.yaml is not a valid Cost: params: Input should be a valid integer"):
        Cost.from_text("params: many", source="mine.yaml")


def test_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "file.txt"
    write_text(path, "old")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_text_that_cannot_be_written_names_the_file_asked_for(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"/proc/plan\.yaml"):
        write_text(Path("/proc/plan.yaml"), "text")
    with pytest.raises(OSError, match=r"folder\.yaml: Is a directory"):
        write_text(tmp_path / "folder.yaml", "text")
    assert set(tmp_path.iterdir()) == before


def test_who_adds_to_a_file_waits_for_who_holds_it(tmp_path):
    path = tmp_path / "sub" / "count"

    def add() -> None:
        with locked(path):
            write_text(path, path.read_text() + "x")

    other = threading.Thread(target=add)
    with locked(path):
        other.start()
        other.join(0.1)
        assert other.is_alive()
        write_text(path, "x")
    other.join(10)
    assert path.read_text() == "xx"
