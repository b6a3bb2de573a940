"""Laws of whole models: what plan, apply, save, load and export do together."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.allocation import RankRule, choose
from tenfold.checkpoint import load, save
from tenfold.errors import BudgetError
from tenfold.formats import FORMATS, Factorization
from tenfold.layers import FactorizedLayer
from tenfold.planning import plan, tabulate
from tenfold.profiling import profile
from tenfold.records import Budget, Plan, Profile, Recipe
from tenfold.surgery import apply, densify
from tenfold.testing.format_laws import dense_layer
from tenfold.testing.geometries import Geometry, served
from tenfold.testing.laws import expect, expect_close, law
from tenfold.testing.rule_laws import aiming
from tenfold.testing.weights import random_bias, random_weight, some_ranks

Format = type[Factorization]


class Host(nn.Module):
    """A small model around one layer under test, with what must survive: a batch norm after a convolution, a dropout.

    And parameters, buffers and modules of its own; laws add hooks.
    """

    def __init__(self, at: Geometry) -> None:
        super().__init__()
        weight = random_weight(at.spec, torch.float32)
        self.before = nn.Identity()
        self.layer = dense_layer(at.spec, weight, random_bias(at.spec, torch.float32))
        self.norm = _trained_norm(at)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, normalised, shifted and scaled."""
        out: Tensor = self.drop(self.norm(self.layer(self.before(x)))) * self.scale + self.shift
        return out


def _trained_norm(at: Geometry) -> nn.Module:
    """Return a batch norm for the output of a convolution whose inputs are batches, its tensors as if trained."""
    kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    if len(at.in_shape) != at.spec.axes + 2 or at.spec.axes not in kinds:
        return nn.Identity()
    norm = kinds[at.spec.axes](at.spec.out_channels)
    generator = torch.Generator().manual_seed(5)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return norm


def planned(format: Format, at: Geometry, model: nn.Module) -> Plan:
    """Return a plan that puts the layer of a ``Host`` into a format at its smallest rank, whatever that costs."""
    cost = profile(model, at.inputs(torch.float32))
    made = plan(model, cost, {"rule": "fixed", "formats": format.name()})
    rank = some_ranks(format, at.spec)[0]
    layer = made.layer("layer").replace(action="factorize", format=format.name(), rank=rank, reason="under test")
    return made.replace(layers=tuple(layer if old.path == "layer" else old for old in made.layers))


