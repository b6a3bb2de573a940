"""Plans carried out front to back: each layer must make up for those before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tenfold.calibration.moment_sums import frequencies, id_counts
from tenfold.decompositions import Moments, decompose, default_algorithm
from tenfold.errors import DataError, PlanError
from tenfold.layers import FactorizedLayer
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.surgery import apply
from tenfold.surgery.sequential import SequentialFit, apply_sequentially
from tenfold.tracing.replay import Replay


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), Block(12), Block(12), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    model.train()
    for _ in range(20):
        model(images(1)[0])
    return model.eval()


def images(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(3, 3, generator=generator)
    return [torch.einsum("ij,njhw->nihw", mix, torch.randn(32, 3, 10, 10, generator=generator)) for _ in range(count)]


def halved(model: nn.Module):
    return plan(model, profile(model, images(1)[0][:1]), {"rule": "ratio", "budget": {"macs": 0.5}})


def test_fitting_in_order_beats_decomposing_weights_one_by_one():
    model, batches, held = network(), images(4), torch.cat(images(2, seed=9))
    todo = halved(model)
    new = apply_sequentially(model, todo, batches)
    assert {p for p, m in new.named_modules() if isinstance(m, FactorizedLayer)} == {p.path for p in todo.factorized}
    with torch.no_grad():
        wanted, own, plain = (m(held) for m in (model, new, apply(model, todo)))
    assert (own - wanted).square().mean() < 0.7 * (plain - wanted).square().mean()


def test_the_model_and_the_plan_stay_as_they_are_and_the_result_is_deterministic():
    model, batches = network(), images(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    todo = halved(model)
    first, second = (apply_sequentially(model, todo, batches).state_dict() for _ in range(2))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(first[k], v) for k, v in second.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_the_last_layer_alone_is_the_closed_form():
    model, batches = network(), images(3)
    todo = halved(model)
    todo = todo.replace(layers=tuple(layer for layer in todo.layers if layer.path == "5"))
    new = apply_sequentially(model, todo, batches)
    with torch.no_grad():
        x = torch.cat([model[:5](b) for b in batches])
        y = x @ model[5].weight.T
    few = replace(default_algorithm("low_rank", 0, data_aware=True), ridge=0.1 * (48 / 96) ** 2)  # 96 rows, 48 wide
    fit = decompose(model[5].weight, "low_rank", todo.layer("5").rank, few, moments=Moments.of(x, y))
    torch.testing.assert_close(new[5].weight, fit.value.to_dense(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(new[5].bias, model[5].bias + fit.bias_shift.float(), rtol=1e-3, atol=1e-4)


def test_the_mean_of_what_follows_is_kept_by_batch_norm():
    model, batches = network(), images(4)
    new = apply_sequentially(model, halved(model), batches, config=SequentialFit(positions=None))
    with torch.no_grad():
        means = [m[:2](torch.cat(batches)).mean((0, 2, 3)) for m in (model, new)]
        inner = [m[1].bn1(m[1].conv1(m[0](torch.cat(batches)))).mean((0, 2, 3)) for m in (model, new)]
    torch.testing.assert_close(*inner, rtol=1e-3, atol=1e-3)
    assert (means[0] - means[1]).abs().max() < 0.1


def test_layers_that_run_twice_are_fitted_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    model, batches = Twice(), [torch.randn(64, 16)]
    todo = plan(model, profile(model, batches[0][:1]), {"rule": "ratio", "budget": {"macs": 0.5}})
    assert isinstance(apply_sequentially(model, todo, batches).fc, FactorizedLayer)


def test_a_model_that_is_one_layer_is_fitted_too():
    model, batches = nn.Linear(16, 16), [torch.randn(64, 16)]
    todo = plan(model, profile(model, batches[0][:1]), {"rule": "ratio", "budget": {"macs": 0.5}})
    new = apply_sequentially(model, todo, batches)
    assert isinstance(new, FactorizedLayer)
    assert new.rank == todo.factorized[0].rank


@pytest.mark.parametrize("rows", [16, 48, 64, 96])
def test_few_rows_do_no_harm(rows):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 8))
    batch, held = (torch.randn(n, 64, generator=generator) for n in (rows, 2000))
    todo = plan(model, profile(model, held[:1]), {"rule": "ratio", "budget": {"macs": 0.5}})
    with torch.no_grad():
        wanted = model(held)
        new = apply_sequentially(model, todo, [batch])
        own, plain = ((m(held) - wanted).square().mean() for m in (new, apply(model, todo)))
    assert own < plain


def test_embeddings_are_fitted_where_they_are_asked_for_and_what_follows_to_them():
    model = nn.Sequential(nn.Embedding(60, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randint(0, 60, (64, 3))]
    todo = plan(model, profile(model, batches[0]), {"rule": {"name": "fixed", "ranks": {"1": 6}}, "keep_ends": False})
    table = todo.layers[0].replace(action="factorize", format="low_rank", rank={"rank": 5})
    new = apply_sequentially(model, todo.replace(layers=(table, *todo.layers[1:])), batches)
    weight, often = model[0].weight.detach(), frequencies(id_counts(batches[0], 60)).float()
    _, _, right = torch.linalg.svd(often.sqrt()[:, None] * weight, full_matrices=False)
    torch.testing.assert_close(new[0].weight, weight @ right[:5].T @ right[:5], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        errors = [(m(batches[0]) - model(batches[0])).square().mean() for m in (new, apply(model, todo))]
    assert isinstance(new[1], FactorizedLayer)
    assert errors[0] < 1


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


class Preactivated(nn.Module):
    """Convolutions whose outputs batch norm takes, in ways in which it must not take the mean alone."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.conv2 = nn.Conv2d(3, 12, 3, bias=False), nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.bn, self.bn2 = nn.BatchNorm2d(12), nn.BatchNorm2d(12)

    def forward(self, x):
        x = self.conv(x)
        match self.way:
            case "alone":
                return self.bn2(self.conv2(torch.relu(self.bn(x))))
            case "shared":
                return self.bn(self.conv2(torch.relu(self.bn(x))))
            case "residual":
                return self.conv2(torch.relu(self.bn(x))) + x
            case "in place":
                return self.bn2(self.conv2(torch.relu(self.bn(torch.relu_(x)))))


