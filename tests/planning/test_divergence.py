"""Distortions scaled to measured divergences: as an independent computation has them, and where they lead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tenfold import Runtime, choose, compress, tabulate
from tenfold.calibration import calibrate
from tenfold.decompositions import decompose
from tenfold.errors import DataError, TenfoldError
from tenfold.planning import decide
from tenfold.planning.divergence import BY_DIVERGENCE, by_divergence, mildest
from tenfold.planning.unit_kinds import kinds_of
from tenfold.profiling import profile
from tenfold.records import OptionTable, Recipe
from tenfold.surgery import recognise_units


class Branches(nn.Module):
    """Two layers side by side, of which the outputs of one hardly count."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.loud(x).tanh() + 0.02 * self.quiet(x).tanh())
        return scores


def branches() -> tuple[Branches, list[Tensor]]:
    torch.manual_seed(0)
    model = Branches().eval()
    return model, [torch.randn(40, 32) for _ in range(10)]


def recipe(metric: str, **changes: object) -> Recipe:
    wanted = {"budget": "params=0.6", "formats": "low_rank", "calibration": {"metric": metric}}
    return Recipe.of({**wanted, **changes})


def tables() -> tuple[Branches, list[Tensor], OptionTable, OptionTable]:
    model, batches = branches()
    cost, seen = profile(model, batches[0]), batches[:5]
    moments = calibrate(model, seen)
    wanted = recipe("divergence", keep=["head"])
    plain = tabulate(model, cost, wanted, moments=moments)
    return model, batches, plain, by_divergence(plain, model, batches[5:], moments=moments)


def test_a_layer_has_the_divergence_that_is_measured() -> None:
    model, batches, plain, scaled = tables()
    moments = calibrate(model, batches[:5])
    for path in ("loud", "quiet"):
        own, row = mildest(plain.layer(path))
        rank = own.rank(row)
        linear = model.get_submodule(path)
        fit = decompose(linear.weight, "low_rank", rank, moments=moments[path])
        before = [linear.weight.detach().clone(), linear.bias.detach().clone()]
        wanted = torch.cat([model(x) for x in batches[5:]]).detach()
        with torch.no_grad():
            linear.weight.copy_(fit.value.to_dense())
            linear.bias += fit.bias_shift.to(linear.bias)
            found = torch.cat([model(x) for x in batches[5:]])
            linear.weight.copy_(before[0])
            linear.bias.copy_(before[1])
        own_log, other_log = wanted.double().log_softmax(1), found.double().log_softmax(1)
        kl = nn.functional.kl_div(other_log, own_log, reduction="batchmean", log_target=True)
        options = scaled.layer(path).of("low_rank")
        assert options.columns["distortion"][row] == pytest.approx(float(kl), rel=1e-3)
        factors = options.columns["distortion"] / own.columns["distortion"]
        torch.testing.assert_close(torch.from_numpy(factors), torch.full((len(factors),), float(factors[0])).double())
    assert scaled.distortion == BY_DIVERGENCE != plain.distortion
    assert all(
        torch.equal(x, y) for x, y in zip(model.state_dict().values(), branches()[0].state_dict().values(), strict=True)
    )


def test_the_option_that_is_measured_removes_a_tenth() -> None:
    _, _, plain, _ = tables()
    layer = plain.layer("loud")
    own, row = mildest(layer)
    sizes = own.params[own.params <= 0.9 * layer.before.params]
    assert own.params[row] == sizes.max()


def test_both_metrics_find_the_layer_that_matters() -> None:
    model, batches = branches()
    ranks = {}
    for metric in ("gradients", "divergence"):
        decision = decide(model, batches[0], recipe(metric, keep=["head"]), data=batches)
        plan = decision.plan
        ranks[metric] = {p: (plan.layer(p).rank or {"rank": 32})["rank"] for p in ("loud", "quiet")}
        assert ranks[metric]["loud"] >= 2 * ranks[metric]["quiet"]
        assert bool(decision.judged) == (metric == "divergence")
        assert decision.table is not None
        assert (decision.table.distortion == BY_DIVERGENCE) == (metric == "divergence")


