"""Heads of attention made narrower: exact at full size, and what the factorized pivot says below it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tenfold.decompositions import decompose
from tenfold.layers import FactorizedLayer, PaddedHeads, UnpaddedHeads, dense_weight, spec_of
from tenfold.profiling import profile
from tenfold.records import Cost, UnitPlan
from tenfold.surgery import find, joined_projections, put, recognise_units, separate_
from tenfold.surgery.model_outputs import outputs_of
from tenfold.surgery.narrow import absorbed, narrow_
from tenfold.units import UNITS
from tenfold.units.one_head_size import native, partners
from tests.units.transformers_of_each_kind import BUILDERS, CAUSAL, TURNED, built

KINDS = ("value_output", "query_key")


def opened(name):
    """Return a model with its units of attention."""
    model, inputs = built(name)
    separate_(model, joined_projections(model))
    units = recognise_units(model, profile(model, inputs), inputs, KINDS)
    return model, inputs, [unit for unit in units if unit.keep_reason is None], [u for u in units if u.keep_reason]


def factorized(model, unit, size):
    """Return the pivot of a unit as its algorithm factorizes it, without data."""
    pivot = find(model, unit.pivot)
    fit = UNITS.get(unit.kind)().pivot_fit(unit, size)
    weight, spec = dense_weight(pivot).detach(), spec_of(pivot)[0]
    value = decompose(weight, fit.format, fit.rank, fit.algorithm, spec=spec).value
    return FactorizedLayer.of(value, getattr(pivot, "bias", None))


def halves(unit):
    return {"head_size": unit.full["head_size"] // 2}


def narrow(model, units, sized):
    """Return a copy with factorized pivots, and one in which their feeders have absorbed the inner factors."""
    wide = put(copy.deepcopy(model), {u.pivot: factorized(model, u, sized(u)) for u in units})
    small = copy.deepcopy(wide)
    for unit in units:
        small = absorbed(small, unit, sized(unit), find(model, unit.pivot))
    return wide, small


def furthest(first, second):
    assert [t.shape for t in first] == [t.shape for t in second]
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_every_attention_is_found(name):
    _, _, units, kept = opened(name)
    found = [unit.kind for unit in units]
    assert found.count("value_output") > 0
    assert found.count("value_output") == (found.count("query_key") or len(kept))
    assert bool(kept) == (name in TURNED)
    for unit in kept:
        assert unit.kind == "query_key"
        assert ("rotary" if name == "llama" else "normalised") in unit.keep_reason


@pytest.mark.parametrize("name", BUILDERS)
def test_full_heads_reproduce_the_network(name):
    model, inputs, units, _ = opened(name)
    _, small = narrow(model, units, lambda unit: unit.full)
    assert furthest(outputs_of(small, inputs), outputs_of(model, inputs)) <= 1e-5


@pytest.mark.parametrize("name", BUILDERS)
def test_narrow_heads_do_what_their_pivots_say(name):
    model, inputs, units, _ = opened(name)
    wide, small = narrow(model, units, halves)
    assert furthest(outputs_of(small, inputs), outputs_of(wide, inputs)) <= 1e-5
    assert furthest(outputs_of(small, inputs), outputs_of(model, inputs)) > 1e-3
    for unit in units:
        for path in unit.members:
            assert dense_weight(find(small, path)).numel() * 2 == dense_weight(find(model, path)).numel()


@pytest.mark.parametrize("name", CAUSAL)
def test_texts_are_generated_alike(name):
    model, inputs, units, _ = opened(name)
    wide, small = narrow(model, units, halves)
    texts = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (wide, small)]
    assert torch.equal(*texts)
    assert texts[0].shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", BUILDERS)
def test_the_structure_alone_takes_the_weights(name):
    model, inputs, units, _ = opened(name)
    _, small = narrow(model, units, halves)
    plans = [UnitPlan(**vars(u), size=halves(u), reason="", before=Cost(), after=Cost()) for u in units]
    empty = narrow_(copy.deepcopy(model), plans)
    empty.load_state_dict(small.state_dict())
    assert furthest(outputs_of(empty, inputs), outputs_of(small, inputs)) == 0


def one_size(units):
    return [native(unit, together=True) for pair in partners(units) for unit in pair]


@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in (*TURNED, "encoder", "attention")])
def test_heads_of_one_size_make_the_module_itself_narrower(name):
    model, inputs, units, _ = opened(name)
    resized = one_size(units)
    assert len(resized) == len(units)
    wide, small = narrow(model, resized, halves)
    assert furthest(outputs_of(small, inputs), outputs_of(wide, inputs)) <= 1e-5
    assert not [m for m in small.modules() if isinstance(m, PaddedHeads | UnpaddedHeads)]
    for unit in resized:
        before, after = (m.get_submodule(unit.settings["attention"]) for m in (model, small))
        for attribute in unit.settings["resizes"]:
            assert getattr(after, attribute) * 2 == getattr(before, attribute)
    if name == "gpt2":
        with torch.no_grad():
            caches = [m(**inputs, use_cache=True).past_key_values.layers for m in (model, small)]
        shapes = [[(c.keys.shape[-1], c.values.shape[-1]) for c in layers] for layers in caches]
        assert shapes == [[(8, 8)] * 2, [(4, 4)] * 2]
        texts = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (wide, small)]
        assert torch.equal(*texts)


def test_a_forward_that_scales_by_the_size_of_its_heads_is_padded():
    """The scale of the scores is that of the first size, which this one does not remember."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.head_dim = 8
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            parts = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
            weights = (q @ k.mT * self.head_dim**-0.5).softmax(-1)
            return self.o_proj((weights @ v).transpose(1, 2).flatten(2))

    model, x = Own().eval(), torch.randn(2, 5, 32)
    units = recognise_units(model, profile(model, x), x, KINDS)
    assert [unit.keep_reason for unit in units] == [None, None]
    assert one_size(units) == []
    wide, small = narrow(model, units, halves)
    assert furthest(outputs_of(small, x), outputs_of(wide, x)) <= 1e-5


def test_costs_are_those_of_the_narrow_network():
    model, inputs, units, _ = opened("bert")
    before = profile(model, inputs)
    small = profile(narrow(model, units, halves)[1], inputs)
    for unit in units:
        costs = UNITS.get(unit.kind)().costs(unit, halves(unit), before)
        for path in unit.members:
            layer = small.layer(path)
            assert (layer.params, layer.macs) == (costs[path].params, costs[path].macs)


def test_heads_that_nobody_counts_are_kept():
    model, inputs = built("bert")
    for name, module in model.named_modules():
        if name.endswith("attention.self"):
            module.config = None
            module.num_attention_heads = module.attention_head_size = None
            module.forward = lambda x, *_, own=module, **__: (own.query(x) + own.key(x) + own.value(x), None)
    units = recognise_units(model, profile(model, inputs), inputs, KINDS)
    assert {unit.keep_reason for unit in units} == {
        "no module around it tells a number of heads that divides the widths of its projections"
    }


def test_padded_heads_are_filled_with_zeros():
    narrow_layer = nn.Linear(5, 2 * 3)
    x = torch.randn(4, 5)
    padded = PaddedHeads.of(narrow_layer, heads=2, full=4)
    made = padded(x).view(4, 2, 4)
    assert torch.equal(made[..., :3].flatten(1), narrow_layer(x))
    assert not made[..., 3].any()
    back = UnpaddedHeads.of(nn.Linear(6, 5), heads=2, full=4)
    assert torch.equal(back(padded(x)), nn.functional.linear(narrow_layer(x), back.weight, back.bias))
    assert "heads=2 of 3 in 4" in repr(padded)
