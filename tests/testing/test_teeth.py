"""The laws can be broken: each of these entries is wrong in one way, and the law that forbids it says so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from tenfold.allocation import RULES, Factorize, Keep, RankRule
from tenfold.allocation.rules.threshold import Ratio
from tenfold.decompositions import DECOMPOSITIONS, Factors, Moments
from tenfold.decompositions.svd import SVD
from tenfold.decompositions.weighted_als import WeightedALS, WhitenedSVD
from tenfold.errors import BudgetError
from tenfold.formats import FORMATS
from tenfold.formats.low_rank import LowRank
from tenfold.formats.spatial import Spatial
from tenfold.formats.tucker2 import Tucker2
from tenfold.surgery import apply
from tenfold.testing import (
    LAWS,
    LawBroken,
    check_algorithm_laws,
    check_format_laws,
    check_model_laws,
    check_rule,
    model_laws,
)


@pytest.fixture
def registered():
    """Return a function that registers an entry for the time of one test."""
    added = []

    def register(registry, entry):
        registry.register("wrong")(entry)
        added.append(registry)
        return entry

    yield register
    for registry in added:
        registry._entries.pop("wrong")


def broken(number):
    return pytest.raises(LawBroken, match=rf"^law {number} \(")


class BiasFirst(LowRank):
    @classmethod
    def structure(cls, spec, rank):
        first, last = LowRank.structure(spec, rank)
        inner = rank["rank"] * spec.groups
        return first.core(spec.in_channels, inner, bias=spec.bias), last.replace(bias=False)


class StrideLost(Spatial):
    @classmethod
    def structure(cls, spec, rank):
        first, last = Spatial.structure(spec, rank)
        return first, last.replace(stride=(1,) * spec.axes)


class WrongMeaning(Tucker2):
    def to_grouped(self):
        return super().to_grouped().flip(1)


class ParamsByHand(LowRank):
    @classmethod
    def num_params(cls, spec, rank):
        return super().num_params(spec, rank) - (spec.out_channels if spec.bias else 0)  # forgets the bias


class MacsByHand(LowRank):
    @classmethod
    def macs(cls, spec, rank, in_shape):
        return 2 * super().macs(spec, rank, in_shape)  # counts FLOPs


class ChainTurned(LowRank):
    @classmethod
    def from_chain(cls, spec, rank, chain):
        value = super().from_chain(spec, rank, chain)
        return value.map(left=-value.left, right=-value.right)


class HalfUnfolded(LowRank):
    @classmethod
    def unfoldings(cls, weight, spec):
        return {"rank": cls.unfold(weight, spec)[..., ::2]}


class FallingFamily(LowRank):
    @classmethod
    def rank_family(cls, spec):
        return super().rank_family(spec)[::-1]


class TooSmallMost(LowRank):
    @classmethod
    def max_rank(cls, spec):
        return {"rank": max(min(cls.matrix_shape(spec)) - 1, 1)}


@pytest.mark.parametrize(
    ("entry", "check", "number"),
    [
        (BiasFirst, "equals_dense", 5),
        (StrideLost, "equals_dense", 5),
        (WrongMeaning, "equals_dense", 5),
        (ParamsByHand, "params", 3),
        (MacsByHand, "macs", 4),
        (ChainTurned, "round_trips", 8),
        (HalfUnfolded, "unfoldings", 6),
        (FallingFamily, "ranks", 1),
    ],
)
def test_wrong_formats_are_caught(registered, entry, check, number):
    registered(FORMATS, entry)
    with broken(number):
        check_format_laws(entry, check)


def test_a_full_rank_that_is_not_full_is_caught(registered):
    registered(FORMATS, TooSmallMost)
    with broken(1):
        check_algorithm_laws(SVD(), TooSmallMost, "exact")


class Sloppy(SVD):
    """Finds the trailing singular vectors first."""

    def fit(self, problem):
        format, spec, r = problem.format, problem.spec, problem.rank["rank"]
        u, s, vh = torch.linalg.svd(format.unfold(problem.weight, spec), full_matrices=False)
        return Factors(format.from_matrices(u[..., -r:] * s[..., None, -r:], vh[..., -r:, :], spec))


class Noisy(SVD):
    """Adds to the factors what torch's own generator gives."""

    def fit(self, problem):
        found = super().fit(problem)
        return Factors({k: v + 1e-3 * torch.randn_like(v) for k, v in found.tensors.items()})


class Growing(SVD):
    """Spoils larger ranks."""

    def fit(self, problem):
        found = super().fit(problem)
        return Factors({k: v * (1 + 0.2 * (problem.rank["rank"] - 1)) for k, v in found.tensors.items()})


class Writing(SVD):
    """Divides by the norm, and by zero where that is zero."""

    def fit(self, problem):
        found = super().fit(problem)
        norm = torch.linalg.vector_norm(problem.weight)
        return Factors({k: v / norm * norm for k, v in found.tensors.items()})


