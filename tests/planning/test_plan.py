"""Plans: a reason for every layer, costs that come true, and files that people edit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tenfold.errors import BudgetError, PlanError, TenfoldError, UnknownNameError
from tenfold.planning import plan, recost
from tenfold.profiling import profile
from tenfold.records import Budget, Plan, Recipe
from tenfold.surgery import apply


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Zoo(nn.Module):
    """One layer of every kind that is kept, and two that are not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.body = nn.Conv2d(4, 32, 3, padding=1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.BatchNorm2d(32)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(32 * 16, 64)
        self.own = OwnForward(64, 64)
        self.ortho = parametrizations.orthogonal(nn.Linear(64, 64))
        self.nans = nn.Linear(64, 64)
        self.asked = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.unused = nn.Linear(64, 64)
        self.tie_a = nn.Linear(64, 64)
        self.tie_b = nn.Linear(64, 64)
        self.tie_b.weight = self.tie_a.weight
        self.thin = nn.Linear(64, 1)
        self.head = nn.Linear(1, 3)
        with torch.no_grad():
            self.nans.weight[3, 4] = float("nan")

    def forward(self, x):
        x = self.fc(self.flat(self.norm(self.deep(self.body(self.stem(x))))))
        x = self.asked(self.nans(self.ortho(self.own(x))))
        x = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return self.head(self.thin(self.tie_b(self.tie_a(x))))


X = torch.randn(2, 2, 4, 4)
HALF = {"rule": {"name": "ratio", "share": 0.5}, "keep_ends": False}


@pytest.fixture
def zoo():
    return Zoo().eval()


def planned(model, x=X, rule="ratio", settings=None, formats=("tucker2", "low_rank"), scores=None, **recipe):
    chosen = {"name": rule, **({"share": 0.5} if settings is None else settings)}
    return plan(model, profile(model, x), {"rule": chosen, "formats": formats, **recipe}, scores=scores)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("stem", "the first layer is 0.1% of the cost"),
        ("head", "the last layer is 0.0% of the cost"),
        ("deep", "depthwise convolution has no channels to drop; the weight has rank 1 already"),
        ("norm", "BatchNorm2d is not a layer that tenfold factorizes"),
        ("own", "OwnForward is a Linear with a forward of its own"),
        ("ortho", "parametrized: remove the parametrization first"),
        ("nans", "the weight has NaN or infinite entries: repair the model first"),
        ("asked", "kept as asked by 'ask*'"),
        ("attention.out_proj", "never called by this forward (its weight may be read by its parent)"),
        ("unused", "never called by this forward"),
        ("tie_a", "shares a parameter with tie_b"),
        ("tie_b", "shares a parameter with tie_a"),
        ("thin", "rank 1 already: there is nothing to drop"),
    ],
)
def test_every_kept_layer_has_its_reason(zoo, path, reason):
    layer = planned(zoo, keep=["ask*"]).layer(path)
    assert layer.action == "keep"
    assert reason in layer.reason
    assert layer.before == layer.after


def test_a_depthwise_layer_is_served_by_the_spatial_format(zoo):
    assert planned(zoo, formats=("tucker2", "low_rank", "spatial")).layer("deep").format == "spatial"


def test_every_layer_is_in_the_plan_once(zoo):
    made = planned(zoo)
    paths = [layer.path for layer in made.layers]
    assert len(paths) == len(set(paths))
    owners = {name.rpartition(".")[0] for name, _ in zoo.named_parameters()}
    owners = {"ortho" if o.startswith("ortho") else o for o in owners}
    assert owners <= set(paths)
    assert "flat" not in paths  # nothing to say of what has neither weights nor MACs
    assert {layer.path for layer in made.factorized} == {"body", "fc", "asked"}
    assert all(layer.reason for layer in made.layers)


def test_costs_come_true(zoo):
    made = planned(zoo)
    assert made.before == profile(zoo, X).cost
    assert made.after == profile(apply(zoo, made), X).cost
    assert made.after.below(made.before)


