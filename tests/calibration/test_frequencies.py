"""Embeddings in plans by data: what a row weighs is how often it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.calibration import calibrate, called_layers
from tenfold.calibration.collect import collect_moments
from tenfold.calibration.moment_sums import frequencies, id_counts, moment_bytes
from tenfold.decompositions import decompose, default_algorithm, error_curve
from tenfold.formats import FORMATS, split_groups
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.pipeline import compress
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.records import Calibration
from tenfold.runtime import Runtime
from tenfold.surgery import apply_sequentially

ROWS, WIDTH = 60, 16


class Tiny(nn.Module):
    """A transformer of one layer over ids of which a few are asked for most of the time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(ROWS, WIDTH, padding_idx=0)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)).mean(1))


@pytest.fixture(scope="module")
def model():
    return Tiny().eval()


@pytest.fixture(scope="module")
def batches():
    draw = torch.Generator().manual_seed(1)
    weights = torch.arange(1.0, ROWS + 1).pow(-2)
    return [torch.multinomial(weights, 40 * 12, replacement=True, generator=draw).view(40, 12) for _ in range(3)]


def test_counts_are_those_of_all_batches_and_what_is_unseen_keeps_a_little(model, batches):
    found = collect_moments(model, batches, {"embed": spec_of(model.embed)[0]})["embed"]
    ids = torch.cat([b.flatten() for b in batches])
    counts = torch.tensor([int((ids == i).sum()) for i in range(ROWS)])
    weights = found.covariance().diagonal()[0]
    assert found.count == len(ids)
    assert float(weights.sum()) == pytest.approx(1)
    unseen = counts == 0
    assert 0 < int(unseen.sum()) < ROWS
    seen = counts[~unseen]
    torch.testing.assert_close(weights[~unseen] / weights[~unseen][0], (seen / seen[0]).double())
    assert 0 < float(weights[unseen].max()) <= 0.5 * float(weights[~unseen].min()) * (1 + 1e-12)
    once = float((counts == 1).sum())
    assert float(weights[unseen].sum()) <= once / (len(ids) + once) * (1 + 1e-12)


def test_frequencies_without_rare_or_unseen_ids():
    assert frequencies(torch.tensor([4.0, 4.0])).tolist() == [0.5, 0.5]
    few = frequencies(torch.tensor([100.0, 100.0, 0.0]))
    assert 0 < float(few[2]) < 0.005


def test_memory_grows_with_the_rows(model, batches):
    spec = spec_of(nn.Embedding(50_000, 8))[0]
    assert moment_bytes({"embed": spec}) == 24 * 50_000
    found = collect_moments(model, batches, {"embed": spec_of(model.embed)[0]})["embed"]
    stored = sum(t.numel() * t.element_size() for t in (*found.input_second_moment.tensors().values(), found.mean))
    counts = id_counts(batches[0], ROWS)
    assert stored + counts.numel() * counts.element_size() == moment_bytes({"embed": spec_of(model.embed)[0]})


def test_the_whitened_svd_has_the_least_weighted_error(model, batches):
    """The oracle is NumPy's SVD of rows scaled by the roots of their weights, scaled back: Eckart & Young."""
    spec = spec_of(model.embed)[0]
    moments = collect_moments(model, batches, {"embed": spec})["embed"]
    weight = model.embed.weight.detach()
    weights = moments.covariance().diagonal()[0].numpy()
    scaled = np.sqrt(weights)[:, None] * weight.double().numpy()
    tails = np.linalg.svd(scaled, compute_uv=False) ** 2
    curve = error_curve(split_groups(weight, spec), spec, FORMATS.get("low_rank"), moments)
    for rank in (1, 3, 8, 15):
        fit = decompose(
            weight,
            "low_rank",
            {"rank": rank},
            default_algorithm("low_rank", data_aware=True),
            spec=spec,
            moments=moments,
        )
        missed = (weights[:, None] * (weight - fit.value.to_dense()).double().numpy() ** 2).sum()
        assert missed == pytest.approx(tails[rank:].sum(), rel=1e-3)
        assert float(curve(np.array([[rank]]))[0]) == pytest.approx(tails[rank:].sum(), rel=1e-3)
        blind = decompose(weight, "low_rank", {"rank": rank}, spec=spec).value.to_dense()
        assert missed < (weights[:, None] * (weight - blind).double().numpy() ** 2).sum()


def test_distortion_is_the_change_of_the_outputs_that_brute_force_finds():
    """A net that is linear behind the embedding: its distortion is exact, up to random projections of gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 6), nn.Linear(6, 5)).double().eval()
    ids = torch.randint(0, 25, (4000, 1)).square() % 25
    known = calibrate(model, [ids[:2000], ids[2000:]], settings=Calibration(draws=200))["0"]
    spec = spec_of(model[0])[0]
    fit = decompose(model[0].weight.detach(), "low_rank", {"rank": 3}, spec=spec, moments=known)
    flat = [split_groups(w.detach().double(), spec).flatten(2) for w in (model[0].weight, fit.value.to_dense())]
    counts = id_counts(ids, 30)
    off = ((model[0].weight.detach() - fit.value.to_dense()) @ model[1].weight.detach().T).square().sum(1)
    brute = float((off * frequencies(counts)).sum())
    assert known.distortion(*flat) == pytest.approx(brute, rel=0.15)


def test_frozen_embeddings_know_what_the_network_minds_like_any_other(batches):
    free, frozen = Tiny().eval(), Tiny().eval()
    frozen.embed.weight.requires_grad = False
    wanted, found = (calibrate(m, batches, called_layers(profile(m, batches[0]))) for m in (free, frozen))
    assert {path for path, own in found.items() if own.output_gram is not None} == set(wanted)
    for path in wanted:
        torch.testing.assert_close(found[path].output_gram, wanted[path].output_gram)
    assert not frozen.embed.weight.requires_grad


def test_embeddings_join_plans_by_data_and_a_budget_of_parameters_is_met(model, batches):
    cost = profile(model, batches[0][:1])
    moments = calibrate(model, batches, called_layers(cost))
    assert "embed" in moments
    made = plan(model, cost, {"rule": "global", "budget": {"params": 0.8}, "keep_ends": False}, moments=moments)
    layer = made.layer("embed")
    assert layer.distortion is not None or "what it would save elsewhere" in layer.reason
    assert made.after.params <= 0.8 * cost.params
    forced = plan(
        model,
        cost,
        {"rule": {"name": "fixed", "ranks": {"embed": 5}}, "keep_ends": False, "formats": ["low_rank"]},
        moments=moments,
    )
    assert forced.layer("embed").algorithm["name"] == "whitened_svd"
    weights = moments["embed"].covariance().diagonal()[0]

    def missed(small):
        assert isinstance(small.embed, FactorizedLayer)
        off = (small.embed.weight - model.embed.weight).detach().double().square().sum(1)
        return float((off * weights).sum())

    with_data, without = apply_sequentially(model, forced, batches), apply_blind(model, forced)
    assert missed(with_data) < 0.9 * missed(without)


def apply_blind(model, made):
    from tenfold.surgery import apply

    return apply(model, made)


@pytest.mark.parametrize("method", ["sequential", "independent"])
def test_compress_takes_embeddings_with_data(model, batches, method):
    result = compress(
        model,
        batches[0][:1],
        {"budget": {"params": 0.5}, "calibration": {"method": method}, "keep_ends": False},
        data=batches,
        runtime=Runtime(measure=False),
    )
    assert result.record.after.params <= 0.5 * result.record.before.params
    assert result.plan.layer("embed").action == "factorize"
    assert torch.isfinite(result.model(batches[0])).all()
