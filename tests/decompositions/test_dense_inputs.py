"""Outputs of the dense model known by what enters the layer there: the same fit, without one of them."""

from __future__ import annotations

import pytest
import torch

from tenfold.decompositions import Moments, covariance, decompose
from tenfold.decompositions.dense_inputs import DenseInputs
from tenfold.errors import WeightError
from tenfold.records import LayerSpec

F64 = torch.float64
SPEC = LayerSpec(kind="linear", in_channels=12, out_channels=40)


def seen() -> tuple[torch.Tensor, Moments, Moments]:
    """Return a weight, and moments with the outputs that it makes of other inputs, as outputs and as those inputs."""
    other = torch.randn(300, 12, dtype=F64) @ torch.randn(12, 12, dtype=F64) + 1
    x, weight = other + 0.3 * torch.randn(300, 12, dtype=F64), torch.randn(40, 12)
    known = Moments.of(x, other @ weight.double().T)
    before = DenseInputs((other.T @ other / 300)[None], other.mean(0)[None], (other.T @ x / 300)[None])
    return weight, known, Moments.of(x).replace(before=before)


@pytest.mark.parametrize("centred", [True, False])
def test_errors_targets_and_shifts_are_those_of_the_outputs(centred: bool) -> None:
    weight, *both = seen()
    known, found = both if centred else (own.uncentered() for own in both)
    flat = weight.double()[None]
    near = flat + 0.1 * torch.randn_like(flat)
    torch.testing.assert_close(found.regression_target(flat, 1e-3), known.regression_target(flat, 1e-3))
    torch.testing.assert_close(found.errors(flat, near), known.errors(flat, near))
    torch.testing.assert_close(found.bias_shift(flat, near), known.bias_shift(flat, near))
    assert found.distortion(flat, near) == pytest.approx(known.distortion(flat, near))


@pytest.mark.parametrize("wide", [1024, 8])
def test_the_fit_is_the_same(wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "WIDE_OUTPUTS", wide)
    weight, known, found = seen()
    one, other = (decompose(weight, "low_rank", {"rank": 5}, spec=SPEC, moments=own) for own in (known, found))
    torch.testing.assert_close(other.value.to_dense(), one.value.to_dense(), rtol=1e-3, atol=1e-4)
    assert other.output_error == pytest.approx(one.output_error, rel=1e-4)
    torch.testing.assert_close(other.bias_shift, one.bias_shift, rtol=1e-3, atol=1e-4)


def test_they_belong_to_the_moments() -> None:
    _, _, found = seen()
    found.check(SPEC.group_shape)
    assert found.before is not None
    moved = found.replace(before=found.before.uncentered())
    assert found.digest() != moved.digest()
    assert found.to("cpu").before is not None
    with pytest.raises(WeightError, match="cross of the dense inputs"):
        found.replace(before=DenseInputs(found.before.second_moment, found.before.mean, torch.ones(1, 3, 3))).check(
            SPEC.group_shape
        )