def test_a_budget_of_the_whole_model_is_met(zoo):
    made = planned(zoo, settings={}, budget={"params": 0.6})
    assert 0.5 * made.before.params < made.after.params <= 0.6 * made.before.params
    assert made.recipe.budget == Budget(params=0.6)
    absolute = planned(zoo, settings={}, budget={"max_params": 0.6 * made.before.params})
    assert [layer.rank for layer in absolute.layers] == [layer.rank for layer in made.layers]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"macs": 0.001},
            "lowest that the rule ratio can reach is macs=.*What stays of the MACs: .*keep_ends=False",
        ),
        ({"flops": 0.5}, "a budget does not name flops. Known: params, macs"),
        ({"macs": 4e6}, "write max_macs=4e\\+06"),
        ({"macs": -1}, "must be a positive number"),
        ({"macs": float("nan")}, "must be a positive number"),
    ],
)
def test_impossible_budgets_say_why(zoo, budget, message):
    with pytest.raises(BudgetError, match=message):
        planned(zoo, settings={}, budget=budget)


def test_names_that_mean_nothing_are_errors_with_near_ones(zoo):
    with pytest.raises(UnknownNameError, match=r"no layer matches 'boody'\. Did you mean body"):
        planned(zoo, keep=["boody"])
    with pytest.raises(UnknownNameError, match=r"unknown format 'tuker2'\. Did you mean tucker2"):
        planned(zoo, formats=["tuker2"])


def test_the_first_format_that_serves_a_layer_is_preferred(zoo):
    assert planned(zoo).layer("body").format == "tucker2"
    assert planned(zoo, formats=["low_rank", "tucker2"]).layer("body").format == "low_rank"
    assert planned(zoo, formats=["spatial"]).layer("body").format == "spatial"
    assert planned(zoo, formats=["spatial"]).layer("fc").action == "keep"


def test_ends_are_kept_by_default_unless_asked_otherwise(zoo):
    assert planned(zoo, keep_ends=False).layer("stem").reason != planned(zoo).layer("stem").reason
    fixed = planned(zoo, rule="fixed", settings={"ranks": {"stem": 1}})
    assert fixed.layer("stem").action == "factorize"


def test_the_algorithm_is_part_of_the_plan(zoo):
    made = planned(zoo, algorithms={"tucker2": {"name": "hosvd", "seed": 7}}, seed=3)
    assert made.layer("body").algorithm == {"name": "hosvd", "dtype": "auto", "seed": 7}
    assert made.layer("fc").algorithm["seed"] == 3
    assert made.recipe.rule["name"] == "ratio"


def test_a_plan_of_another_model_is_an_error(zoo):
    with pytest.raises(PlanError, match="has no layer"):
        plan(nn.Sequential(nn.Linear(2, 2)), profile(zoo, X), HALF)


# ---- files


def test_yaml_is_commented_and_comes_back(zoo, tmp_path):
    made = planned(zoo)
    made.save(tmp_path / "deep" / "plan.yaml")
    text = (tmp_path / "deep" / "plan.yaml").read_text()
    assert text.startswith("# A tenfold plan")
    assert Plan.load(tmp_path / "deep" / "plan.yaml") == made
    (tmp_path / "plan.json").write_text(made.to_json())
    assert Plan.load(tmp_path / "plan.json") == made
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan.yaml"]


