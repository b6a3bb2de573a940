"""MLPs of every architecture are found by what a forward makes of them; what only looks like one stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold.decompositions import decompose
from tenfold.layers import FactorizedLayer
from tenfold.profiling import profile
from tenfold.records import Cost, Unit, UnitPlan
from tenfold.surgery import recognise_units
from tenfold.surgery.model_outputs import outputs_of
from tenfold.surgery.modules import put
from tenfold.surgery.narrow import absorbed, narrow_
from tenfold.tracing import copied
from tenfold.units import UNITS
from tests.units.architectures import HIDDEN, NETS, WIDTH, rows, torch_encoder

CASES: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    **{name: (build, build.inputs(0), build.count) for name, build in NETS.items()},
    "torch": (torch_encoder, rows(), 2),
}


def found(model: nn.Module, inputs: Any) -> tuple[Unit, ...]:
    return recognise_units(model, profile(model, inputs), inputs, ["mlp_width"])


Case = tuple[nn.Module, Any, tuple[Unit, ...], int]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Return a model, its inputs, its units, and how many there are; no test changes the model."""
    build, inputs, count = CASES[request.param]
    torch.manual_seed(0)
    model = build()
    return model, inputs, found(model, inputs), count


def test_the_mlps_are_found_and_nothing_else(case: Case) -> None:
    _, _, units, count = case
    assert len(units) == count
    assert all(unit.keep_reason is None and unit.full == {"width": HIDDEN} for unit in units)
    assert all(1 <= len(unit.feeders) <= 2 for unit in units)


def with_pivots(model: nn.Module, units: tuple[Unit, ...], width: int) -> tuple[nn.Module, nn.Module]:
    """Return the model with factorized pivots, and the one whose feeders have absorbed them."""
    pivots = {}
    for unit in units:
        old: Any = model.get_submodule(unit.pivot)
        weight = old.weight.mT if type(old).__name__ == "Conv1D" else old.weight
        fit = UNITS.get("mlp_width")().pivot_fit(unit, {"width": width})
        value = decompose(weight.detach().contiguous(), fit.format, fit.rank, fit.algorithm).value
        bias = None if old.bias is None else old.bias
        pivots[unit.pivot] = FactorizedLayer.of(value.map(spec=value.spec.replace(bias=bias is not None)), bias)
    wide = put(copied(model), pivots)
    narrow = copied(wide)
    for unit in units:
        narrow = absorbed(narrow, unit, {"width": width}, model.get_submodule(unit.pivot))
    return wide, narrow


@pytest.mark.parametrize("width", [HIDDEN, 9])
def test_absorbing_changes_no_output_and_full_width_is_the_model(case: Case, width: int) -> None:
    model, inputs, units, _ = case
    wide, narrow = with_pivots(model, units, width)
    wanted = outputs_of(model if width == HIDDEN else wide, inputs)
    for seen, known in zip(outputs_of(narrow, inputs), wanted, strict=True):
        torch.testing.assert_close(seen, known, atol=1e-5, rtol=0)
    assert not any(isinstance(module, FactorizedLayer) for module in narrow.modules())
    for unit in units:
        for path in unit.members:
            new, old = narrow.get_submodule(path), model.get_submodule(path)
            assert type(new) is type(old)
            assert new.weight.shape.count(width) == 1  # type: ignore[union-attr]
    assert profile(narrow, inputs).macs < profile(wide, inputs).macs


def test_the_structure_is_made_on_the_meta_device_as_well(case: Case) -> None:
    model, _, own, _ = case
    units = [UnitPlan(**unit.model_dump(), size={"width": 9}, reason="", before=Cost(), after=Cost()) for unit in own]
    with torch.device("meta"):
        empty = narrow_(copied(model).to("meta"), units)
    _, narrow = with_pivots(model, tuple(unit.unit for unit in units), 9)
    wanted = {name: tensor.shape for name, tensor in narrow.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == wanted
    assert all(parameter.is_meta for parameter in empty.parameters())


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        out: Tensor = self.down(hidden) + self.more(hidden)
        return out

    def more(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(())


class _Read(_Mlp):
    """Hidden units are read elsewhere too."""

    def more(self, hidden: Tensor) -> Tensor:
        return hidden.mean(-1, keepdim=True)


class _Normed(_Mlp):
    """Hidden units are normalized together."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.softmax(self.up(x), -1))
        return out


class _Fixed(_Mlp):
    """The forward knows how many hidden units there are."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).reshape(*x.shape[:-1], HIDDEN).relu())
        return out


def test_a_plain_mlp_is_one() -> None:
    (unit,) = found(_Mlp().eval(), rows())
    assert (unit.feeders, unit.pivot, unit.keep_reason) == (("up",), "down", None)


@pytest.mark.parametrize("kind", [_Read, _Normed, _Fixed])
def test_what_reads_mixes_or_counts_hidden_units_stays_with_the_reason(kind: type[nn.Module]) -> None:
    (unit,) = found(kind().eval(), rows())
    assert "something else reads or mixes" in str(unit.keep_reason)


def test_shared_weights_are_no_unit() -> None:
    model = nn.ModuleDict({"a": _Mlp(), "b": _Mlp()})
    model["b"].up.weight = model["a"].up.weight

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["b"](self.parts["a"](x))  # type: ignore[no-any-return]

    assert not [unit for unit in found(Both().eval(), rows()) if unit.keep_reason is None]


def test_the_model_stays_as_it_is() -> None:
    model = _Mlp().eval()
    calls = []
    model.down.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found(model, rows())
    calls.clear()
    model(rows())
    assert calls == [1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
