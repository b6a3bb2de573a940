"""Carrying out plans on awkward models: shared, tied, nested, attended, and models that read ``.weight``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.surgery import apply, apply_, densify, densify_, find, fits_of, paths_of, put


def planned(model, x, share=0.5, **options):
    return plan(model, profile(model, x), {"rule": {"name": "ratio", "share": share}, "keep_ends": False, **options})


def forced(made, path, rank, format="low_rank"):
    """Return the plan with one layer factorized whatever the planner thinks of it."""
    changed = made.layer(path).replace(action="factorize", format=format, rank=rank, reason="forced")
    return made.replace(layers=tuple(changed if layer.path == path else layer for layer in made.layers))


def everything(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_the_result_computes_what_its_dense_form_does_and_knows_its_fits():
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12)).eval()
    x = torch.randn(2, 6, 4, 4)
    made = planned(model, x)
    small = apply(model, made)
    assert {p: type(m) for p, m in small.named_children() if p in ("0", "3")} == dict.fromkeys("03", FactorizedLayer)
    dense = densify(small)
    torch.testing.assert_close(dense(x), small(x), rtol=1e-4, atol=1e-5)
    assert [type(m) for m in dense] == [type(m) for m in model]
    for path, fit in fits_of(small).items():
        before, after = find(model, path).weight, find(dense, path).weight
        assert fit.rel_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert 0 < fit.rel_error < 1
    assert torch.equal(small[3].bias, model[3].bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_grads_modes_and_hooks_survive_both_ways(dtype):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).to(dtype)
    model[0].bias.requires_grad = False
    model[2].weight.requires_grad = False
    model[0].eval()
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    made = planned(model, torch.randn(2, 16, dtype=dtype))
    small = apply(model, made)
    for changed in (small, densify(small)):
        assert all(p.dtype == dtype for p in changed.parameters())
        assert [m.training for m in (changed, changed[0], changed[2])] == [True, False, True]
        grads = {n: p.requires_grad for n, p in changed.named_parameters()}
        assert all(g == (("0." in n[:2]) == n.endswith("weight")) for n, g in grads.items())
        calls.clear()
        changed(torch.randn(2, 16, dtype=dtype))
        assert calls == [1]


def test_the_result_trains_alone():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before = everything(model)
    small = apply(model, planned(model, torch.randn(2, 16)))
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    twin = copy.deepcopy(small)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(small.parameters()).abs().sum() > 0


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.block = nn.ModuleDict({"again": self.a, "other": nn.Linear(16, 16)})

    def forward(self, x):
        return self.block["other"](self.block["again"](self.a(x)))


def test_a_module_at_two_paths_is_replaced_once_at_both():
    model, x = Shared(), torch.randn(3, 16)
    made = planned(model, x)
    assert made.layer("a").aliases == ("block.again",)
    assert made.layer("a").before.macs == 2 * 3 * 256
    small = apply(model, made)
    assert isinstance(small.a, FactorizedLayer)
    assert small.a is small.block["again"]
    assert sorted(paths_of(small, small.a)) == ["a", "block.again"]
    assert profile(small, x).cost == made.after
    back = densify_(small)
    assert back.a is back.block["again"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def test_tied_parameters_are_kept_and_cannot_be_forced():
    model, x = Tied(), torch.arange(5)
    made = planned(model, x)
    assert [layer.action for layer in made.layers] == ["keep", "keep"]
    assert "shares a parameter with head" in made.layer("embed").reason
    with pytest.raises(PlanError, match=r"layer 'head' shares a parameter with embed: .*Keep it"):
        apply(model, forced(made, "head", {"rank": 2}))
    assert apply(model, made).head.weight is not None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_a_transformer_layer_runs_on_factors(training, fast):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 16)
    made = planned(layer, x)
    assert "never called" in made.layer("self_attn.out_proj").reason
    made = forced(made, "self_attn.out_proj", {"rank": 4})
    assert {layer.path for layer in made.factorized} == {"linear1", "linear2", "self_attn.out_proj"}
    small = apply(layer, made)
    dense = densify(small)
    assert type(dense.linear1) is nn.Linear
    with torch.inference_mode() if fast else torch.enable_grad():
        torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
        assert (small(x) - layer(x)).abs().max() > 1e-3
    assert layer.activation_relu_or_gelu == 1  # the input may still take its fused path


def test_attention_reads_the_weight_and_bias_of_its_projection():
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    wrapped = nn.ModuleDict({"attention": attention})
    x = torch.randn(2, 5, 16)
    small = apply(wrapped, forced(_whole_plan(wrapped, x), "attention.out_proj", {"rank": 4}))
    assert isinstance(small["attention"].out_proj, FactorizedLayer)
    for need in (True, False):
        found = small["attention"](x, x, x, need_weights=need)[0]
        wanted = densify(small)["attention"](x, x, x, need_weights=need)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _whole_plan(model, x):
    class Runs(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model["attention"]

        def forward(self, x):
            return self.attention(x, x, x)[0]

    runs = Runs()
    return plan(runs, profile(runs, x), {"rule": "fixed"})


def test_an_error_leaves_the_model_as_it_was():
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(2, 16)
    made = planned(model, x)
    before, modules = everything(model), list(model.modules())
    broken = [
        (forced(made, "2", {"rank": 99}), r"layer '2': low_rank rank rank=99 is outside 1\.\.16"),
        (forced(made, "2", {"rank": 2}, "no_format"), "layer '2': unknown format 'no_format'"),
        (forced(made, "2", {"out": 2, "in": 2}, "tucker2"), "layer '2'.*low_rank serves this layer"),
        (made.replace(layers=(*made.layers, made.layers[0].replace(path="9"))), "the model has no layer '9'"),
    ]
    for wrong, message in broken:
        with pytest.raises(PlanError, match=message):
            apply_(model, wrong)
        assert list(model.modules()) == modules
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match="layer '2': the weight has 1 NaN"):
        apply_(model, made)
    assert isinstance(model[0], nn.Linear)


def test_what_cannot_be_factorized_is_refused_though_the_plan_says_so():
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    made = planned(model, torch.randn(2, 16))
    with pytest.raises(PlanError, match="layer '1' cannot be factorized: BatchNorm1d"):
        apply(model, forced(made, "1", {"rank": 2}))


def test_a_single_layer_can_be_the_whole_model():
    model, x = nn.Linear(16, 16), torch.randn(2, 16)
    small = apply(model, planned(model, x))
    assert isinstance(small, FactorizedLayer)
    assert isinstance(densify(small), nn.Linear)


def test_progress_counts_layers():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)], nn.Linear(16, 20))
    seen = []
    apply(model, planned(model, torch.randn(2, 16)), progress=lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4)


def test_the_same_plan_gives_the_same_bytes():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 16))
    made = planned(model, torch.randn(1, 8, 4, 4))
    one, two = apply(model, made).state_dict(), apply(model, made).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_modules_by_path():
    model = Shared()
    assert find(model, "block.other") is model.block["other"]
    with pytest.raises(PlanError, match=r"the model has no layer 'block.othr'\. Did you mean block\.other"):
        find(model, "block.othr")
    new = nn.Identity()
    assert put(model, {"a": new}) is model
    assert model.a is model.block["again"] is new