def test_a_plan_edited_by_hand_is_carried_out(zoo, tmp_path):
    made = planned(zoo)
    rank = made.layer("body").rank
    text = made.to_yaml().replace(f"{{out: {rank['out']}, in: {rank['in']}}}", "{out: 3, in: 2}")
    assert text != made.to_yaml()
    edited = Plan.from_text(text)
    assert edited.layer("body").rank == {"out": 3, "in": 2}
    small = apply(zoo, edited)
    assert small.body.rank == {"out": 3, "in": 2}
    again = recost(edited, profile(zoo, X))
    assert again.after == profile(small, X).cost
    assert again.after != made.after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rank: {out", "rnak: {out"), "rnak: Extra inputs are not permitted"),
        (("action: factorize", "action: shrink"), "action: Input should be 'factorize' or 'keep'"),
        (("version: 2", "version: 99"), "version 99, this tenfold reads 2: upgrade tenfold"),
        (("version: 2", "version: 1"), "version 1, this tenfold reads 2: make it again with this version, or read it"),
        (("path: stem", "path: body"), "layers appear twice: body"),
        (("layers:", "layers: ]["), "is not valid YAML"),
        (("rank: {out: ", "rank: {out: -"), "greater than 0"),
    ],
)
def test_broken_files_are_refused_in_one_line(zoo, tmp_path, change, message):
    text = planned(zoo).to_yaml()
    assert change[0] in text
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_impossible_edit(zoo, tmp_path):
    with pytest.raises(PlanError, match="there is no plan at"):
        Plan.load(tmp_path / "no.yaml")
    made = planned(zoo)
    layer = made.layer("body").replace(rank={"out": 99, "in": 1})
    wrong = made.replace(layers=tuple(layer if old.path == "body" else old for old in made.layers))
    with pytest.raises(PlanError, match=r"layer 'body'.*out=99 is outside 1\.\.32"):
        recost(wrong, profile(zoo, X))


def edit(made: Plan, path: str, **changes: object) -> Plan:
    return made.replace(layers=tuple(p.replace(**changes) if p.path == path else p for p in made.layers))


def test_what_was_said_of_a_layer_goes_when_it_is_edited(zoo):
    cost = profile(zoo, X)
    made = edit(planned(zoo), "body", distortion=0.1, rel_error=0.2, latency_before_ms=1.0, latency_after_ms=0.5)
    assert recost(made, cost) == made
    layer = recost(edit(made, "body", rank={"out": 3, "in": 2}), cost).layer("body")
    assert (layer.distortion, layer.rel_error, layer.latency_before_ms, layer.latency_after_ms) == (None,) * 4
    assert "edited" in layer.reason
    kept = recost(edit(made, "body", action="keep"), cost).layer("body")
    assert (kept.format, kept.rank, kept.algorithm, kept.after) == (None, None, None, kept.before)
    assert "edited" in kept.reason


def test_one_name_alone_is_a_name_and_no_row_of_letters():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(13)))
    cost = profile(model, torch.zeros(1, 16))
    found = plan(model, cost, HALF | {"formats": "low_rank", "keep": "12"})
    assert [layer.path for layer in found.layers if layer.action == "keep"] == ["12"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_without_values_or_without_modules_of_their_own_are_refused():
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    x = torch.randn(2, 32)
    with pytest.raises(PlanError, match="layer '0' is on the meta device and has no values"):
        plan(empty, profile(empty, x.to("meta")), HALF)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    with pytest.raises(PlanError, match="scripted or traced model"):
        plan(scripted, profile(scripted, x), HALF)


def test_the_plan_of_another_model_is_refused():
    def pair(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))

    x = torch.randn(1, 16, 8, 8)
    made = planned(pair(16), x, budget={"macs": 0.5}, settings={})
    with pytest.raises(PlanError, match=r"16→16.*in the plan and.*16→24.*another model"):
        recost(made, profile(pair(24), x))


def test_a_factorized_model_is_planned_further_in_its_own_format():
    model, x = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)), torch.randn(1, 16, 6, 6)
    first = planned(model, x, settings={}, budget={"macs": 0.5})
    small = apply(model, first)
    cost = profile(small, x)
    assert cost.cost == first.after
    same = planned(small, x, settings={}, budget={"max_macs": first.after.macs})
    assert not same.factorized
    assert same.layer("0").format == "tucker2"
    assert same.layer("0").rank == first.layer("0").rank
    further = planned(small, x, settings={}, budget={"macs": 0.5}, formats=["low_rank", "tucker2"])
    assert {layer.format for layer in further.factorized} == {"tucker2"}
    smaller = apply(small, further)
    assert profile(smaller, x).macs <= 0.5 * first.after.macs
    for layer in further.factorized:
        assert all(v <= first.layer(layer.path).rank[k] for k, v in layer.rank.items())


