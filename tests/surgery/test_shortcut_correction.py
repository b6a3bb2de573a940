"""Layers at the end of residual branches must make up for what their shortcuts have lost."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tenfold.layers import FactorizedLayer
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.surgery.sequential import SequentialFit, apply_sequentially
from tenfold.surgery.shortcut_correction import Branch, branch_of, targets
from tenfold.tracing.replay import Replay
from tenfold.tracing.trace import trace


class Block(nn.Module):
    """A residual block of convolutions, which may add and activate in place."""

    def __init__(self, width: int, *, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inplace = inplace

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=self.inplace)
        out = self.bn2(self.conv2(out))
        if not self.inplace:
            return torch.relu(out + x)
        out += x
        return F.relu(out, inplace=True)


class Mixer(nn.Module):
    """A transformer-like block: two branches that end in dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        h = self.mix(self.norm1(x))
        x = x + self.drop(self.proj(h.softmax(-1) * h))
        x += self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return x


class Two(nn.Module):
    """A shortcut and a branch, linear both, of ranks 3 and 2; ``join`` makes the output of them."""

    def __init__(self, join, *, norm: bool = False) -> None:
        super().__init__()
        self.short, self.branch = nn.Linear(12, 12), nn.Linear(12, 12, bias=not norm)
        self.norm = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.drop, self.join = nn.Dropout(0.5), join
        with torch.no_grad():
            for layer, rank in ((self.short, 3), (self.branch, 2)):
                layer.weight.copy_(torch.randn(12, rank) @ torch.randn(rank, 12))
            for tensor in self.norm.parameters():
                tensor.uniform_(0.5, 1.5)
            for tensor in self.norm.buffers():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)

    def forward(self, x):
        return self.join(self.short(x), self.drop(self.norm(self.branch(x))))


def two(join, *, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Two(join, norm=norm).eval()


def convolutional(*, inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), *(Block(12, inplace=inplace) for _ in range(3)))
    model.train()
    for batch in pictures(20, seed=5):
        model(batch)
    return model.eval()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), Mixer(24), Mixer(24)).eval()


def pictures(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 10, 10, generator=generator) for _ in range(count)]


def tokens(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 6, 8, generator=generator) for _ in range(count)]


def rows(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 12, generator=generator) for _ in range(count)]


def ranks(model: nn.Module, batch: torch.Tensor, **wanted: int):
    """Return the plan that makes these layers low_rank at these ranks."""
    found = plan(model, profile(model, batch[:1]), {"rule": "ratio", "formats": ["low_rank"], "budget": {"macs": 0.5}})
    layers = (layer.replace(rank={"rank": wanted[layer.path]}) for layer in found.factorized if layer.path in wanted)
    return found.replace(layers=tuple(layers))


def error(model: nn.Module, new: nn.Module, batches: list[torch.Tensor]) -> float:
    with torch.no_grad():
        wanted = torch.cat([model(b) for b in batches])
        return float((wanted - torch.cat([new(b) for b in batches])).square().mean() / wanted.var())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("join", [operator.add, operator.iadd, torch.add, lambda x, y: y.add_(x).mul_(2)])
def test_what_a_shortcut_lost_comes_back_whole_where_the_rank_allows_it(join, norm):
    model, batches = two(join, norm=norm), rows()
    todo = ranks(model, batches[0], short=1, branch=4)  # 2 + what is missing of 3
    with_, without = (
        apply_sequentially(model, todo, batches, config=SequentialFit(correct_shortcuts=r, ridge=1e-9))
        for r in (True, False)
    )
    assert error(model, without, batches) > 0.05
    assert error(model, with_, batches) < 1e-6


@pytest.mark.parametrize("inplace", [False, True])
def test_blocks_make_up_for_those_before_them(inplace):
    model, batches, held = convolutional(inplace=inplace), pictures(8), pictures(4, seed=9)
    todo = plan(model, profile(model, batches[0][:1]), {"rule": "ratio", "budget": {"macs": 0.5}})
    with_, without = (
        apply_sequentially(model, todo, batches, config=SequentialFit(correct_shortcuts=r)) for r in (True, False)
    )
    assert error(model, with_, held) < 0.95 * error(model, without, held)


@pytest.mark.parametrize(
    ("model", "batches", "ends"),
    [
        (convolutional(), pictures(2), {"1.conv2": "1.bn2", "2.conv2": "2.bn2", "3.conv2": "3.bn2"}),
        (convolutional(inplace=True), pictures(2), {"1.conv2": "1.bn2", "2.conv2": "2.bn2", "3.conv2": "3.bn2"}),
        (transformer(), tokens(2), {p: p for p in ("1.proj", "1.fc2", "2.proj", "2.fc2")}),
    ],
)
def test_ends_of_branches_are_found_and_their_targets_meet_the_sums_of_the_dense_model(model, batches, ends):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.add_(torch.randn_like(changed[0].weight) / 4)
    before = [batch.clone() for batch in batches]
    dense, new = Replay(model, batches), Replay(changed, batches)
    found = {path: branch_of(changed, new, path) for path in new.order if "bn" not in path}
    assert {path: branch.last for path, branch in found.items() if branch is not None} == ends
    for path in [path for path in new.order if path in ends]:
        branch, layer = found[path], model.get_submodule(path)
        wanted, own = inputs_of(model, layer, batches), inputs_of(changed, changed.get_submodule(path), batches)
        after = [shortcut for _, _, shortcut in new.branches(path, branch.last)]
        goal = [shortcut for _, _, shortcut in dense.branches(path, branch.last)]
        assert not torch.allclose(torch.cat(after), torch.cat(goal), atol=1e-2)
        norm = nn.Identity() if branch.scale is None else model.get_submodule(branch.last)
        for n, (x, y) in enumerate(targets(dense, new, path, branch)):
            torch.testing.assert_close(x, own[n])
            with torch.no_grad():
                torch.testing.assert_close(norm(y) + after[n], norm(layer(wanted[n])) + goal[n], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, batches, strict=True))


