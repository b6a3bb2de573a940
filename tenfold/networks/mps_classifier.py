"""A matrix product state as a classifier: one train of small cores over all inputs, with the classes at one site."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import WeightError
from tenfold.layers.tt_modes import each_rank
from tenfold.networks.feature_maps import FeatureMap, feature_map


class MPSClassifier(nn.Module):
    """Class scores that are linear in the product of all features: f(x) = W · φ(x₁) ⊗ ... ⊗ φ(x_N), W a tensor train.

    Stoudenmire & Schwab 2016, arXiv 1605.05775. Use it where one wants to see how much inputs have to know of each
    other (the bonds), or a model whose function is a polynomial; a small convolutional network classifies images better
    and faster. Train it as any module, or by sweeps over pairs of sites that choose the bonds (``train_by_sweeps``).

    The start is a train of identities with a little noise, so that products over all sites neither vanish nor explode:
    see ``start_``. Sites with bonds r and r' cost d·r·r' parameters and multiply-accumulates for a sample, the site of
    the classes as many for each class.

    Args:
        sites: number of inputs; for images a path through the pixels, such as rows in turn (``snake``).
        classes: number of scores.
        bonds: of all neighbours, or of each, taken as they are.
        features: the feature map, by name (``FEATURE_MAPS``) or as a function from (...) to (..., d).
        label_site: which site has the axis of the classes; the middle one when left out.
        std: of the noise; 0.2 over the largest bond when left out.
        place: ``device`` and ``dtype`` as in torch.

    Raises:
        WeightError: fewer than two sites or classes, or a label site that does not exist.
        RankError: not one positive bond for each pair of neighbours.
        UnknownNameError: an unknown feature map.

    Example:
        >>> model = MPSClassifier(196, 10, bonds=20)
        >>> model(torch.rand(3, 196)).shape, model.macs()
        (torch.Size([3, 10]), 170444)
    """

    cores: nn.ParameterList

    def __init__(
        self,
        sites: int,
        classes: int,
        bonds: int | Sequence[int] = 20,
        *,
        features: str | FeatureMap = "affine",
        label_site: int | None = None,
        std: float | None = None,
        **place: Any,
    ) -> None:
        super().__init__()
        if sites < 2 or classes < 1:
            msg = f"{sites} sites and {classes} classes: a matrix product state has two sites or more and one class"
            raise WeightError(msg)
        self.sites, self.classes = sites, classes
        self.label_site = sites // 2 if label_site is None else label_site
        if not 0 <= self.label_site < sites:
            msg = f"label_site={label_site} is one of the {sites} sites, 0 to {sites - 1}"
            raise WeightError(msg)
        self.features = features if isinstance(features, str) else getattr(features, "__name__", "a function")
        self._features, self.local = feature_map(features)
        chosen = each_rank(bonds, sites)
        self.std = 0.2 / max(chosen) if std is None else std
        sides = list(pairwise((1, *chosen, 1)))
        own = [(self.local, classes) if k == self.label_site else (self.local,) for k in range(sites)]
        shapes = [(a, *middle, b) for (a, b), middle in zip(sides, own, strict=True)]
        self.cores = nn.ParameterList(torch.empty(shape, **place) for shape in shapes)
        self.reset_parameters()

    @property
    def bonds(self) -> tuple[int, ...]:
        """The bond between every two neighbouring sites, as they are now: sweeps change them."""
        return tuple(core.shape[-1] for core in list(self.cores)[:-1])

    def macs(self) -> int:
        """Return the multiply-accumulates for one sample: those with the cores, and the products with features."""
        sides = (1, *self.bonds, 1)
        every: int = sum(core.numel() for core in self.cores)
        left = sum(sides[k] * self.local for k in range(self.label_site + 1))
        right = sum(sides[k + 1] * self.local for k in range(self.label_site + 1, self.sites))
        return every + left + right + self.classes * sides[self.label_site + 1]

    def reset_parameters(self) -> None:
        """Draw the cores for inputs that are uniform in 0..1; see ``start_``."""
        self.start_(torch.linspace(0, 1, 33)[:, None].expand(-1, self.sites))

    @torch.no_grad()
    def start_(self, inputs: Tensor) -> None:
        """Draw cores that pass on the same state whatever the inputs are, with noise of ``std``.

        Use it before training where the features do not sum to 1 (``trigonometric``): c with c · φ(x) ≈ 1 is found
        for each site on ``inputs``, and the core begins as c ⊗ identity. Random numbers are torch's global ones.

        Args:
            inputs: (samples, sites), as they will be, such as a few hundred of the training set.

        Raises:
            WeightError: inputs with another number of sites.
        """
        wide = self.features_of(inputs.double()).permute(1, 0, 2)  # (sites, samples, d)
        gram = wide.mT @ wide / wide.shape[1] + 1e-4 * torch.eye(self.local, dtype=wide.dtype, device=wide.device)
        unit = torch.linalg.solve(gram, wide.mean(1)[..., None])[..., 0]
        for k, core in enumerate(self.cores):
            if k == self.label_site:
                nn.init.normal_(core, std=0.3 / (core.shape[0] * core.shape[-1]) ** 0.5)
                continue
            a, _, b = core.shape
            inner = torch.eye(a, b, dtype=wide.dtype, device=wide.device)
            if k in {0, self.sites - 1}:  # the state that all others pass on
                inner = torch.randn(a, b, dtype=wide.dtype, device=wide.device)
                inner = inner / torch.linalg.vector_norm(inner)
            noise = torch.randn(core.shape, dtype=wide.dtype, device=wide.device) * self.std
            core.copy_(unit[k].view(1, -1, 1) * inner[:, None] + noise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (batch, classes) of inputs (batch, sites) in 0..1."""
        sites, cores, middle = self.features_of(x).unbind(1), list(self.cores), self.label_site
        left = right = x.new_ones(x.shape[0], 1)
        for phi, core in zip(sites[:middle], cores[:middle], strict=True):
            left = step_right(left, phi, core)
        for phi, core in zip(reversed(sites[middle + 1 :]), reversed(cores[middle + 1 :]), strict=True):
            right = step_left(right, phi, core)
        core = cores[middle]
        partly = times(left, sites[middle]) @ core.flatten(0, 1).flatten(1)
        scores: Tensor = (partly.unflatten(1, core.shape[2:]) @ right[..., None]).squeeze(-1)
        return scores

    def features_of(self, x: Tensor) -> Tensor:
        """Return the features (batch, sites, d) of inputs (batch, sites)."""
        self._check(x)
        return self._features(x)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.sites:
            msg = f"inputs of the shape {tuple(x.shape)}: (batch, {self.sites}) is asked for, one number for each site"
            raise WeightError(msg)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take cores of other bonds as they are: sweeps choose them."""
        for k, core in enumerate(self.cores):
            stored = state_dict.get(f"{prefix}cores.{k}")
            if stored is not None and stored.shape[1:-1] == core.shape[1:-1] and stored.shape != core.shape:
                self.cores[k] = nn.Parameter(core.new_empty(stored.shape), core.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Return sizes, bonds and features."""
        bonds = self.bonds
        shown = f"{min(bonds)}..{max(bonds)}" if min(bonds) < max(bonds) else str(bonds[0])
        return f"{self.sites}, {self.classes}, bonds={shown}, features={self.features}, label_site={self.label_site}"


def times(state: Tensor, phi: Tensor) -> Tensor:
    """Return the products (batch, r·d) of states (batch, r) with features (batch, d), the state the slow index."""
    return (state[:, :, None] * phi[:, None, :]).flatten(1)


def step_right(left: Tensor, phi: Tensor, core: Tensor) -> Tensor:
    """Return the state (batch, r') behind a core (r, d, r'), from that before it."""
    return times(left, phi) @ core.flatten(0, 1)


def step_left(right: Tensor, phi: Tensor, core: Tensor) -> Tensor:
    """Return the state (batch, r) before a core (r, d, r'), from that behind it."""
    return times(phi, right) @ core.flatten(1).mT


def snake(images: Tensor) -> Tensor:
    """Return images (..., rows, columns) as paths (..., rows · columns): every other row runs backwards.

    Use it to keep neighbouring pixels of a row, and the ends of neighbouring rows, neighbours in a train.

    Example:
        >>> snake(torch.arange(6).view(2, 3)).tolist()
        [0, 1, 2, 5, 4, 3]
    """
    turned = torch.arange(images.shape[-2], device=images.device) % 2 == 1
    return torch.where(turned[:, None], images.flip(-1), images).flatten(-2)