def test_scores_decide_for_the_global_rule(zoo):
    class Scores:
        def distortion_at(self, path, format):
            del format
            return lambda ranks: np.full(len(ranks), 0.0 if path == "body" else 1.0)

    made = planned(zoo, rule="global", settings={}, budget={"macs": 0.9}, scores=Scores())
    assert {layer.path: layer.distortion for layer in made.factorized} == {"body": 0.0, "fc": 1.0}


def test_a_rule_by_name_and_a_budget_as_text_will_do(zoo):
    cost = profile(zoo, X)
    assert plan(zoo, cost, {"rule": "ratio", "budget": "params=0.6"}) == plan(
        zoo, cost, Recipe(rule={"name": "ratio"}, budget=Budget(params=0.6))
    )
    assert plan(zoo, cost, "params=0.6").recipe == Recipe(budget=Budget(params=0.6))
    with pytest.raises(UnknownNameError, match=r"unknown rank rule 'ratoi'\. Did you mean ratio"):
        plan(zoo, cost, {"rule": "ratoi"})
    with pytest.raises(TenfoldError, match="the rule ratio has the settings share, of, not shares"):
        plan(zoo, cost, {"rule": {"name": "ratio", "shares": 0.4}})


def test_an_embedding_has_no_macs_and_is_judged_by_its_parameters():
    net = nn.Sequential(nn.Embedding(500, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    cost = profile(net, torch.zeros(1, 4, dtype=torch.long))
    for rule, options in (("fixed", {"ranks": {"0": 4}}), ("ratio", {"share": 0.5, "of": "params"})):
        made = plan(net, cost, {"rule": {"name": rule, **options}, "keep_ends": False})
        assert made.layer("0").format == "low_rank"
        assert made.after.params < made.before.params
    made = plan(net, cost, {"budget": {"params": 0.4}, "keep_ends": False})
    assert made.layer("0").action == "factorize"
    assert made.after.params <= 0.4 * made.before.params
    assert profile(apply(net, made), torch.zeros(1, 4, dtype=torch.long)).cost == made.after
    assert plan(net, cost, HALF).layer("0").action == "keep"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rank: {out: 12, in: 8}", "rank: {out: 8, in: 12}"),  # 24 → 24 channels: as many parameters and MACs as before
        ("algorithm: {name: hooi, ", "algorithm: {name: hosvd, "),
        ("algorithm: {name: hooi, dtype: auto, seed: 0", "algorithm: {name: hooi, dtype: auto, seed: 1"),
    ],
)
def test_an_edit_that_costs_the_same_is_noticed(tmp_path, old, new):
    model, x = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1)), torch.randn(1, 24, 6, 6)
    cost = profile(model, x)
    made = planned(model, x, rule="fixed", settings={"ranks": {"0": {"out": 12, "in": 8}}})
    made = edit(made, "0", distortion=0.1, rel_error=0.2, latency_after_ms=0.5)
    (tmp_path / "plan.yaml").write_text(made.to_yaml().replace(old, new, 1))
    read = Plan.load(tmp_path / "plan.yaml")
    assert read != made
    again = recost(read, cost)
    (layer,) = again.layers
    assert again.after == made.after
    assert (layer.distortion, layer.rel_error, layer.latency_after_ms) == (None,) * 3
    assert layer.reason == "edited after it was planned"
    told = edit(again, "0", rel_error=0.3)
    assert recost(told, cost) == told  # what is said of the edited layer stays


def test_a_fingerprint_left_out_is_that_of_the_decision(zoo):
    made = planned(zoo)
    lines = made.to_yaml().splitlines()
    old = Plan.from_text("\n".join(line for line in lines if "fingerprint:" not in line))
    assert old == made == recost(old, profile(zoo, X))
