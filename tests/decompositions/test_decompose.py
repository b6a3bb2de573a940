"""SVD, HOSVD and HOOI against optima, TensorLy and each other; and what ``decompose`` refuses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tenfold.decompositions import (
    DECOMPOSITIONS,
    Decomposition,
    FitRequest,
    algorithm_for,
    decompose,
    decompose_many,
    default_algorithm,
    fit_batches,
    spec_of_weight,
)
from tenfold.decompositions.svd import SVD
from tenfold.decompositions.tucker import HOOI, HOSVD
from tenfold.decompositions.weighted_als import WeightedALS
from tenfold.errors import RankError, TenfoldError, UnknownNameError, WeightError
from tenfold.formats import FORMATS, Factorization
from tenfold.records import LayerSpec

F64 = torch.float64


def smooth(*shape: int) -> torch.Tensor:
    """Return a kernel with the falling spectra of trained ones."""
    x = torch.randn(*shape, dtype=F64)
    for axis in (0, 1):
        mix = torch.linalg.qr(torch.randn(shape[axis], shape[axis], dtype=F64)).Q
        x = torch.tensordot(mix * torch.logspace(0, -1.5, shape[axis], dtype=F64), x, dims=([1], [axis])).movedim(
            0, axis
        )
    return x


@pytest.mark.parametrize("method", ["full", "gram", "randomized", "auto"])
@pytest.mark.parametrize("format", ["low_rank", "spatial"])
def test_svd_attains_the_optimum(method, format):
    weight = smooth(12, 10, 3, 3)
    matrix = weight.flatten(1) if format == "low_rank" else weight.permute(0, 3, 1, 2).reshape(36, 30)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    fit = decompose(weight, format, {"rank": 4}, SVD(method=method))
    assert fit.rel_error == pytest.approx((np.sum(values[4:] ** 2) / np.sum(values**2)) ** 0.5, rel=1e-6)
    assert fit.note in {method, "full", "gram", "randomized"}
    assert method in (fit.note, "auto")


def test_svd_shares_the_singular_values_evenly():
    fit = decompose(smooth(12, 10, 3, 3), "low_rank", {"rank": 4})
    left, right = fit.value.left[0], fit.value.right[0].flatten(1)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


@pytest.mark.parametrize("ranks", [(5, 4), (3, 8), (12, 3), (4, 10)])
def test_hooi_is_at_least_as_good_as_hosvd_and_as_tensorlys(ranks):
    tl = pytest.importorskip("tensorly")
    weight = smooth(12, 10, 3, 3)
    rank = {"out": ranks[0], "in": ranks[1]}
    hosvd, hooi = (decompose(weight, "tucker2", rank, a).rel_error for a in (HOSVD(), HOOI()))
    exact = decompose(weight, "tucker2", rank, HOOI(n_iter=200, tol=0)).rel_error
    assert exact <= hooi <= hosvd * (1 + 1e-9)
    (core, factors), _ = tl.decomposition.partial_tucker(weight.numpy(), rank=list(ranks), modes=[0, 1], n_iter_max=100)
    rebuilt = tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    theirs = np.linalg.norm(rebuilt - weight.numpy()) / np.linalg.norm(weight.numpy())
    assert hooi <= theirs * 1.01
    assert exact <= theirs * (1 + 1e-6)


def test_factors_of_tucker_are_orthonormal_and_the_core_is_what_they_leave():
    weight = smooth(12, 10, 3, 3)
    for algorithm in (HOSVD(), HOOI()):
        value = decompose(weight, "tucker2", {"out": 5, "in": 4}, algorithm).value
        u, v = value.out_factor[0], value.in_factor[0]
        torch.testing.assert_close(u.mT @ u, torch.eye(5, dtype=F64))
        torch.testing.assert_close(v.mT @ v, torch.eye(4, dtype=F64))
        torch.testing.assert_close(value.core[0], torch.einsum("oixy,oa,ib->abxy", weight, u, v))


def test_one_sided_tucker_is_the_svd_of_that_side():
    weight = smooth(12, 10, 3, 3)
    one = decompose(weight, "tucker2", {"out": 5}).rel_error
    assert one == pytest.approx(decompose(weight, "low_rank", {"rank": 5}).rel_error, rel=1e-9)


def test_hooi_tells_when_it_stopped_early():
    weight = torch.randn(12, 10, 3, 3, dtype=F64)
    short = decompose(weight, "tucker2", {"out": 5, "in": 4}, HOOI(n_iter=1, tol=0))
    assert (short.n_iter, short.converged) == (1, False)
    whole = decompose(weight, "tucker2", {"out": 5, "in": 4}, HOOI(n_iter=50, tol=1e-6))
    assert whole.converged
    assert 1 < whole.n_iter < 50


def test_each_group_is_decomposed_on_its_own():
    spec = LayerSpec(kind="conv", in_channels=16, out_channels=12, kernel=(3, 3), groups=2)
    weight = torch.cat([smooth(6, 8, 3, 3), smooth(6, 8, 3, 3)])
    for format, rank in (("low_rank", {"rank": 3}), ("spatial", {"rank": 3}), ("tucker2", {"out": 3, "in": 4})):
        dense = decompose(weight, format, rank, spec=spec).value.to_dense()
        for half in (slice(0, 6), slice(6, 12)):
            torch.testing.assert_close(
                dense[half], decompose(weight[half], format, rank).value.to_dense(), rtol=5e-2, atol=1e-2
            )


def test_the_dtype_computed_in_is_the_one_that_was_asked_for():
    weight = smooth(40, 30, 3, 3).float()
    rank = {"out": 40, "in": 30}
    assert decompose(weight, "low_rank", {}, SVD(dtype="float64", method="full")).rel_error < 1e-6
    for dtype in (torch.float16, torch.bfloat16):
        fit = decompose(weight.to(dtype), "tucker2", rank)
        assert fit.value.core.dtype == dtype
        assert fit.rel_error < 1e-2


def test_many_are_as_one_in_order_whatever_their_shapes():
    weights = [smooth(8, 6, 3, 3), smooth(6, 8, 3, 3), smooth(8, 6, 3, 3), smooth(8, 6, 3, 3).float()]
    problems = []
    for i, weight in enumerate(weights):
        spec = LayerSpec(kind="conv", in_channels=weight.shape[1], out_channels=weight.shape[0], kernel=(3, 3))
        problems.append(FitRequest(weight, spec, "tucker2", {"out": 4, "in": 3 + i % 2}, HOOI(n_iter=40, tol=1e-9)))
    for problem, fit in zip(problems, decompose_many(problems), strict=True):
        alone = decompose(problem.weight, "tucker2", problem.rank, problem.algorithm)
        assert fit.value.core.dtype == problem.weight.dtype
        assert fit.value.rank == problem.rank
        assert fit.rel_error == pytest.approx(alone.rel_error, rel=1e-4)
        torch.testing.assert_close(fit.value.to_dense(), alone.value.to_dense(), rtol=1e-2, atol=1e-3)


def test_a_weight_that_cannot_be_decomposed_does_not_spoil_its_batch():
    weights = [smooth(8, 6, 3, 3) for _ in range(3)]
    weights[1][0, 0] = float("nan")
    requests = [FitRequest(w, spec_of_weight(w), "tucker2", {"out": 4, "in": 3}, HOOI()) for w in weights]
    ((members, results),) = fit_batches(requests)
    assert members == [0, 1, 2]
    assert isinstance(results[1], WeightError)
    for i in (0, 2):
        torch.testing.assert_close(results[i].value.core, decompose(weights[i], "tucker2", requests[i].rank).value.core)


def test_gradients_do_not_flow_through_a_decomposition():
    weight = torch.nn.Parameter(torch.randn(6, 6))
    assert not any(t.requires_grad for t in decompose(weight, "low_rank", {"rank": 2}).value.tensors().values())


def test_what_cannot_be_decomposed_is_refused_in_words():
    weight = torch.randn(8, 6, 3, 3)
    with pytest.raises(RankError, match=r"low_rank rank rank=99 is outside 1\.\.8"):
        decompose(weight, "low_rank", {"rank": 99})
    with pytest.raises(UnknownNameError, match="Did you mean tucker2"):
        decompose(weight, "tuker2", {})
    with pytest.raises(RankError, match=r"svd does not find tucker2 factors. Use .*hooi.*hosvd"):
        decompose(weight, "tucker2", {}, SVD())
    with pytest.raises(WeightError, match="tucker2 does not serve Linear 6→8: tucker2 needs a convolution"):
        decompose(weight[:, :, 0, 0], "tucker2", {})
    with pytest.raises(WeightError, match="2 to 5 axes"):
        decompose(torch.randn(5), "low_rank", {})
    with pytest.raises(WeightError, match="empty"):
        decompose(torch.randn(0, 5), "low_rank", {})
    with pytest.raises(WeightError, match="meta device"):
        decompose(weight.to("meta"), "low_rank", {"rank": 2})
    for wrong in (weight.to(torch.cfloat), torch.randint(0, 5, (4, 4))):
        with pytest.raises(WeightError, match="only floating point weights"):
            decompose(wrong, "low_rank", {"rank": 2})
    with pytest.raises(WeightError, match="is a list, not a tensor"):
        decompose([[1.0, 2.0], [3.0, 4.0]], "low_rank", {"rank": 1})
    with pytest.raises(RankError, match="ranks go by name, such as"):
        decompose(weight, "low_rank", 2)
    weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightError, match="1 NaN or infinite entries of 432: repair the model or keep this layer"):
        decompose(weight, "low_rank", {"rank": 2})


def test_algorithms_go_by_name_too():
    weight = torch.randn(8, 6, 3, 3)
    by_name, given = (decompose(weight, "tucker2", {"out": 3, "in": 3}, a) for a in ("hosvd", HOSVD()))
    assert torch.equal(by_name.value.to_dense(), given.value.to_dense())
    with pytest.raises(UnknownNameError, match="hosvd"):
        decompose(weight, "tucker2", {"out": 3, "in": 3}, "hosdv")


def test_an_algorithm_is_chosen_by_object_name_or_configuration():
    assert algorithm_for("tucker2", HOSVD(seed=1)) == HOSVD(seed=1)
    assert algorithm_for("tucker2", "hosvd") == HOSVD()
    assert algorithm_for("tucker2", {"name": "hooi", "n_iter": 3}) == HOOI(n_iter=3)
    assert algorithm_for("tucker2", None, 5) == HOOI(seed=5)
    assert algorithm_for("tucker2", None, 5, data_aware=True) == WeightedALS(seed=5)
    assert HOOI().with_settings({"n_iter": 3, "cg_steps": 4}) == HOOI(n_iter=3)


def test_algorithms_are_their_own_configuration():
    for name, kind in DECOMPOSITIONS.items():
        algorithm = kind(seed=3)
        assert algorithm.to_dict()["name"] == name
        assert Decomposition.from_dict(algorithm.to_dict()) == algorithm
    assert Decomposition.from_dict({"name": "hooi", "n_iter": 3}) == HOOI(n_iter=3)
    with pytest.raises(TenfoldError, match=r"hooi has the settings .*n_iter.*, not sweeps"):
        Decomposition.from_dict({"name": "hooi", "sweeps": 3})
    for name in FORMATS.names():
        assert default_algorithm(name, seed=5).seed == 5


def test_what_is_registered_changes_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an algorithm that knows the data, serves every format and comes first in the alphabet."""

    def defaults() -> dict[str, str]:
        return {name: default_algorithm(name, data_aware=True).name() for name in FORMATS.names()}

    @dataclass(frozen=True)
    class First(WeightedALS):
        @classmethod
        def supports(cls, format: type[Factorization]) -> bool:
            return True

    before = defaults()
    monkeypatch.setitem(DECOMPOSITIONS._entries, "a_als", First)
    assert DECOMPOSITIONS.names()[0] == "a_als"
    assert defaults() == before
    assert before["low_rank"] == "whitened_svd"


@pytest.mark.parametrize("format", FORMATS.names())
def test_defaults_serve_their_format(format: str) -> None:
    kind = FORMATS.get(format)
    for aware in (False, True):
        assert default_algorithm(format, data_aware=aware).supports(kind)
    assert kind.data_aware_algorithm is None or default_algorithm(format, data_aware=True).uses_covariance
