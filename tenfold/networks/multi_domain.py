"""One network for many domains: a frozen core that all share, and small factors, norms and a head for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import UnknownNameError, WeightError
from tenfold.registry import did_you_mean


class DomainConvStack(nn.Module):
    """The kernels of equally shaped convolutions as one Tucker tensor, whose core domains share: W = G ×ₖ U⁽ᵏ⁾.

    Bulat et al. 2020, arXiv 1904.06345, equation 3. Use it in networks of your own as ``MultiDomainNet`` does. A domain
    adds Σ dimₖ·rankₖ numbers, where the kernels have out·in·k²·layers.

    Args:
        channels: in and out, of every layer.
        kernel_size: k, odd.
        layers: how many.
        ranks: of (out, in, kernel, layers); full when left out, which restricts nothing.
        place: ``device`` and ``dtype`` as in torch.

    Raises:
        WeightError: ranks that are not four, or larger than the sizes.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        layers: int,
        ranks: tuple[int, int, int, int] | None = None,
        **place: Any,
    ) -> None:
        super().__init__()
        self.sizes = (channels, channels, kernel_size**2, layers)
        self.ranks, self.kernel_size = ranks or self.sizes, kernel_size
        if len(self.ranks) != 4 or any(not 1 <= r <= n for r, n in zip(self.ranks, self.sizes, strict=False)):
            msg = f"ranks={ranks}: four numbers from 1 to {self.sizes}, of out, in, kernel and layers"
            raise WeightError(msg)
        self.core = nn.Parameter(torch.empty(self.ranks, **place))
        nn.init.normal_(self.core, std=(2 / (channels * kernel_size**2)) ** 0.5)
        self.factors = nn.ModuleDict()

    def add(self, name: str, like: str | None = None) -> None:
        """Add the factors of a domain: those of another one, or parts of the identity."""
        own = [
            torch.eye(n, r, device=self.core.device, dtype=self.core.dtype)
            if like is None
            else self.factors[like][k].detach().clone()  # type: ignore[index]
            for k, (n, r) in enumerate(zip(self.sizes, self.ranks, strict=True))
        ]
        self.factors[name] = nn.ParameterList(own)

    def weights(self, name: str) -> Tensor:
        """Return the kernels (layers, out, in, k, k) of a domain."""
        found = self.core
        for factor in self.factors[name]:  # type: ignore[attr-defined] # each contracts the first axis, which goes last
            found = torch.tensordot(found, factor, ([0], [1]))
        kernels: Tensor = found.permute(3, 0, 1, 2).unflatten(3, (self.kernel_size, self.kernel_size))
        return kernels


class Domain(nn.Module):
    """What a domain has of its own besides factors: first layer, norms, head.

    Args:
        inputs: channels of its pictures.
        classes: of its head.
        channels: of the stack.
        layers: of the stack.
    """

    def __init__(self, inputs: int, classes: int, channels: int, layers: int) -> None:
        super().__init__()
        self.inputs, self.classes = inputs, classes
        self.stem = nn.Conv2d(inputs, channels, 3, stride=2, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(layers + 1))
        self.head = nn.Linear(channels, classes)


class MultiDomainNet(nn.Module):
    """A residual network whose convolutions belong to many domains: they share a core, each has factors of its own.

    Bulat et al. 2020, arXiv 1904.06345. Use it to serve many tasks from one network: the core is trained with the first
    domain, then frozen (``train_domain``), and what a further one adds is a few thousand numbers. No domain changes
    another: outputs stay equal to the last bit. ``save_domains`` writes a file for the core and one for each domain.

    Args:
        channels: of all layers.
        layers: convolutions of the stack, an even number; the picture is halved after the first pair.
        ranks: of (out, in, kernel, layers) of their tensor; full when left out.

    Raises:
        WeightError: an odd number of layers, or ranks that do not fit.

    Example:
        >>> net = MultiDomainNet(8, 4)
        >>> net.add_domain("digits", inputs=1, classes=10)
        >>> net(torch.randn(2, 1, 32, 32)).shape, net.added("digits")
        (torch.Size([2, 10]), 467)
    """

    def __init__(self, channels: int = 24, layers: int = 6, ranks: tuple[int, int, int, int] | None = None) -> None:
        super().__init__()
        if layers < 2 or layers % 2:
            msg = f"layers={layers} are pairs: an even number from 2"
            raise WeightError(msg)
        self.channels, self.layers = channels, layers
        self.stack = DomainConvStack(channels, 3, layers, ranks)
        self.domains = nn.ModuleDict()
        self.domain: str | None = None

    def add_domain(self, name: str, *, inputs: int, classes: int, like: str | None = None) -> None:
        """Add a domain and use it.

        Args:
            name: of the domain.
            inputs: channels of its pictures.
            classes: of its head.
            like: a domain whose factors it begins with; parts of the identity when left out.

        Raises:
            WeightError: the name is taken, or none that a module can have.
            UnknownNameError: no domain ``like``.
        """
        if name in self.domains or not name.isidentifier():
            msg = f"a domain {name!r} is there already, or its name is no identifier; there are {list(self.domains)}"
            raise WeightError(msg)
        if like is not None:
            self._known(like)
        self.stack.add(name, like)
        self.domains[name] = Domain(inputs, classes, self.channels, self.layers).to(self.stack.core)
        self.use(name)

    def use(self, name: str) -> None:
        """Make ``forward`` that of a domain.

        Raises:
            UnknownNameError: no such domain.
        """
        self.domain = self._known(name)

    def train_domain(self, name: str, *, core: bool = False) -> None:
        """Use a domain, and let only what is its own require gradients; the core too where that is said."""
        self.use(name)
        own = {id(p) for _, p in self._own(name)}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in own or (core and parameter is self.stack.core))

    def added(self, name: str) -> int:
        """Return how many parameters a domain has of its own."""
        return sum(p.numel() for _, p in self._own(self._known(name)))

    def domain_state(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a domain, buffers included, under their names in the state dict of the network."""
        self._known(name)
        starts = (f"stack.factors.{name}.", f"domains.{name}.")
        return {key: value for key, value in self.state_dict().items() if key.startswith(starts)}

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (batch, classes) of pictures (batch, inputs, rows, columns) of the domain in use."""
        if self.domain is None:
            msg = "there is no domain yet: add_domain(name, inputs=..., classes=...)"
            raise WeightError(msg)
        own: Any = self.domains[self.domain]
        if x.dim() != 4 or x.shape[1] != own.inputs:
            msg = f"pictures of the shape {tuple(x.shape)}; the domain {self.domain} takes (batch, {own.inputs}, ...)"
            raise WeightError(msg)
        kernels = self.stack.weights(self.domain).unbind(0)
        x = own.norms[0](own.stem(x)).relu()
        for k in range(0, self.layers, 2):
            inner = own.norms[k + 1](F.conv2d(x, kernels[k], padding=1)).relu()
            x = (x + own.norms[k + 2](F.conv2d(inner, kernels[k + 1], padding=1))).relu()
            x = F.avg_pool2d(x, 2) if k == 0 else x
        scores: Tensor = own.head(x.mean((2, 3)))
        return scores

    def _known(self, name: str) -> str:
        if name not in self.domains:
            msg = f"unknown domain {name!r}. {did_you_mean(name, list(self.domains))}"
            raise UnknownNameError(msg)
        return name

    def _own(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        starts = (f"stack.factors.{name}.", f"domains.{name}.")
        return ((key, p) for key, p in self.named_parameters() if key.startswith(starts))
