"""Training of a matrix product state by sweeps over pairs of sites, which choose the bonds on the way (DMRG)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold.errors import DataError, WeightError
from tenfold.networks.bond_tensor import BondProblem, Cost, CostName
from tenfold.networks.mps_chain import Chain
from tenfold.networks.mps_classifier import MPSClassifier
from tenfold.networks.mps_folder import SweepFolder


@dataclass(frozen=True)
class SweepConfig:
    """How to sweep.

    Use it with ``train_by_sweeps``.

    Attributes:
        sweeps: how often to go through all pairs of sites, to the right and back.
        bonds: no bond becomes larger.
        cutoff: what may be dropped of the squared norm of a pair's tensor where it is split.
        steps: conjugate gradients at each pair.
        cost: ``cross_entropy``, or ``squared`` as in the source.
        ridge: weight of half the squared norm of each pair's tensor.
        samples: so many of the training set for each sweep, drawn for each again; all by default. The states of all
            sites are held for them: samples · sites · bond numbers.
        seed: of the draws.
    """

    sweeps: int = 3
    bonds: int = 20
    cutoff: float = 1e-10
    steps: int = 4
    cost: CostName = "cross_entropy"
    ridge: float = 0.0
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"sweeps": 0, "bonds": 1, "cutoff": 0, "steps": 1, "ridge": 0, "samples": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                msg = f"{name}={value} of a SweepConfig is at least {bound}"
                raise WeightError(msg)
        if self.cost not in {"cross_entropy", "squared"}:
            msg = f"cost={self.cost!r} of a SweepConfig is 'cross_entropy' or 'squared'"
            raise WeightError(msg)


@dataclass(frozen=True)
class SweepRecord:
    """What a sweep did.

    Use it to see whether another one pays.

    Attributes:
        sweep: counted from 1.
        cost: mean over the pairs of sites, before each was split, on the samples of the sweep.
        dropped: the largest share of a squared norm that a split dropped.
        bonds: after the sweep.
        seconds: that it took.
        score: what ``evaluate`` made of the model after it.
    """

    sweep: int
    cost: float
    dropped: float
    bonds: tuple[int, ...]
    seconds: float
    score: float | None = None


def train_by_sweeps(
    model: MPSClassifier,
    inputs: Tensor,
    labels: Tensor,
    config: SweepConfig | None = None,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    folder: Path | str | None = None,
) -> tuple[SweepRecord, ...]:
    """Train a matrix product state in place by sweeps over pairs of sites, and return what each sweep did.

    Use it where the bonds are to follow the data, or where nothing about learning rates is to be chosen. Two
    neighbouring cores are multiplied, the product is improved by conjugate gradients on all samples (the cost is convex
    in it), and an SVD splits it again at the bond that it needs (Stoudenmire & Schwab 2016, arXiv 1605.05775, section
    4). The rest of the train is kept orthogonal, scaled so that states have norm 1 in the mean. A pair costs
    (2·steps + 1)·classes·d²·r³-like products: samples·classes·d²·r² each.

    With a ``folder``, every sweep is stored; the same call goes on after the last one, to the same bits.

    Args:
        model: changed in place, bonds included; gradients are dropped.
        inputs: (samples, sites) in 0..1.
        labels: (samples,), int64.
        config: ``SweepConfig()`` by default.
        evaluate: maps the model to a score after each sweep.
        folder: where to store sweeps.

    Raises:
        WeightError: inputs that do not fit the model.
        DataError: labels that are not one for each input, or not among the classes.
        CheckpointError: a folder with another run, or a damaged file.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.rand(200, 6)
        >>> found = train_by_sweeps(MPSClassifier(6, 2, 2), x, (x[:, 0] > x[:, 5]).long(), SweepConfig(sweeps=2))
        >>> found[1].cost < found[0].cost < 0.69
        True
    """
    config = config or SweepConfig()
    _check(model, inputs, labels)
    stored = None if folder is None else SweepFolder(Path(folder), _identity(config, inputs, labels))
    done = [] if stored is None else [SweepRecord(**row) for row in stored.restore(model)]
    for index in range(len(done), config.sweeps):
        start = time.perf_counter()
        cost, dropped = _sweep(model, inputs, labels, config, index)
        score = None if evaluate is None else float(evaluate(model))
        done.append(SweepRecord(index + 1, cost, dropped, model.bonds, time.perf_counter() - start, score))
        if stored is not None:
            stored.write(model, [asdict(row) for row in done])
    return tuple(done)


@torch.no_grad()
def _sweep(
    model: MPSClassifier, inputs: Tensor, labels: Tensor, config: SweepConfig, index: int
) -> tuple[float, float]:
    """Go to the right end, to the left end and back to where the classes are; return mean cost and largest drop."""
    if config.samples is not None and config.samples < len(inputs):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        chosen = torch.randperm(len(inputs), generator=generator)[: config.samples]
        inputs, labels = inputs[chosen], labels[chosen]
    chain, last, middle = Chain.of(model, inputs), model.sites - 1, model.label_site
    path = [*range(middle, last), *range(last, 0, -1), *range(middle)]  # the site of the classes before each move
    rightwards = [True] * (last - middle) + [False] * last + [True] * middle
    cost, costs, dropped = Cost(config.cost, labels), [], 0.0
    for site, right in zip(path, rightwards, strict=True):
        left_states, right_states = chain.around(site, rightwards=right)
        problem = BondProblem(left_states, right_states, cost, config.ridge)
        tensor, found = problem.solve(chain.pair(site, rightwards=right), config.steps)
        costs.append(found)
        dropped = max(dropped, chain.split(site, tensor, problem.roots, config, rightwards=right))
    chain.write_to_(model)
    return sum(costs) / len(costs), dropped


def _check(model: MPSClassifier, inputs: Tensor, labels: Tensor) -> None:
    if inputs.dim() != 2 or inputs.shape[1] != model.sites:
        msg = f"inputs of the shape {tuple(inputs.shape)}: (samples, {model.sites}) is asked for"
        raise WeightError(msg)
    if labels.shape != inputs.shape[:1] or not len(labels):
        msg = f"{len(inputs)} inputs and labels of the shape {tuple(labels.shape)}: one label for each is asked for"
        raise DataError(msg)
    if int(labels.min()) < 0 or int(labels.max()) >= model.classes:
        msg = f"labels {int(labels.min())} to {int(labels.max())}: they are to be 0 to {model.classes - 1}"
        raise DataError(msg)


def _identity(config: SweepConfig, inputs: Tensor, labels: Tensor) -> str:
    from tenfold.tensors.digests import digest

    settings = [f"{f.name}={getattr(config, f.name)}" for f in fields(config) if f.name != "sweeps"]
    return digest({"inputs": inputs, "labels": labels}, " ".join(settings))
