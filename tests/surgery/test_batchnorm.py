"""Re-estimated statistics are those of all values seen, and nothing else of the model changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import DataError, ProfileError
from tenfold.surgery.batchnorm import reestimate_batchnorm_

KINDS = [
    (nn.BatchNorm1d, (8, 3)),
    (nn.BatchNorm1d, (8, 3, 5)),
    (nn.BatchNorm2d, (4, 3, 5, 6)),
    (nn.BatchNorm3d, (2, 3, 4, 3, 2)),
    (nn.SyncBatchNorm, (4, 3, 5)),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def per_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).double()


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_statistics_are_those_of_the_union(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    # Batches of unequal size with far apart means: the variance between batches dominates.
    batches = [randn(*shape, seed=s) * (1 + s) + 10 * s for s in range(3)] + [randn(2, *shape[1:], seed=9) - 20]
    norm = kind(shape[1]).eval()
    assert reestimate_batchnorm_(norm, batches) == 4
    union = torch.cat([per_channel(x) for x in batches], dim=1)
    torch.testing.assert_close(norm.running_mean, union.mean(1).float())
    torch.testing.assert_close(norm.running_var, union.var(1).float())
    assert norm.num_batches_tracked == 4


def test_order_of_batches_does_not_matter() -> None:
    batches = [randn(4, 3, seed=s) + s for s in range(5)]
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    reestimate_batchnorm_(one, batches)
    reestimate_batchnorm_(other, batches[::-1])
    torch.testing.assert_close(one.running_var, other.running_var, rtol=1e-6, atol=0)


def test_broken_statistics_are_replaced() -> None:
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(float("nan"))
    norm.running_var.fill_(float("inf"))
    x = randn(64, 3)
    reestimate_batchnorm_(norm, [x])
    torch.testing.assert_close(norm.running_var, x.var(0))


def test_later_norms_see_inputs_normalized_by_earlier_ones() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = randn(64, 3) * 7 + 3
    reestimate_batchnorm_(model, [x])
    expected = model[1]((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(model[2].running_mean, expected.mean(0).detach(), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """A norm called twice, one never called, one without statistics, dropout, and an instance norm with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.BatchNorm1d(3, momentum=0.3)
        self.unused = nn.BatchNorm1d(3, momentum=None)
        self.free = nn.BatchNorm1d(3, track_running_stats=False)
        self.instance = nn.InstanceNorm1d(3, track_running_stats=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.dropout(self.free(self.shared(a)) + self.shared(b) + self.instance(a[..., None]).squeeze(-1))


def test_shared_norm_pools_its_calls_and_the_rest_is_untouched() -> None:
    model = Odd().train()
    model.dropout.eval()
    model.unused.running_mean.fill_(5)
    before = copy.deepcopy(model.state_dict())
    modes = {n: m.training for n, m in model.named_modules()}
    a, b = randn(16, 3), randn(16, 3, seed=1) + 4
    state = torch.random.get_rng_state()
    assert reestimate_batchnorm_(model, [(a, b)]) == 1
    assert torch.equal(state, torch.random.get_rng_state())  # dropout was off
    after = model.state_dict()
    torch.testing.assert_close(model.shared.running_mean, torch.cat([a, b]).mean(0))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"shared.running_mean", "shared.running_var", "shared.num_batches_tracked"}
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert (model.shared.momentum, model.unused.momentum) == (0.3, None)
    assert not model.shared._forward_hooks
    assert not model.shared._forward_pre_hooks


def test_children_of_a_norm_stay_in_eval_mode() -> None:
    class NormAct(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            assert not self.drop.training
            return self.drop(super().forward(x))

    assert reestimate_batchnorm_(NormAct().train(), [randn(4, 3)]) == 1


@pytest.mark.parametrize("form", ["dict", "args", "args and kwargs", "forward"])
def test_forms_of_inputs(form: str) -> None:
    a, b = randn(8, 3), randn(8, 3, seed=1)
    batch = {"dict": {"a": a, "b": b}, "args": [a, b], "args and kwargs": ((a,), {"b": b}), "forward": a}[form]
    model = Odd()
    forward = (lambda m, x: m(x, b)) if form == "forward" else None
    if form == "args":
        batch = tuple(batch)
    reestimate_batchnorm_(model, iter([batch]), forward=forward)
    torch.testing.assert_close(model.shared.running_mean, torch.cat([a, b]).mean(0))


def test_model_without_batch_norm_is_not_run() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    assert reestimate_batchnorm_(Never(), [randn(2, 2)]) == 0


def poisoned() -> list[Tensor]:
    bad = randn(4, 3)
    bad[1, 1] = float("nan")
    return [randn(4, 3), bad]


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "no batches"), (poisoned(), "'0'.*not finite"), ([randn(4, 3), randn(1, 3)], "'0'.*larger batches")],
)
def test_errors_leave_the_model_as_it_was(batches: list[Tensor], message: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.2), nn.Dropout()).train()
    model[0].running_mean.fill_(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=message):
        reestimate_batchnorm_(model, batches)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model[0].momentum == 0.2
    assert model.training
    assert model[0].training
    assert model[1].training
    assert not model[0]._forward_hooks


def test_forward_that_raises_and_half_precision() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ProfileError, match=r"\[4, 5\]"):
        reestimate_batchnorm_(model, [randn(4, 3), randn(4, 5)])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    half = nn.BatchNorm1d(3).bfloat16()
    x = (randn(256, 3) + 3).bfloat16()
    reestimate_batchnorm_(half, [x])
    torch.testing.assert_close(half.running_mean.float(), x.float().mean(0), rtol=0.01, atol=0.01)


def test_inputs_by_keyword_are_pooled_as_well() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.maps = nn.BatchNorm1d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.maps(input=self.norm(input=x)[:, :, None, None].expand(-1, 3, 2, 2))
            return out

    model, x = Keywords(), randn(50, 3) + 2
    reestimate_batchnorm_(model, [x[:30], x[30:]])
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))
    torch.testing.assert_close(model.norm.running_var, x.var(0))
    with pytest.raises(DataError, match="one value per channel"):
        reestimate_batchnorm_(model, [x[:1]])


def test_statistics_in_sixteen_bits_are_rounded_once() -> None:
    norm, x = nn.BatchNorm2d(3).bfloat16(), (randn(400, 3, 2, 2) + 30).bfloat16()
    reestimate_batchnorm_(norm, list(x.split(4)))
    assert torch.equal(norm.running_mean, x.double().mean((0, 2, 3)).bfloat16())
    assert torch.equal(norm.running_var, x.double().transpose(0, 1).flatten(1).var(1).bfloat16())


def test_a_model_made_in_inference_mode_can_be_written_to() -> None:
    with torch.inference_mode():
        norm = nn.BatchNorm1d(3)
    x = randn(50, 3)
    assert reestimate_batchnorm_(norm, [x]) == 1
    torch.testing.assert_close(norm.running_mean, x.mean(0))
