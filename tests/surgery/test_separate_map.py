"""Linear layers behind flattened maps: found by what a forward does, and planned by the modes of the map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer, MapLinear
from tenfold.surgery.separate_map import flattened_maps, mapped, separate_map_


class Flatteners(nn.Module):
    """Heads behind a map that is flattened in several ways, and layers that are not behind one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.plain, self.viewed, self.dropped = (nn.Linear(80, 5) for _ in range(3))
        self.turned = nn.Linear(80, 5)
        self.pooled, self.tokens, self.rows = nn.Linear(4, 5), nn.Linear(20, 5), nn.Linear(80, 5)
        self.both = nn.Linear(80, 5)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        total = self.plain(x.flatten(1)) + self.viewed(x.reshape(len(x), -1)) + self.dropped(self.dropout(x.flatten(1)))
        total = total + self.turned(x.permute(0, 2, 3, 1).reshape(len(x), -1))
        total = total + self.pooled(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        total = total + self.tokens(x.flatten(2)).sum(1) + self.rows(x.flatten(1) + 1)
        return total + self.both(x.flatten(1)) + self.both(x.permute(0, 2, 3, 1).reshape(len(x), -1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_takes_a_flattened_map_is_found_with_its_shape(layout: torch.memory_format) -> None:
    net, x = Flatteners().eval(), torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    own = "map 4 4 5"
    assert flattened_maps(net, x) == {"plain": own, "viewed": own, "dropped": own, "turned": "map 4 5 4"}
    assert flattened_maps(nn.Sequential(nn.Conv2d(3, 4, 3)), x) == {}


def _head() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    head = nn.Linear(12 * 36, 24)
    with torch.no_grad():  # one that sees the map no finer than 3 × 3, as those of networks nearly do
        head.weight.copy_(torch.randn(24, 12, 3, 3).repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1) / 20)
    return nn.Sequential(*body, head, nn.ReLU(), nn.Linear(24, 5)).eval()


def _pictures(count: int) -> Tensor:
    x = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return x + x.roll(1, 2) + x.roll(1, 3)


def test_compress_chooses_it_beside_pairs_and_it_is_saved(tmp_path: Path) -> None:
    net, data = _head(), _pictures(900)
    recipe = {"budget": "params=0.3", "formats": "low_rank,tensor_regression"}
    still = tenfold.Runtime(measure=False)
    small = tenfold.compress(net, data[:1], recipe, data=data, runtime=still)
    (line,) = (layer for layer in small.plan.layers if layer.format)
    assert (line.path, line.format, small.plan.unrolled) == ("4", "tensor_regression", {"4": "map 12 6 6"})
    assert small.plan.after.params <= 0.3 * tenfold.profile(net, data[:1]).params
    counted = tenfold.profile(small.model, data[:1])
    assert (counted.params, counted.macs) == (small.plan.after.params, small.plan.after.macs)
    tenfold.save(small.model, small.plan, tmp_path / "small")
    loaded, _ = tenfold.load(_head(), tmp_path / "small")
    assert torch.equal(loaded(data[:3]), small.model(data[:3]))
    assert mapped(loaded) == {"4": "map 12 6 6"}
    pairs = tenfold.compress(net, data[:1], recipe | {"formats": "low_rank"}, data=data, runtime=still)
    fresh = _pictures(1400)[900:]
    wanted = net(fresh)
    assert (small.model(fresh) - wanted).square().mean() < 0.7 * (pairs.model(fresh) - wanted).square().mean()
    assert pairs.plan.unrolled == {}


def test_where_it_is_not_chosen_the_model_stays_as_it_is() -> None:
    net, data = _head(), _pictures(600)
    recipe = {"budget": "params=0.98", "formats": "low_rank,tensor_regression", "keep": "4"}
    plan = tenfold.plan(net, tenfold.profile(net, data[:1]), recipe)
    assert plan.unrolled == {}
    assert all(type(m) is not MapLinear for m in tenfold.apply(net, plan).modules())


def test_a_plan_for_another_model_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU())
    with pytest.raises(PlanError, match="is ReLU in the model and a linear layer in the plan"):
        separate_map_(net, {"2": "map 4 3 3"})
    separate_map_(net, {"1": "map 4 3 3"})
    assert type(net[1]) is MapLinear
    assert not any(isinstance(m, FactorizedLayer) for m in net)