def test_no_layer_is_free_because_nothing_was_measured() -> None:
    model, batches = branches()
    nn.init.zeros_(model.head.weight[:, :16])
    with torch.no_grad():
        model.loud.weight[16:] = 0  # so that it reaches the outputs by nothing
    cost = profile(model, batches[0])
    plain = tabulate(model, cost, recipe("divergence", keep=["head"]), moments=None)
    scaled = by_divergence(plain, model, batches[:2], moments={})
    rows = scaled.layer("loud").of("low_rank").columns["distortion"]
    assert rows[0] > 0
    assert (rows[:-1] >= rows[1:]).all()


def test_a_rule_that_compares_no_distortions_measures_nothing() -> None:
    model, batches = branches()
    cost = profile(model, batches[0])
    plain = tabulate(model, cost, recipe("divergence", rule="ratio"))
    assert by_divergence(plain, model, [], moments={}) is plain


def test_outputs_without_classes_diverge_by_their_squared_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Flatten(0)).eval()
    batches = [torch.randn(16, 24) for _ in range(8)]
    cost = profile(model, batches[0])
    moments = calibrate(model, batches[:4])
    plain = tabulate(model, cost, recipe("divergence"), moments=moments)
    scaled = by_divergence(plain, model, batches[4:], moments=moments)
    own, row = mildest(plain.layer("0"))
    fit = decompose(model[0].weight, "low_rank", own.rank(row), moments=moments["0"])
    wanted = torch.cat([model(x) for x in batches[4:]])
    with torch.no_grad():
        model[0].weight.copy_(fit.value.to_dense())
        model[0].bias += fit.bias_shift.to(model[0].bias)
    missed = (torch.cat([model(x) for x in batches[4:]]) - wanted).square().sum() / wanted.square().sum()
    assert scaled.layer("0").of("low_rank").columns["distortion"][row] == pytest.approx(missed.item(), rel=1e-3)


def test_a_unit_is_scaled_as_its_pivot_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 24)), nn.Linear(24, 10)).eval()
    batches = [torch.randn(64, 24) for _ in range(8)]
    wanted = recipe("divergence", units="mlp_width")
    cost = profile(model, batches[0])
    cost = cost.replace(units=recognise_units(model, cost, batches[0], kinds_of(wanted)))
    moments = calibrate(model, batches[:5])
    plain = tabulate(model, cost, wanted, moments=moments)
    scaled = by_divergence(plain, model, batches[5:], moments=moments)
    (before,), (after,) = plain.units, scaled.units
    assert before.unit.pivot == "0.2"
    layers = [table.layer("0.2").of("low_rank").columns["distortion"] for table in (plain, scaled)]
    factor = float(layers[1][0] / layers[0][0])
    assert factor != pytest.approx(1.0)
    torch.testing.assert_close(
        torch.from_numpy(after.options.columns["distortion"]),
        factor * torch.from_numpy(before.options.columns["distortion"]),
    )


def test_compress_plans_by_it() -> None:
    model, batches = branches()
    result = compress(model, batches[0], recipe("divergence"), data=batches, runtime=Runtime(measure=False))
    assert result.plan.after.params <= 0.6 * result.plan.before.params
    assert result.record.agreement is not None


def test_it_needs_data() -> None:
    model, batches = branches()
    with pytest.raises(DataError, match="pass data="):
        decide(model, batches[0], recipe("divergence"))
    with pytest.raises(TenfoldError, match="metric: divergence needs data"):
        Recipe.of({"calibration": {"metric": "divergence", "method": "batchnorm"}})


def test_a_table_can_be_chosen_from_again() -> None:
    *_, scaled = tables()
    tight, loose = (choose(scaled, scaled.recipe.replace(budget=f"params={share}")) for share in (0.5, 0.8))
    assert tight.after.params < loose.after.params
