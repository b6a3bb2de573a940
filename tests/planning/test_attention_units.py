"""Heads of attention from data to a folder: plans, costs, fits, loading, generation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tenfold
from tenfold.errors import PlanError
from tenfold.layers import JoinedProjections, PaddedHeads, SeparateAttention
from tenfold.planning import decide, tabulate
from tenfold.planning.equal_heads import with_one_head_size
from tenfold.planning.plan import recost
from tenfold.profiling import profile
from tenfold.records import Plan
from tenfold.surgery import apply
from tests.units.transformers_of_each_kind import built

QUIET = tenfold.Runtime(measure=False)
HEADS = {"budget": "params=0.85", "units": ["value_output", "query_key"], "keep": "re:.*(mlp|lm_head|wte|wpe|linear).*"}


def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 100, (8, 7), generator=generator)} for _ in range(8)]


@pytest.fixture(scope="module")
def gpt2():
    return built("gpt2")


@pytest.fixture(scope="module")
def small(gpt2):
    model, inputs = gpt2
    return tenfold.compress(model, inputs, HEADS | {"budget": "params=0.93"}, data=batches(), runtime=QUIET)


def test_joined_projections_are_narrowed_one_by_one(gpt2, small, tmp_path):
    _, inputs = gpt2
    plan = small.plan
    assert plan.narrowed
    assert set(plan.unrolled) <= {"transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}
    measured = profile(small.model, inputs)
    assert (measured.params, measured.macs) == (plan.after.params, plan.after.macs)
    assert measured.params <= 0.93 * plan.before.params
    assert any(isinstance(module, JoinedProjections) for module in small.model.modules())
    small.save(tmp_path / "small")
    again, _ = tenfold.load(built("gpt2")[0], tmp_path / "small")
    texts = [m.generate(**inputs, max_new_tokens=5, do_sample=False) for m in (small.model, again)]
    assert torch.equal(*texts)


def test_one_size_by_hand_makes_the_attention_narrower(gpt2, small):
    """Where a person gives both units of an attention one size, keys and values in the cache get it too."""
    model, inputs = gpt2
    opened = tenfold.surgery.separate(model, small.plan.unrolled)
    known = profile(opened, inputs)
    plan = with_one_head_size(recost(by_hand(small.plan, {"query_key": 4, "value_output": 4}), known), known)
    assert all(unit.settings["native"] for unit in plan.units)
    narrow = apply(model, plan)
    assert not any(isinstance(module, PaddedHeads) for module in narrow.modules())
    assert profile(narrow, inputs).macs == plan.after.macs
    with torch.no_grad():
        cache = narrow(**inputs, use_cache=True).past_key_values.layers
    assert {(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache} == {(4, 4)}
    other = with_one_head_size(recost(by_hand(plan, {"query_key": 4, "value_output": 6}), known), known)
    assert not any(unit.settings["native"] for unit in other.units)
    assert profile(apply(model, other), inputs).macs == other.after.macs
    with pytest.raises(PlanError, match="other sizes than when the plan was costed"):
        apply(model, by_hand(plan, {"query_key": 4, "value_output": 6}))


def by_hand(plan, sizes):
    """Return a plan with sizes for all units of a kind, as a person would write them into its file."""
    layers = {layer.path: layer for layer in plan.layers}
    units = []
    for unit in plan.units:
        size = sizes[unit.kind]
        heads = unit.settings["heads" if unit.kind == "value_output" else "groups"]
        name = "head_inputs" if unit.kind == "value_output" else "head_outputs"
        change = {"action": "factorize", "format": "low_rank", "rank": {"rank": heads * size}}
        pivot = layers[unit.pivot].replace(**change, algorithm={"name": name, "heads": heads})
        layers[unit.pivot] = pivot
        for path in unit.feeders:
            layers[path] = layers[path].replace(action="keep", format=None, rank=None, algorithm=None)
        units.append(unit.replace(size={"head_size": size}))
    return Plan(**{**vars(plan), "layers": tuple(layers.values()), "units": tuple(units)})


def test_attention_of_torch_runs_on_heads_of_any_size(tmp_path):
    model, inputs = built("encoder")
    data = [torch.randn(8, 5, 32) for _ in range(8)]
    small = tenfold.compress(model, inputs, HEADS, data=data, runtime=QUIET)
    plan = small.plan
    assert plan.narrowed
    assert all(unit.settings["native"] for unit in plan.units)
    assert profile(small.model, inputs).macs == plan.after.macs
    for unit in plan.narrowed:
        for path in unit.members:
            assert type(small.model.get_submodule(path)) is nn.Linear
    assert isinstance(small.model.layers[0].self_attn, SeparateAttention | nn.MultiheadAttention)
    small.save(tmp_path / "small")
    again, _ = tenfold.load(built("encoder")[0], tmp_path / "small")
    assert torch.equal(again.eval()(inputs), small.model(inputs))


def test_projections_stay_joined_without_data_and_where_none_is_narrowed():
    model, inputs = built("gpt2")
    for recipe, data in (({"budget": "params=0.9"}, None), (HEADS | {"keep": "re:.*attn.*"}, batches())):
        made = tenfold.compress(model, inputs, recipe, data=data, runtime=QUIET)
        assert made.plan.unrolled == {}
        assert [unit for unit in made.plan.units if unit.size] == []


def test_keys_are_not_narrowed_where_nothing_says_what_they_are_for():
    model, inputs = built("bert")
    data = [{k: v.repeat(4, 1) for k, v in inputs.items()} for _ in range(4)]
    made = decide(model, inputs, tenfold.Recipe.of(HEADS | {"keep": ()}), data=data, runtime=QUIET)
    blind = {path: known.replace(output_gram=None, held_out=None) for path, known in made.moments.items()}
    table = tabulate(made.source, made.profile, made.recipe, moments=blind)
    for own in table.units:
        assert (own.options is None) == (own.unit.kind == "query_key")
        assert own.unit.kind == "value_output" or "no gradients" in own.unit.keep_reason