def inputs_of(model: nn.Module, layer: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return seen


def test_the_shortcut_is_what_enters_the_block():
    model, batches = convolutional(inplace=True), pictures(2)
    wanted = inputs_of(model, model[2], batches)
    found = [shortcut for _, _, shortcut in Replay(model, batches).branches("2.conv2", "2.bn2")]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y: x + 2 * y,  # scaled
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: x + y.relu(),
        lambda x, y: x + y.relu_(),  # the same tensor, but not the same values
        lambda x, y: x + y.view(-1, 12),
        lambda x, y: (x + y) * y,  # taken twice
        lambda x, y: y + y + 0 * x,
        lambda x, y: x.sum() + y,  # no shortcut but a number
        lambda x, y: x[:1] + y,
        lambda x, y: 1 + y,
        lambda x, y: torch.stack([x, y]).sum(0),
        lambda x, y: y,
    ],
)
def test_where_no_one_partner_is_found_nothing_changes(join):
    model, batches = two(join), rows()
    assert branch_of(model, trace(model, batches[0]), "branch") is None
    todo = ranks(model, batches[0], short=1, branch=2)
    first, second = (
        apply_sequentially(model, todo, batches, config=SequentialFit(correct_shortcuts=r)).state_dict()
        for r in (True, False)
    )
    assert all(torch.equal(first[k], v) for k, v in second.items())


def test_other_norms_and_batch_norm_without_statistics_are_left_alone():
    model, batches = two(torch.add), rows()
    for norm in (nn.LayerNorm(12), nn.BatchNorm1d(12, track_running_stats=False)):
        model.norm = norm
        assert branch_of(model, trace(model, batches[0]), "branch") is None


class Odd(Two):
    """A branch whose input is overwritten before the sum, or whose output does not only go into batch norm."""

    def __init__(self, kind: str) -> None:
        super().__init__(operator.add, norm=True)
        self.kind = kind

    def forward(self, x):
        h = self.short(x)
        y = self.branch(h)
        if self.kind == "overwritten":
            h.zero_()
            return x + self.norm(y)
        return x + self.norm(y) + y.mean()


def test_inputs_are_seen_as_they_were_when_the_layer_took_them():
    model, batches = Odd("overwritten").eval(), rows()
    replay = Replay(model, batches)
    assert branch_of(model, replay, "branch").last == "norm"
    for (x, y, shortcut), batch in zip(replay.branches("branch", "norm"), batches, strict=True):
        with torch.no_grad():
            torch.testing.assert_close((x, y), (model.short(batch), model.branch(model.short(batch))))
        assert torch.equal(shortcut, batch)


def test_a_layer_whose_output_goes_elsewhere_too_is_no_end_of_a_branch():
    model, batches = Odd("shared").eval(), rows()
    assert branch_of(model, trace(model, batches[0]), "branch") is None


def test_of_two_branches_that_meet_the_last_repairs_the_first():
    class Joint(Two):
        def forward(self, x):
            main = self.branch(x)
            return main + self.short(x)

    torch.manual_seed(0)
    model, batches = Joint(operator.add).eval(), rows()
    todo = ranks(model, batches[0], short=4, branch=1)  # 3 + what is missing of 2
    assert error(model, apply_sequentially(model, todo, batches, config=SequentialFit(ridge=1e-9)), batches) < 1e-6


def test_dead_channels_are_not_corrected():
    lost = torch.ones(2, 4, 3, 3)
    found = Branch("bn", torch.tensor([2.0, 0.0, 1e-9, -0.5])).correction(lost)
    assert found[0, :, 0, 0].tolist() == [0.5, 0.0, 0.0, -2.0]
    assert not Branch("bn", torch.zeros(4)).correction(lost).any()
    model, batches = two(torch.add, norm=True), rows()
    with torch.no_grad():
        model.norm.weight[3] = 0
    new = apply_sequentially(model, ranks(model, batches[0], short=1, branch=4), batches)
    assert all(bool(torch.isfinite(v).all()) for v in new.state_dict().values())


def test_all_is_as_it_was_afterwards():
    model, batches = two(operator.iadd, norm=True).train(), rows()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new = apply_sequentially(model, ranks(model, batches[0], short=1, branch=4), batches)
    assert isinstance(new.branch, FactorizedLayer)
    assert not _get_current_dispatch_mode_stack()
    for found in (model, new):
        assert all(m.training for m in found.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in found.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_errors_on_the_way_leave_nothing_on():
    def join(x, y):
        if len(x) == 3:
            raise ValueError
        return x + y

    model, batches = two(join), [*rows(1), torch.randn(3, 12)]
    with pytest.raises(Exception, match="does not run"):
        Replay(model, batches)
    assert not _get_current_dispatch_mode_stack()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
