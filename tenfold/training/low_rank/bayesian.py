"""Automatic ranks of tensor trains: a low-rank prior on the cores, its variances updated in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer
from tenfold.layers.tt_ranks import bond_cores, has_bonds, scale_bonds_, write_bonds_
from tenfold.tensors.trains import tt_canonical
from tenfold.training.loop import Loss
from tenfold.training.low_rank.priors import BayesianConfig
from tenfold.training.low_rank.tt_rank_pruning import allowed_params, least_worth, prune_bonds_

_SWEEPS = 20  # over the bonds


class BayesianRanks(nn.Module):
    """The low-rank prior on every layer of a model that is a tensor train, as a term of any training loss.

    Each step: ``advance_(model)``, then a loss that includes ``penalty(model)``; ``loss`` does both. λ and the masks of
    kept indices are buffers, so that a run can be stored and resumed. Dropped indices are held at zero in both cores,
    where gradients vanish, until ``prune_`` slices them out; one index of each bond always stays.

    Args:
        model: with layers that are tensor trains: ``TTLinear``, ``TTEmbedding``, ``TTGRU`` ..., or factorized layers.
        config: the prior.

    Raises:
        PlanError: no layer is a tensor train.

    Example:
        >>> from tenfold.layers import TTLinear
        >>> model = nn.Sequential(TTLinear(12, 8, 6, cores=2))
        >>> ranks = BayesianRanks(model, BayesianConfig(samples=100))
        >>> with torch.no_grad():
        ...     _ = model[0].cores[0][..., 2:].mul_(1e-3)
        ...     _ = model[0].cores[1][2:].mul_(1e-3)
        >>> for _ in range(100):
        ...     ranks.advance_(model)
        >>> ranks.prune_(model)
        {'0': (2,)}
        >>> model[0].ranks
        (2,)
    """

    steps: Tensor
    done: Tensor

    def __init__(self, model: nn.Module, config: BayesianConfig) -> None:
        super().__init__()
        self.config, self.prior = config, config.build()
        layers = {path: module for path, module in model.named_modules() if has_bonds(module)}
        if not layers:
            msg = (
                "no layer is a tensor train of two or more cores: use TTLinear, TTEmbedding, or a plan of such formats"
            )
            raise PlanError(msg)
        self.paths = tuple(layers)
        self.initial_params = sum(core.numel() for layer in layers.values() for core in bond_cores(layer))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        for path, layer in layers.items():
            self._begin(path, layer)

    def variances(self, path: str) -> tuple[Tensor, ...]:
        """Return λ (r,) of each bond of a layer, dropped indices included."""
        return self._read(path, "variance")

    def kept(self, path: str) -> tuple[Tensor, ...]:
        """Return the mask of kept indices (r,) of each bond of a layer."""
        return self._read(path, "kept")

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Return the number of kept indices of each bond, by path of the layer."""
        return {path: tuple(int(kept.sum()) for kept in self.kept(path)) for path in self.paths}

    @property
    def strength(self) -> float:
        """Current power of the prior, 0 to ``weight``."""
        config, after = self.config, int(self.steps) - self.config.warmup
        if after <= 0 or bool(self.done):
            return 0.0
        return config.weight * (min(1.0, after / config.ramp) if config.ramp else 1.0)

    def penalty(self, model: nn.Module) -> Tensor:
        """Return strength · −log p(cores, λ)/N of the kept indices; λ has no gradient."""
        strength = self.strength
        total = sum(
            (self.prior.negative_log(*self._alive(model, path)) for path in self.paths), self.steps.new_zeros(())
        )
        return total * (strength / self.config.samples)

    @torch.no_grad()
    def advance_(self, model: nn.Module) -> None:
        """Count a step, update λ if due, and hold dropped indices at zero."""
        self.steps += 1
        config, steps = self.config, int(self.steps)
        if config.rotate and steps % config.rotate == 0 and self.strength:
            self.rotate_(model)
        if steps % config.every == 0:
            self.update_(model)
        for path in self.paths:
            masks = self.kept(path)
            if not all(bool(mask.all()) for mask in masks):
                layer = model.get_submodule(path)
                like = next(layer.parameters())
                scale_bonds_(layer, [(mask.to(like), mask.to(like)) for mask in masks])

    @torch.no_grad()
    def update_(self, model: nn.Module) -> None:
        """Balance the cores, move λ to the closed form with damping, and drop indices below the threshold.

        Nothing is dropped during the warm-up.
        """
        for path in filter(self.kept, self.paths):
            if self.strength:  # nothing depends on the balance before
                self._balance_(model, path)
            cores, variances = self._alive(model, path)
            best = self.prior.optimum(cores, variances)
            for own, kept, new in zip(self.variances(path), self.kept(path), best, strict=True):
                own[kept] = own[kept].lerp(new.to(own), self.config.damping)
        if self.strength:
            self._drop_(model)

    @torch.no_grad()
    def rotate_(self, model: nn.Module) -> None:
        """Write every train in the basis in which slices are orthogonal, the largest first, and update λ.

        Of all bases it has the least sum of the logarithms of the slice norms on both sides of a bond (Hadamard's
        inequality), which is what the priors penalize where λ follows the slices.
        """
        for path in filter(self.kept, self.paths):
            cores, variances = self._alive(model, path)
            turned = tt_canonical(tuple(core.double() for core in cores))
            whole, masks = [torch.zeros_like(core) for core in bond_cores(model.get_submodule(path))], self.kept(path)
            sides = pairwise([None, *(mask.nonzero().squeeze(1) for mask in masks), None])
            for own, new, (before, after) in zip(whole, turned, sides, strict=True):
                rows = torch.arange(len(own), device=own.device) if before is None else before
                columns = torch.arange(own.shape[-1], device=own.device) if after is None else after
                own[rows[:, None], :, columns] = new.to(own).transpose(1, 2)
            write_bonds_(model.get_submodule(path), whole)
            self._balance_(model, path)
            cores, _ = self._alive(model, path)
            for own, kept, best in zip(self.variances(path), masks, self._settled(cores, variances), strict=True):
                own[kept] = best.to(own)

    def params(self, model: nn.Module) -> int:
        """Return the number of entries of all cores without dropped indices."""
        return sum(core.numel() for path in self.paths for core in self._alive(model, path)[0])

    def _drop_(self, model: nn.Module) -> None:
        """Drop indices below the threshold, smallest share of the bond's largest λ first, down to ``enough``."""
        if self.config.paced:
            self._keep_pace_(model)
            return
        below: list[tuple[float, Tensor, int]] = []
        for path in self.paths:
            for own, kept in zip(self.variances(path), self.kept(path), strict=True):
                share = own / own[kept].max()
                low = (kept & (share < self.config.threshold)).nonzero().squeeze(1)
                below += [(float(share[i]), kept, int(i)) for i in low]
        enough = self.config.enough
        for _, kept, index in sorted(below, key=lambda drop: drop[0]):
            if enough is None or self.params(model) > enough:
                kept[index] = False
        self.done.fill_(enough is not None and self.params(model) <= enough)

    def _keep_pace_(self, model: nn.Module) -> None:
        """Drop the indices of least worth until the schedule is met."""
        config = self.config
        assert config.enough is not None  # noqa: S101 - the config sees to it
        limit = allowed_params(self.initial_params, config.enough, (int(self.steps) - config.warmup) / config.ramp)
        while self.params(model) > limit:
            candidates = [(worst, path) for path in self.paths if (worst := least_worth(*self._alive(model, path)))]
            if not candidates:
                break
            (_, bond, index), path = min(candidates)
            kept = self.kept(path)[bond]
            kept[kept.nonzero()[index]] = False
        self.done.fill_(self.params(model) <= config.enough)

    @torch.no_grad()
    def prune_(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, tuple[int, ...]]:
        """Slice dropped indices out of both cores of every bond, and return the ranks, by path.

        Layers are replaced by smaller ones of their kind. An optimizer continues with the new parameters, its state
        (moments, of the shape of their parameters) sliced alike. Factorized layers need a new optimizer.

        Raises:
            PlanError: the model itself is the layer; or an optimizer over a factorized layer that loses indices.
        """
        for path in self.paths:
            layer, kept = model.get_submodule(path), self.kept(path)
            if all(bool(mask.all()) for mask in kept):
                continue
            smaller = prune_bonds_(model, path, [mask.nonzero().squeeze(1) for mask in kept], optimizer)
            variances = [own[mask] for own, mask in zip(self.variances(path), kept, strict=True)]
            self._begin(path, smaller, None if isinstance(layer, FactorizedLayer) else variances)
        return self.ranks()

    def loss(self, model: nn.Module, base: Loss) -> Loss:
        """Return ``base`` plus the penalty of ``model`` as a training loss; each call is a step."""

        def penalized(called: nn.Module, inputs: Any, targets: Any) -> Tensor:
            if called.training:
                self.advance_(model)
            return base(called, inputs, targets) + self.penalty(model)

        return penalized

    def _balance_(self, model: nn.Module, path: str) -> None:
        cores, variances = self._alive(model, path)
        scales = self.prior.scales(cores, variances)
        if scales is None:
            return
        factors = []
        for kept, scale in zip(self.kept(path), scales, strict=True):
            whole = torch.ones(kept.shape, dtype=scale.dtype, device=scale.device).masked_scatter(kept, scale)
            factors.append((whole, 1 / whole))
        scale_bonds_(model.get_submodule(path), factors)

    def _alive(self, model: nn.Module, path: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return cores and λ of the kept indices."""
        cores, masks = list(bond_cores(model.get_submodule(path))), self.kept(path)
        for k, mask in enumerate(masks):
            if not bool(mask.all()):
                cores[k], cores[k + 1] = cores[k][..., mask], cores[k + 1][mask]
        return tuple(cores), tuple(own[mask] for own, mask in zip(self.variances(path), masks, strict=True))

    def _begin(self, path: str, layer: nn.Module, variances: Sequence[Tensor] | None = None) -> None:
        """Set λ of a layer, by default to the closed form for its cores, with nothing dropped."""
        with torch.no_grad():
            cores = bond_cores(layer)
            if variances is None and len(cores) > 1:
                variances = self._settled(cores, [core.square().mean((0, 1)) for core in cores[:-1]])
        for name in [name for name in self._buffers if name.endswith(f"@{path.replace('.', '/')}")]:
            del self._buffers[name]
        for k, found in enumerate(variances or ()):
            self.register_buffer(_name("variance", k, path), found.clone())
            self.register_buffer(_name("kept", k, path), torch.ones_like(found, dtype=torch.bool))

    def _settled(self, cores: Sequence[Tensor], variances: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Iterate the closed form of λ to a fixed point."""
        for _ in range(_SWEEPS):
            variances = self.prior.optimum(cores, variances)
        return tuple(variances)

    def _read(self, path: str, what: str) -> tuple[Tensor, ...]:
        buffers = (self._buffers.get(_name(what, k, path)) for k in count())
        return tuple(takewhile(lambda buffer: buffer is not None, buffers))  # type: ignore[arg-type]


def _name(what: str, bond: int, path: str) -> str:
    return f"{what}{bond + 1}@{path.replace('.', '/')}"  # the name of a buffer has no dots