@pytest.mark.parametrize(
    ("entry", "check", "number"),
    [
        (Sloppy, "bounds", 6),
        (Sloppy, "recovery", 6),
        (Noisy, "exact", 1),
        (Noisy, "deterministic", 7),
        (Growing, "monotone", 2),
        (Writing, "odd_weights", 14),
    ],
)
def test_wrong_algorithms_are_caught(registered, entry, check, number):
    registered(DECOMPOSITIONS, entry)
    with broken(number):
        check_algorithm_laws(entry(), LowRank, check)


class Ignoring(WhitenedSVD):
    """Takes no notice of the data."""

    def fit(self, problem):
        return super().fit(replace(problem, covariance=None))


class Halved(WhitenedSVD):
    """Loses a factor under the data, whatever they are."""

    def fit(self, problem):
        found = super().fit(problem)
        half = 1.0 if problem.covariance is None else 0.5
        return Factors({k: v * half for k, v in found.tensors.items()})


class Averaging(WhitenedSVD):
    """Takes all groups for one."""

    def fit(self, problem):
        covariance = problem.covariance
        mean = None if covariance is None else covariance.mean(0, keepdim=True).expand_as(covariance)
        return super().fit(replace(problem, covariance=mean))


class Mixing(WhitenedSVD):
    """Gives each group the data of another."""

    def fit(self, problem):
        covariance = problem.covariance
        return super().fit(replace(problem, covariance=None if covariance is None else covariance.flip(0)))


class Turned(WeightedALS):
    """Takes the entries of a patch in the order (tap, channel)."""

    def fit(self, problem):
        covariance = problem.covariance
        if covariance is not None:
            order = torch.arange(covariance.shape[-1]).view(-1, problem.weight.shape[2]).T.flatten()
            covariance = covariance[:, order][:, :, order]
        return super().fit(replace(problem, covariance=covariance))


@pytest.mark.parametrize(
    ("entry", "format", "check"),
    [
        (Ignoring, LowRank, "outputs"),
        (Halved, LowRank, "white"),
        (Averaging, LowRank, "groups_apart"),
        (Mixing, LowRank, "outputs"),
        (Mixing, LowRank, "groups_apart"),
        (Turned, Tucker2, "outputs"),
    ],
)
def test_algorithms_that_mistake_the_data_are_caught(registered, entry, format, check):
    registered(DECOMPOSITIONS, entry)
    with broken(15):
        check_algorithm_laws(entry(), format, check)


def test_a_wrong_output_error_is_caught(monkeypatch):
    monkeypatch.setattr(Moments, "errors", lambda self, weight, other: (torch.ones(1), torch.full((1,), 1e8)))
    with pytest.raises(LawBroken, match=r"^law 15 .*: the fit reports the output error 0\.0001, over the rows it is"):
        check_algorithm_laws(WeightedALS(), Tucker2, "outputs")


def test_a_batch_norm_that_is_not_carried_through_is_caught(monkeypatch):
    def forgetful(model, made):
        small = apply(model, made)
        for norm in (m for m in small.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.reset_running_stats()
        return small

    monkeypatch.setattr(model_laws, "apply", forgetful)
    with broken(11):
        check_model_laws(Tucker2, "untouched")


@dataclass(frozen=True)
class Rule(RankRule):
    how: str = ""

    rows: ClassVar[str] = "family"

    def select(self, layers, limits=None):
        match self.how:
            case "too little":
                return Ratio().select(layers, {k: v / 2 for k, v in limits.items()}) if limits else self.no()
            case "too much":
                return Ratio().select(layers, {k: v * 1.2 for k, v in limits.items()}) if limits else self.no()
            case "full":
                return tuple(Factorize(len(layer.options[0]), "full") for layer in layers)
            case "beyond":
                return tuple(Factorize(1 + sum(map(len, layer.options)), "none") for layer in layers)
            case "mute":
                return tuple(Keep("") for _ in layers)
            case _:
                return tuple(Keep("short") for _ in layers[1:])

    def no(self):
        msg = "this rule needs a budget, such as macs=0.5"
        raise BudgetError(msg)


@pytest.mark.parametrize(
    ("how", "number"), [("too little", 10), ("too much", 10), ("full", 9), ("beyond", 9), ("mute", 9), ("short", 9)]
)
def test_wrong_rules_are_caught(registered, how, number):
    registered(RULES, Rule)
    with broken(number):
        check_rule(Rule(how))


def test_a_broken_law_names_law_entry_and_place(registered):
    registered(FORMATS, WrongMeaning)
    with pytest.raises(LawBroken, match=r"^law 5 \(.*\), wrong, conv2d, \{'out': 1, 'in': 1\}: the output is off by"):
        check_format_laws(WrongMeaning, "equals_dense", geometries=_only("conv2d"))


def _only(name):
    from tenfold.testing import GEOMETRIES

    return tuple(g for g in GEOMETRIES if g.name == name)


def test_the_laws_are_numbered_as_documented():
    assert sorted(LAWS) == list(range(1, 16))
