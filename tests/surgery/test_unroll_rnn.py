from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.errors import PlanError
from tenfold.layers import LSTM, FactorizedLayer
from tenfold.planning import plan as make_plan
from tenfold.planning.eligible import kept_reasons
from tenfold.planning.unroll import refuse_unused, unroll_for_plan
from tenfold.profiling import profile
from tenfold.records import Plan, Recipe
from tenfold.runtime import Runtime
from tenfold.surgery import (
    apply,
    apply_,
    fuse_rnns_,
    fused_rnns,
    unroll_rnns,
    unroll_rnns_,
    unrolled_rnns,
)

IDS = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
QUIET = Runtime(measure=False)


class Tagger(nn.Module):
    """An embedding, two recurrent networks of different kinds, and a head; calls what models call of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.rnn = nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True)
        self.top = nn.GRU(24, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        scores: Tensor = self.head(self.top(self.rnn(self.embedding(ids))[0])[0][:, -1])
        return scores


@pytest.fixture
def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger().eval()


def test_opening_and_closing_keep_the_outputs(tagger: Tagger) -> None:
    opened = unroll_rnns(tagger)
    assert fused_rnns(tagger) == {"rnn": "LSTM", "top": "GRU"}
    assert unrolled_rnns(tagger) == {}
    assert unrolled_rnns(opened) == {"rnn": "LSTM", "top": "GRU"}
    assert torch.allclose(opened(IDS), tagger(IDS), atol=1e-6)
    assert unroll_rnns(opened) is opened
    back = fuse_rnns_(opened)
    assert fused_rnns(back) == {"rnn": "LSTM", "top": "GRU"}
    assert torch.equal(back(IDS), tagger(IDS))


def test_an_open_network_costs_what_the_closed_one_does(tagger: Tagger) -> None:
    assert profile(unroll_rnns(tagger), IDS).cost == profile(tagger, IDS).cost


def test_weights_answer_to_the_names_of_torch(tagger: Tagger) -> None:
    """Models ask a weight of theirs for its dtype, or copy it."""
    opened = unroll_rnns(tagger, ["rnn", "top"])
    for path in ("rnn", "top"):
        network = opened.get_submodule(path)
        for name, weight in tagger.get_submodule(path).named_parameters():
            assert torch.equal(getattr(network, name), weight)
        with pytest.raises(AttributeError, match="weight_ih_l7"):
            _ = network.weight_ih_l7


def test_what_cannot_be_unrolled_stays(tagger: Tagger) -> None:
    tagger.rnn = nn.LSTM(16, 24, batch_first=True, proj_size=12)
    tagger.top = nn.utils.parametrizations.weight_norm(tagger.top, "weight_hh_l0")
    assert fused_rnns(tagger) == {}
    with pytest.raises(PlanError, match="'rnn' is a LSTM that cannot be unrolled"):
        unroll_rnns_(tagger, ["rnn"])


def test_one_network_in_two_places_stays_one(tagger: Tagger) -> None:
    both = nn.ModuleDict({"a": tagger.rnn, "b": tagger.rnn})
    unroll_rnns_(both)
    assert both["a"] is both["b"]


def test_compressing_reaches_recurrent_matrices(tagger: Tagger, tmp_path: Path) -> None:
    small = tenfold.compress(tagger, IDS, {"budget": {"params": 0.5}, "keep_ends": False}, runtime=QUIET)
    assert small.record.after.params <= 0.5 * small.record.before.params
    rnn = small.model.get_submodule("rnn")
    assert isinstance(rnn, LSTM)
    assert any(isinstance(layer, FactorizedLayer) for layer in rnn.matrices())
    assert set(small.plan.unrolled) <= {"rnn", "top"}
    assert isinstance(tagger.rnn, nn.LSTM)

    small.save(tmp_path / "small")
    back, plan = tenfold.load(Tagger(), tmp_path / "small")  # a skeleton that nobody opened
    assert torch.equal(back.eval()(IDS), small.model.eval()(IDS))
    assert plan.unrolled == small.plan.unrolled

    again = tenfold.compress(tagger, IDS, Plan.from_text(small.plan.to_yaml(), source="test"), runtime=QUIET)
    assert torch.equal(again.model.eval()(IDS), small.model.eval()(IDS))


@pytest.mark.parametrize("method", ["independent", "sequential"])
def test_data_are_used_step_by_step(tagger: Tagger, method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(0, 20, (8, length), generator=generator) for length in (4, 6, 5)]
    small = tenfold.compress(
        tagger,
        IDS,
        {"budget": {"params": 0.75}, "calibration": {"method": method}, "keep_ends": False},
        data=data,
        runtime=QUIET,
    )
    blind = tenfold.compress(tagger, IDS, {"budget": {"params": 0.75}, "keep_ends": False}, runtime=QUIET)
    fresh = torch.randint(0, 20, (64, 6), generator=generator)

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(fresh) - tagger(fresh)).norm())

    assert error(small.model) < error(blind.model)


def test_an_idle_network_is_left_closed_and_the_plan_says_why(tagger: Tagger) -> None:
    kept = ["re:top.*", "re:rnn.*hh"]
    small = tenfold.compress(tagger, IDS, {"budget": {"params": 0.8}, "keep": kept, "keep_ends": False}, runtime=QUIET)
    assert isinstance(small.model.get_submodule("top"), nn.GRU)
    assert small.plan.unrolled == {"rnn": "LSTM"}
    line = small.plan.layer("top")
    assert (line.kind, line.action) == ("GRU", "keep")
    assert line.after == line.before
    assert line.before.params == sum(p.numel() for p in tagger.top.parameters())
    assert small.plan.after == profile(small.model, IDS).cost


def test_networks_named_as_a_whole_are_not_opened(tagger: Tagger) -> None:
    assert unrolled_rnns(unroll_for_plan(tagger, Recipe(keep=("rnn",)), IDS)) == {"top": "GRU"}
    assert unroll_for_plan(tagger, Recipe(keep=("rnn", "top")), IDS) is tagger


def test_budgets_of_latency_leave_recurrent_matrices_to_the_kernel(tagger: Tagger) -> None:
    recipe = Recipe.of("latency=0.5")
    opened = unroll_for_plan(tagger, recipe, IDS)
    assert unrolled_rnns(opened) == {"rnn": "LSTM", "top": "GRU"}
    kept = kept_reasons(opened, profile(opened, IDS), recipe)
    states = {path for path, why in kept.items() if why.startswith("torch multiplies states within one kernel")}
    assert states == {path for path in kept if path.endswith(".hh")}
    assert len(states) == 5
    assert not kept["rnn.cells.0.ih"]
    assert not kept_reasons(opened, profile(opened, IDS), Recipe.of("params=0.5"))["rnn.cells.0.hh"]


def test_a_network_that_the_user_opened_stays_open(tagger: Tagger) -> None:
    opened = unroll_rnns(tagger, ["top"])
    rule = {"name": "fixed", "ranks": {"head": 2}}
    made = make_plan(opened, profile(opened, IDS), {"rule": rule})
    assert refuse_unused(made, opened).unrolled == {"top": "GRU"}
    closed = refuse_unused(made, tagger)
    assert closed.unrolled == {}
    assert closed.layer("top").reason.startswith("left whole")


def test_applying_in_place_needs_open_networks(tagger: Tagger) -> None:
    opened = unroll_rnns(tagger)
    made = make_plan(opened, profile(opened, IDS), {"rule": {"name": "fixed", "ranks": {"rnn.cells.0.ih": 3}}})
    small = apply(tagger, made)
    assert isinstance(small.get_submodule("rnn.cells.0.ih"), FactorizedLayer)
    with pytest.raises(PlanError, match=r"no layer 'rnn\.cells"):
        apply_(tagger, made)
    assert isinstance(tagger.rnn, nn.LSTM)


def test_a_model_that_is_a_recurrent_network_itself() -> None:
    torch.manual_seed(0)
    net, x = nn.LSTM(16, 16), torch.randn(5, 2, 16)
    small = tenfold.compress(net, x, {"budget": {"params": 0.5}, "keep_ends": False}, runtime=QUIET)
    assert small.plan.unrolled == {"": "LSTM"}
    assert small.model(x)[0].shape == net(x)[0].shape
