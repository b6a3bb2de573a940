"""A format that lives in a single file outside of the package is found, used and tested like any other."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tenfold
from tenfold.decompositions import decompose
from tenfold.formats import FORMATS
from tenfold.testing import check_format

FILE = Path(__file__).parents[2] / "examples" / "kronecker.py"


@pytest.fixture(scope="module", autouse=True)
def kronecker():
    spec = importlib.util.spec_from_file_location("kronecker_example", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    FORMATS._entries.pop("kronecker")
    del sys.modules[spec.name]


def test_nothing_in_the_package_names_it():
    package = FILE.parents[1] / "tenfold"
    assert not [p for p in package.rglob("*.py") if re.search(r"[\"']kronecker|Kronecker\(", p.read_text())]


def test_it_obeys_every_law():
    check_format("kronecker")


def test_a_kronecker_product_has_rank_one_and_its_factors_are_found():
    a, b = torch.randn(4, 6), torch.randn(4, 5)  # out = 16 = 4·4, in = 30 = 6·5
    fit = decompose(torch.kron(a, b), "kronecker", {"rank": 1})
    assert fit.rel_error < 1e-6
    assert fit.value.tensors()["a"].shape == (1, 4, 6, 1)
    torch.testing.assert_close(fit.value.to_dense(), torch.kron(a, b))


def test_the_best_sum_of_products_is_a_truncated_svd_of_the_blocks():
    weight = torch.randn(16, 30, dtype=torch.float64)
    blocks = torch.stack([weight[4 * i : 4 * i + 4, 5 * j : 5 * j + 5].flatten() for i in range(4) for j in range(6)])
    tail = torch.linalg.svdvals(blocks)[3:].square().sum() / weight.square().sum()
    assert decompose(weight, "kronecker", {"rank": 3}).rel_error == pytest.approx(float(tail) ** 0.5, rel=1e-9)


def test_plan_apply_save_and_load_know_it(tmp_path):
    model, x = nn.Sequential(nn.Linear(16, 36), nn.ReLU(), nn.Linear(36, 16)), torch.randn(2, 16)
    recipe = {"rule": {"name": "ratio", "share": 0.5}, "formats": ["kronecker"], "keep_ends": False}
    plan = tenfold.plan(model, tenfold.profile(model, x), recipe)
    small = tenfold.apply(model, plan)
    assert {layer.format for layer in plan.factorized} == {"kronecker"}
    assert tenfold.profile(small, x).cost == plan.after
    tenfold.save(small, plan, tmp_path / "saved")
    again, _ = tenfold.load(model, tmp_path / "saved")
    assert torch.equal(again(x), small(x))