def check_save_load(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless plan and checkpoint come back as they were, and so does every bit of the output."""
    model = Host(at).eval()
    with law(8, format.name(), at), tempfile.TemporaryDirectory() as folder:
        made = planned(format, at, model)
        expect(Plan.from_text(made.to_yaml()) == made, "the plan changes on its way through YAML")
        expect(Plan.from_text(made.to_json()) == made, "the plan changes on its way through JSON")
        small = apply(model, made)
        save(small, made, Path(folder) / "saved")
        loaded, again = load(Host(at).eval(), Path(folder) / "saved")
        expect(again == made, "the plan that was loaded is not the one that was saved")
        state, wanted = loaded.state_dict(), small.state_dict()
        expect(list(state) == list(wanted), "the names of the tensors differ")
        expect(all(torch.equal(state[k], wanted[k]) for k in wanted), "a tensor differs")
        x = at.inputs(torch.float32)
        expect(torch.equal(loaded(x), small(x)), "the outputs differ")


def check_untouched(format: Format, at: Geometry) -> None:
    """Raise LawBroken if ``apply`` changes its input, or the result shares anything with it or drops anything of it."""
    model = Host(at).train()
    calls: list[str] = []
    model.layer.register_forward_hook(lambda *_: calls.append("hook"))
    model.layer.train(mode=False)
    model.layer.get_parameter("weight").requires_grad = False
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    made = planned(format, at, model)
    hooks = _hook_counts(model)
    with law(11, format.name(), at):
        small = apply(model, made)
        expect(dict(model.named_modules()) == modules, "the input has other modules")
        expect(_hook_counts(model) == hooks, "the input has other hooks")
        state = model.state_dict()
        expect(list(state) == list(before), "the input has other tensors")
        expect(all(torch.equal(state[k], before[k]) for k in before), "a tensor of the input changed")
        owned = {t.data_ptr() for t in state.values()}
        expect(not owned & {t.data_ptr() for t in small.state_dict().values()}, "result and input share a tensor")
        carried = small.state_dict()
        others = [name for name in before if not name.startswith("layer.")]
        expect(all(torch.equal(carried[name], before[name]) for name in others), "a tensor of another layer changed")
        _expect_handed_over(small.get_submodule("layer"), model.layer)
        expect(small.training and model.training, "the training mode changed")
        calls.clear()  # the profile ran the layer too
        small(at.inputs(torch.float32))
        expect(calls == ["hook"], f"the hook of the layer ran {len(calls)} times, not once")


def _hook_counts(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) for m in model.modules()]  # noqa: SLF001 - there is no public way to ask


def _expect_handed_over(new: nn.Module, old: nn.Module) -> None:
    expect(isinstance(new, FactorizedLayer), f"the layer is a {type(new).__name__}")
    expect(new.training == old.training, "the layer's training mode was lost")
    grads = {name.endswith("weight"): p.requires_grad for name, p in new.named_parameters()}
    wanted = {name.endswith("weight"): p.requires_grad for name, p in old.named_parameters()}
    expect(grads == wanted, "requires_grad was lost")
    expect(all(p.dtype == next(old.parameters()).dtype for p in new.parameters()), "the dtype was lost")


def check_densified(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless ``densify`` gives plain layers that compute the same."""
    model = Host(at).eval()
    with law(5, format.name(), at, "densify"):
        small = apply(model, planned(format, at, model))
        dense = densify(small)
        expect(type(dense.get_submodule("layer")) is type(model.layer), "the layer is not of its old type")
        expect(list(dense.state_dict()) == list(model.state_dict()), "the names of the tensors differ")
        x = at.inputs(torch.float32)
        expect_close("the output", dense(x), small(x), 1e-5)


def check_exported(format: Format, at: Geometry) -> None:
    """Raise LawBroken unless ``torch.export`` gives a program with the same output."""
    model = Host(at).eval()
    with law(13, format.name(), at), torch.no_grad():
        small = apply(model, planned(format, at, model))
        x = at.inputs(torch.float32)
        program: Any = torch.export.export(small, (x,))
        expect_close("the output", program.module()(x), small(x), 1e-6)


MODEL_LAWS: dict[str, Callable[[Format, Geometry], None]] = {
    "save_load": check_save_load,
    "untouched": check_untouched,
    "densified": check_densified,
    "exported": check_exported,
}


def check_model_laws(format: Format, name: str) -> None:
    """Raise LawBroken unless models with layers of a format obey one of ``MODEL_LAWS``: one layer of each kind."""
    kinds: dict[tuple[str, int], Geometry] = {}
    for at in served(format):
        kinds.setdefault((at.spec.kind, at.spec.axes), at)
    for at in kinds.values():
        MODEL_LAWS[name](format, at)


def small_network() -> nn.Module:
    """Return a network with two convolutions and two linear layers to plan for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(6, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 20, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20 * 9, 24),
            nn.ReLU(),
            nn.Linear(24, 12),
        ).eval()


def check_replanned(rule: RankRule) -> None:
    """Raise LawBroken unless a factorized model can be compressed further, and stays as it is where that is enough."""
    x = torch.zeros(1, 6, 6, 6)
    recipe = Recipe(rule=aiming(rule).to_dict(), formats=FORMATS.names())
    with law(12, rule), torch.no_grad():
        model = small_network()
        try:
            first = plan(model, profile(model, x), recipe.replace(budget=Budget(macs=0.6)))
        except BudgetError:
            return  # the rule cannot aim at a budget
        small = apply(model, first)
        _expect_cost(profile(small, x), first)
        table = tabulate(small, profile(small, x), recipe)
        same = choose(table, recipe.replace(budget=Budget(max_macs=first.after.macs)))
        expect(not same.factorized, f"layers are planned again: {[layer.path for layer in same.factorized]}")
        expect(same.after == same.before == first.after, "the costs differ though nothing happens")
        further = choose(table, recipe.replace(budget=Budget(max_macs=0.7 * first.after.macs)))
        expect(bool(further.factorized), "nothing more is compressed")
        smaller = apply(small, further)
        _expect_cost(profile(smaller, x), further)
        expect(further.after.macs <= 0.7 * first.after.macs, "the second budget is not met")
        expect(smaller(x).shape == model(x).shape, "the shape of the output changed")


def _expect_cost(seen: Profile, promised: Plan) -> None:
    expect(seen.cost == promised.after, f"the plan promised {promised.after}, the model costs {seen.cost}")
