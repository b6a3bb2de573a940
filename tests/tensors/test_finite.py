"""A model with NaN or infinity is refused before any work, by the name of the tensor; masks are no such model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold import Runtime
from tenfold.errors import WeightError
from tenfold.exporting import export
from tenfold.iterative import stages
from tenfold.planning import Sensitivity
from tenfold.profiling import profile
from tenfold.tensors.finite import check_finite

PLACES = ["0.weight", "0.bias", "1.running_var", "1.running_mean", "4.bias", "4.weight"]
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(place: str = "", value: float = float("nan")) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)).eval()
    if place:
        model.state_dict()[place].view(-1)[0] = value
    return model


VERBS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "compress": lambda model, _: tenfold.compress(model, X[:1], "macs=0.5", runtime=Runtime(measure=False)),
    "with data": lambda model, _: tenfold.compress(model, X[:1], "macs=0.5", data=[X], runtime=Runtime(measure=False)),
    "a plan": lambda model, _: tenfold.compress(model, X[:1], PLAN, runtime=Runtime(measure=False)),
    "stages": lambda model, _: stages(model, X[:1], "macs=0.5"),
    "sensitivity": lambda model, _: Sensitivity(model, profile(model, X[:1])),
    "export": lambda model, folder: export(model, X[:1], folder / "net.pt2", to="torch-export"),
}
PLAN = tenfold.compress(net(), X[:1], "macs=0.5", runtime=Runtime(measure=False)).plan


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", PLACES)
def test_every_verb_names_the_tensor(verb: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=rf"1 of the \d+ numbers in {place} are NaN or infinite"):
        VERBS[verb](net(place), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_infinity_and_other_types(value: float, dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4, dtype=dtype)
    check_finite(model)
    with torch.no_grad():
        model.bias[2] = value
    with pytest.raises(WeightError, match="1 of the 4 numbers in bias"):
        check_finite(model)


def test_large_numbers_are_finite() -> None:
    model = nn.Linear(64, 64).half()
    nn.init.constant_(model.weight, 60_000)  # their sum is not
    check_finite(model)


class Masked(nn.Module):
    """Attention behind a mask that is a buffer, not even stored."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(1, 2) + self.mask, -1) @ self.linear(x)


def test_masks_may_be_infinite_and_other_buffers_may_not() -> None:
    mask = torch.full((4, 4), float("-inf")).triu(1)
    small = tenfold.compress(Masked(mask), torch.zeros(1, 4, 16), "macs=0.6", runtime=Runtime(measure=False))
    assert small.plan.factorized
    mask[0, 0] = 0.5
    with pytest.raises(WeightError, match="6 of the 16 numbers in mask"):
        check_finite(Masked(mask))


def test_what_has_no_numbers_yet_is_passed_over() -> None:
    check_finite(nn.LazyLinear(3))
    check_finite(nn.Linear(3, 3, device="meta"))
