"""Make layers of the matrices that a parameter stacks, such as the weights of all experts, so that plans reach them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from tenfold.errors import PlanError, ProfileError
from tenfold.layers import Stack, StackedLinear, stacked_parameters
from tenfold.surgery.model_outputs import agree, outputs_of
from tenfold.surgery.modules import find
from tenfold.tracing.layers import entries

_TURNED = ".T"  # marks the name of a parameter with matrices (in, out)


def stacks(model: nn.Module, inputs: Any) -> dict[str, str]:
    """Return the modules, by path, whose parameters of three axes are stacks of matrices, each with their names.

    The forward is asked, not the class: a parameter counts where every use of it is a product with single matrices of
    it, on one and the same side. ``w.T`` means that matrices (in, out) are stored. The forward runs twice, if there is
    any such parameter: with the parameters themselves, and with what watches their use, to the same outputs.

    Args:
        model: unchanged.
        inputs: example inputs, as ``call_model`` takes them.

    Example:
        >>> import torch
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.randn(4, 3, 5))
        ...
        ...     def forward(self, x, chosen):
        ...         return torch.bmm(self.w[chosen], x[:, :, None])[:, :, 0]
        >>> stacks(Experts(), (torch.randn(2, 5), torch.tensor([3, 1])))
        {'': 'w'}
    """
    found = dict(_candidates(model))
    if not found:
        return {}
    watched = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the structure alone
    watches = {
        path: {name: _put(find(watched, path), name, _Watch(parameter)) for name, parameter in own.items()}
        for path, own in found.items()
    }
    outputs = outputs_of(model, inputs)
    with suppress(ProfileError):
        if agree(outputs_of(watched, inputs), outputs):
            named = {path: [n + w.suffix for n, w in own.items() if w.is_stack] for path, own in watches.items()}
            return {path: ", ".join(names) for path, names in named.items() if names}
    return {}


def unstacked(model: nn.Module) -> dict[str, str]:
    """Return the modules, by path, that hold stacks of linear layers in place of parameters, with their names."""
    found = {}
    for path, module in model.named_modules():
        names = [n + _TURNED * m.transposed for n, m in module.named_children() if isinstance(m, StackedLinear)]
        if names:
            found[path] = ", ".join(names)
    return found


def unstack_(model: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """Put stacks of linear layers in place of parameters, in place; return the model. Outputs stay the same.

    Args:
        model: what is unstacked already stays so.
        kinds: as ``stacks`` returns it.

    Raises:
        PlanError: no such module, or no such parameter in it.
    """
    wanted = [(find(model, path), path, name) for path, kind in kinds.items() for name in kind.split(", ")]
    for module, path, name in wanted:
        held = getattr(module, name.removesuffix(_TURNED), None)
        if not isinstance(held, StackedLinear) and not (isinstance(held, nn.Parameter) and held.dim() == 3):
            msg = f"{path or 'the model'} has no parameter {name.removesuffix(_TURNED)!r} that stacks matrices"
            raise PlanError(msg)
    for module, _, name in wanted:
        held = getattr(module, name.removesuffix(_TURNED))
        if isinstance(held, nn.Parameter):
            _put(module, name.removesuffix(_TURNED), StackedLinear(held, transposed=name.endswith(_TURNED)))
    return model


def restack_(model: nn.Module) -> nn.Module:
    """Put parameters in place of all stacks of linear layers again, factors multiplied out; return the model."""
    for module in list(model.modules()):
        for name, stack in list(module.named_children()):
            if isinstance(stack, StackedLinear):
                trained = any(p.requires_grad for p in stack.parameters())
                _put(module, name, nn.Parameter(stack.dense().detach().contiguous(), trained))
    return model


class _Watch(Stack):
    """A parameter that notes how it is used."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape)
        self.weight = weight
        self.uses: set[str] = set()

    @property
    def is_stack(self) -> bool:
        """Whether single matrices were multiplied with, always on the same side, and nothing else was done."""
        return len(self.uses) == 1 and "read" not in self.uses

    @property
    def suffix(self) -> str:
        """What stands behind its name."""
        return _TURNED if self.uses == {"in, out"} else ""

    def multiply(self, number: int, x: Tensor, *, turned: bool) -> Tensor:
        """Return the product."""
        self.uses.add("out, in" if turned else "in, out")
        matrix = self.weight[number]
        return x @ (matrix.mT if turned else matrix)

    def dense(self) -> Tensor:
        """Return the parameter."""
        self.uses.add("read")
        return self.weight


def _candidates(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Iterate over the modules with parameters of their own that could be stacks, which no others share."""
    for layer in entries(model):
        own = stacked_parameters(layer.module)
        if own and layer.spec is None and not layer.tied:
            yield layer.path, own


def _put(module: nn.Module, name: str, stack: Any) -> Any:
    delattr(module, name)
    setattr(module, name, stack)
    return stack
