"""A last layer of very many outputs, left out of forward and backward: what it sends back is drawn at its inputs.

Of a random projection gᵀy of the outputs y = W x + b of a model the gradient at y is g itself, standard normal numbers.
So that at x is Wᵀg, normal with the covariance WᵀW, whatever y is: neither is needed to draw from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from tenfold.decompositions.covariance import is_tall
from tenfold.decompositions.roots import sqrt_and_inverse_sqrt
from tenfold.decompositions.weighted_als import gram_through
from tenfold.errors import TenfoldError
from tenfold.tensors import squarable
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.memory import Memory
from tenfold.tracing.randomness import Randomness
from tenfold.tracing.replay import stand_in

Forward = Callable[[nn.Module, Any], Any]


class UnlikeOutputsError(Exception):
    """The outputs of a batch are not those of the first one with other values: the last layer has to run."""


@dataclass(eq=False)
class LastLayer:
    """A linear layer whose outputs a model returns as they are, and uses for nothing else.

    Attributes:
        path: of the layer.
        module: the layer.
        root: the symmetric square root (in, in) of WᵀW.
        place: which of the tensors that the model returns its outputs are.
        count: how many tensors the model returns.
    """

    path: str
    module: nn.Linear
    root: Tensor = field(repr=False)
    place: int = 0
    count: int = 1
    _entered: list[Tensor] = field(default_factory=list, repr=False)
    _hollow: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, model: nn.Module, batch: Any, forward: Forward) -> Self | None:
        """Return that layer of a model, as a forward shows; None where there is none, or nobody can be sure.

        Only what has many more outputs than inputs is worth it.

        Example:
            >>> from tenfold.tracing.inputs import call_model
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2000))
            >>> LastLayer.of(model, torch.ones(3, 4), call_model).path
            '2'
        """
        wide, memory = {path: module for path, module in model.named_modules() if _is_wide(module)}, Memory(model)
        if not wide:
            return None
        returned: list[tuple[str, ReferenceType[Tensor]]] = []
        with evaluating(model), Randomness(model, batch).seeded(0), ExitStack() as stack:
            for path, module in wide.items():
                stack.enter_context(module.register_forward_hook(_noting(path, returned)))
            whole = list(tensors_in(forward(model, batch)))
        ends = [path for tensor in whole for path, output in returned if output() is tensor]
        if len(ends) != 1:  # none, or one that is called several times
            return None
        found = cls(ends[0], wide[ends[0]], wide[ends[0]].weight.new_zeros(0))
        with evaluating(model), Randomness(model, batch).seeded(0):
            try:
                with found._standing_in():
                    without = list(tensors_in(forward(model, batch)))
            except (TenfoldError, RuntimeError):
                without = []
        changed, _ = memory.restore()
        if changed or len(without) != len(whole) or len(found._hollow) != 1:
            return None
        others = [i for i, tensor in enumerate(without) if tensor is not found._hollow[0]]
        if len(others) != len(whole) - 1 or not all(torch.equal(whole[i], without[i]) for i in others):
            return None
        found.place, found.count = ({*range(len(whole))} - {*others}).pop(), len(whole)
        own, stood = whole[found.place], without[found.place]
        if own.shape != stood.shape or own.dtype != stood.dtype:
            return None
        found.root = sqrt_and_inverse_sqrt(gram_through(found.module.weight.detach()[None]))[0][0].float()
        return found

    def run(self, model: nn.Module, batch: Any, forward: Forward) -> list[Tensor]:
        """Return the tensors that the model returns for a batch, of the layer what enters it in place of its outputs.

        Raises:
            UnlikeOutputsError: they are others than of the batch that the layer was found on.
        """
        with self._standing_in():
            found = list(tensors_in(forward(model, batch)))
        if len(found) != self.count or len(self._hollow) != 1 or found[self.place] is not self._hollow[0]:
            raise UnlikeOutputsError
        found[self.place] = self._entered[0]
        self._entered.clear()
        return found

    def leave_out(self, model: nn.Module, batch: Any) -> Any:
        """Return what a model of this structure returns for a batch, the outputs of the layer hollow."""
        with stand_in(model.get_submodule(self.path), self._nothing):
            return call_model(model, batch)

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """Let the layer return nothing, and take note of what entered it and of what it returned."""
        self._entered.clear()
        self._hollow.clear()

        def forward(x: Tensor) -> Tensor:
            self._entered.append(x)
            self._hollow.append(self._nothing(x))
            return self._hollow[-1]

        with stand_in(self.module, forward):
            yield

    def _nothing(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of the outputs that takes the memory of one element."""
        return x.new_full((1,), torch.nan).expand(*x.shape[:-1], self.module.out_features)

    def sent_back(self, drawn: Tensor) -> Tensor:
        """Return gradients Wᵀg at the inputs (..., in), of standard normal numbers (..., in)."""
        return (squarable(drawn) @ self.root.to(drawn.device)).to(drawn.dtype)


def _noting(path: str, returned: list[tuple[str, ReferenceType[Tensor]]]) -> Callable[..., None]:
    def leave(_module: nn.Module, _args: Any, output: Tensor) -> None:
        returned.append((path, ref(output)))

    return leave


def _is_wide(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer of very many outputs that nothing watches."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or module.weight.is_meta:
        return False
    if type(module.weight) is not nn.Parameter:  # a quantized one, of a class of its own
        return False
    own = vars(module)  # what somebody has put on it
    watched = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
    return is_tall(module.weight[None]) and not watched and not hasattr(module, "parametrizations")
