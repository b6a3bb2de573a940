"""How a cell runs along a sequence: in torch's own kernel, with the states' factors multiplied out, or by steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tenfold.layers.factorized import FactorizedLayer
from tenfold.tensors import untransformed, version_of

State = tuple[Tensor, ...]

# Multiplications that take as long as what else a step in Python does, and each weight that oneDNN lays out for a call.
# Measured on one core (AVX-512): of no consequence for the outputs, and for the speed only where both ways are close.
_STEP, _LAYOUT = 400_000, 20
_AT_ONCE = 4  # samples that oneDNN multiplies at once in the time of one
_WIDE = 4  # times as wide as the states: inputs whose matrix is not multiplied out where the batch is not known yet


class Way:
    """What is known of a cell's layers for as long as they are the same ones, nobody watches them and none is wrapped.

    Args:
        parts: see ``plain_parts``.
        ih: the layer of the inputs.
        hh: the layer of the states.

    Attributes:
        parts: as given.
        before: what the inputs go through before the matrix of the gates: factors of low rank but for the last.
        last: the layer of this matrix: the last factor, or all of ``ih``.
    """

    def __init__(self, parts: Sequence[nn.Module], ih: Any, hh: Any) -> None:
        self.parts, self._hh, self._kept = parts, hh, dict[int, tuple[Any, Tensor]]()
        stages, ends = _stages(ih), _stages(hh)
        split = type(stages[-1]) is nn.Linear
        self.before, self.last = (stages[:-1], stages[-1]) if split else ((), ih)
        self._inputs = 0 if split else ih.in_features * ih.out_features
        self._narrow = split or ih.in_features <= _WIDE * hh.in_features
        self._dense = hh.in_features * hh.out_features
        plain = all(type(stage) is nn.Linear for stage in ends)
        self._low = sum(stage.weight.numel() for stage in ends) if plain else 2 * self._dense

    def fuses(self, x: Tensor, steps: int, rows: int, *, onednn: bool) -> bool:
        """Return whether torch's kernel is faster than steps in Python; where the batch is open, whether it can run.

        The kernel multiplies with dense matrices, which takes no longer than in torch's own network, and oneDNN copies
        them into its own layout in each call: what pays for long sequences. A step in Python takes a constant, and less
        for factors of the states, of which only low-rank ones (plain matrices) run as fast as dense ones.

        Args:
            x: inputs.
            steps: of the longest sequence.
            rows: of all sequences together.
            onednn: whether the kernel is that of oneDNN: an LSTM in single or half precision, unpacked.
        """
        if _traced():
            return self._narrow
        kernel, stepped = self._inputs * rows // _AT_ONCE, _STEP * steps
        if x.device.type == "cpu":
            copied = self._dense * (max(steps, rows // _AT_ONCE) + _LAYOUT)
            kernel += copied if onednn else self._dense * (rows + steps)
            stepped += self._low * (rows + steps)
        return kernel <= stepped

    def weights(self, *, bias: bool) -> list[Tensor]:
        """Return both matrices of the gates and their biases, as the kernel takes them."""
        layers = (self.last, self._hh)
        made = [self._product(side, layer) for side, layer in enumerate(layers)]
        return [*made, *(layer.bias for layer in layers)] if bias else made

    def _product(self, side: int, layer: Any) -> Tensor:
        """Return the dense weight of a layer; gradients reach its factors.

        On a CPU and without gradients it is multiplied out once. What tells that it has to be again: where the factors
        lie, how often they were changed in place, and their sums, since torch does not count what ``data`` is used for.
        """
        if type(layer) is nn.Linear:
            return layer.weight
        factors: list[Tensor] = [stage.weight for stage in _stages(layer)]
        if torch.is_grad_enabled() or _traced() or factors[0].device.type != "cpu":
            made: Tensor = layer.factorization().to_dense()
            return made
        now = [(f.data_ptr(), f.dtype, version_of(f), f.sum().item()) for f in factors]
        before, kept = self._kept.get(side, (None, factors[0]))
        if before != now:
            kept = layer.factorization().to_dense()
            self._kept[side] = now, kept
        return kept


def plain_parts(*layers: nn.Module) -> tuple[nn.Module, ...] | None:
    """Return layers and their stages if all are linear or factorized ones as they were made, which nobody watches.

    Their weights say then what they do. Others (None) have to be called, step by step.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> plain_parts(layer), layer.register_forward_hook(print) and plain_parts(layer)
        ((Linear(in_features=2, out_features=3, bias=True),), None)
    """
    parts: list[nn.Module] = []
    for layer in layers:
        if type(layer) is not nn.Linear and type(layer) is not FactorizedLayer:
            return None
        stages = _stages(layer)
        parts += (layer,) if stages[0] is layer else (layer, *stages)
    for part in parts:
        own = vars(part)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return None
        weight = own["_parameters"].get("weight")
        if type(weight) is not nn.Parameter and weight is not None and is_traceable_wrapper_subclass(weight):
            return None
    return tuple(parts)


def _stages(layer: Any) -> tuple[Any, ...]:
    """Return the stages of a factorized layer, and any other as it is."""
    if type(layer) is not FactorizedLayer:
        return (layer,)
    return tuple(layer._modules["stages"]._modules.values())  # type: ignore[union-attr]


def run_fused(
    kernel: Callable[..., Any], way: Way, x: Tensor, sizes: list[int], state: State, *, bias: bool, backwards: bool
) -> tuple[Tensor, State]:
    """Return outputs and the last state of one cell, by torch's kernel.

    Args:
        kernel: ``torch.lstm`` or ``torch.gru``.
        way: of the cell.
        x: inputs, (steps, sequences, features) or packed (Σ sizes, features).
        sizes: sequences that run at each step, the longest first.
        state: the first one, (1, sequences, hidden) each.
        bias: whether both matrices have one.
        backwards: whether the last step is the first.
    """
    for stage in way.before:
        x = functional.linear(x, stage.weight) if type(stage) is nn.Linear and stage.bias is None else stage(x)
    order = reversal(sizes).to(x.device) if backwards and x.dim() == 2 else None
    if backwards:
        x = x.flip(0) if order is None else x[order]
    hx: Any = state if state[0].dtype == x.dtype else [h.to(x.dtype) for h in state]
    hx = hx if len(hx) > 1 else hx[0]
    options = (way.weights(bias=bias), bias, 1, 0.0, torch.is_grad_enabled(), False)
    out, *last = kernel(x, hx, *options, False) if x.dim() == 3 else kernel(x, torch.tensor(sizes), hx, *options)  # noqa: FBT003 - batch_first
    if backwards:
        out = out.flip(0) if order is None else out[order]
    return out, tuple(last)


def stepping(layer: Any) -> Callable[[Tensor], Tensor]:
    """Return what multiplies states by a layer, without what a call of a module costs where nobody watches it."""
    chain = _stages(layer)
    if plain_parts(layer) is None or any(type(stage) is not nn.Linear for stage in chain):
        return layer  # type: ignore[no-any-return]
    weights = [(stage.weight, stage.bias) for stage in chain]

    def product(h: Tensor) -> Tensor:
        for weight, bias in weights:
            h = functional.linear(h, weight, bias)
        return h

    return product


def reversal(sizes: Sequence[int]) -> Tensor:
    """Return the order of packed rows in which each sequence runs from its end to its beginning.

    Example:
        >>> reversal([3, 1]).tolist()  # a0 b0 c0 a1 becomes a1 b0 c0 a0
        [3, 1, 2, 0]
    """
    counts = torch.tensor(sizes)
    starts = torch.tensor([0, *accumulate(sizes)])
    step = torch.arange(len(sizes)).repeat_interleave(counts)
    which = torch.arange(int(starts[-1])) - starts[step]
    lengths = (counts[None] > torch.arange(int(counts[0]))[:, None]).sum(1)
    return starts[lengths[which] - 1 - step] + which


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a transform of ``torch.func`` is at work on a tensor: fused kernels have no rules for these."""
    return untransformed(tensor) is not tensor


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