@pytest.mark.parametrize(
    ("way", "follower"), [("alone", "bn"), ("shared", None), ("residual", None), ("in place", None)]
)
def test_batch_norm_takes_a_mean_only_where_it_alone_takes_the_output(way, follower):
    model = Preactivated(way).eval()
    replay = Replay(model, images(1))
    assert replay.follower("conv") == follower
    assert replay.follower("conv2") == {"alone": "bn2", "in place": "bn2"}.get(way)


def test_replay_keeps_what_a_module_does_to_its_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.one, self.two = nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x + 0
            return self.one(self.relu(x)) + self.two(x)  # of what the activation left

    x = torch.randn(8, 6)
    replay = Replay(InPlace(), [x])
    for path in ("one", "two", "two"):
        assert torch.equal(next(replay.inputs(path)), x.relu())


def test_what_cannot_be_done_is_said():
    model, todo = network(), halved(network())
    with pytest.raises(DataError, match="pass a list"):
        apply_sequentially(model, todo, iter(images(1)))
    with pytest.raises(PlanError, match="no layer"):
        apply_sequentially(nn.Sequential(nn.Linear(2, 2)), todo, images(1))


@pytest.mark.parametrize("limit", [4 << 30, 0, 100_000])
def test_replay_sees_what_a_whole_forward_sees_with_layers_changed_on_the_way(limit):
    model, batches = network(), images(2)
    replay = Replay(model, batches, limit=limit)
    assert replay.order[:4] == ("0", "1.conv1", "1.bn1", "1.relu")
    assert replay.follower("1.conv1") == "1.bn1"
    for path in ("0", "1.conv1", "1.conv2", "2.conv1", "2.conv2", "5"):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        module = model.get_submodule(path)
        handle = module.register_forward_hook(lambda m, a, y, seen=seen: seen.append((a[0].clone(), y.clone())))
        with torch.no_grad():
            for batch in batches:
                model(batch)
        handle.remove()
        for x, y, wanted in zip(replay.inputs(path), replay.outputs(path), seen, strict=True):
            torch.testing.assert_close((x, y), wanted)
        with torch.no_grad():
            module.weight.mul_(1.1)


def test_replay_runs_settled_blocks_only_once():
    model, batches, runs = network(), images(2), []
    replay = Replay(model, batches)
    model[1].conv1.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        list(replay.inputs("2.conv2"))
    assert len(runs) == len(batches)
