"""Decisions that a network makes on the way, by which rows are selected: which expert, which token, which branch.

Two networks whose activations differ a little decide differently, and then their layers see other rows. Here the
decisions of one are recorded, and imposed on the other: what routes the rows is then the same in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tenfold.tracing.inputs import tensors_in
from tenfold.tracing.trace import ModuleCall, Watcher, computes

# Operations that pick, place or count rows as whole numbers or truth values say.
_SELECTING = frozenset(
    "index index_select gather take masked_select masked_scatter masked_scatter_ nonzero index_add index_add_ "
    "index_copy index_copy_ index_put index_put_ _index_put_impl_ _unsafe_index scatter scatter_ scatter_add "
    "scatter_add_ scatter_reduce scatter_reduce_ repeat_interleave embedding embedding_bag _local_scalar_dense "
    "bincount searchsorted mm bmm addmm baddbmm _grouped_mm split_with_sizes".split()
)
# Operations that return values, and beside them the places along an axis where these were found.
_WITH_PLACES = frozenset(("max", "min", "topk", "sort", "kthvalue", "median", "nanmedian", "mode"))
# Operations that draw by rejection.
_UNSTEADY = frozenset(("poisson", "binomial", "_standard_gamma", "_sample_dirichlet"))
_LOOKING = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))

Key = tuple[str, int, str, int]  # module, which of its calls, operation, and which of these in the call


@dataclass(eq=False)
class Decision:
    """What an operation decided: the whole numbers, truth values or plain number that it returned.

    Attributes:
        key: where, and by which operation.
        result: a tensor, a plain number, or None of an operation whose results cannot be imposed.
        chooses: whether it chose places among many, as argmax does, and did not judge one number at a time.
    """

    key: Key
    result: Any
    chooses: bool


@dataclass(eq=False)
class Decisions:
    """The decisions of one forward that select rows.

    Attributes:
        made: by where they were made.
        adrift: modules that started when the rows of two networks could no longer be held together, with the reason.
    """

    made: dict[Key, Decision] = field(default_factory=dict)
    adrift: dict[str, str] = field(default_factory=dict)


class _Counting(Watcher):
    """Numbers the operations within each call of a module."""

    def __init__(self) -> None:
        self._counts: Counter[Key] = Counter()

    def _key(self, running: Sequence[ModuleCall], func: Any) -> Key:
        path, number = (running[-1].path, running[-1].number) if running else ("", 0)
        of_first = (path, number, str(func), 0)
        self._counts[of_first] += 1
        return (*of_first[:3], self._counts[of_first])


class Recorder(_Counting):
    """Records the decisions of a forward that select rows, as far as torch computes them: not those of numpy or lists.

    A decision is a whole number or truth value computed from activations. Choices of a place (argmax, top-k, sort)
    count once anything takes them; comparisons of single numbers only where they, or what is computed of them alone,
    select rows: not the sign by which an activation function bends.

    Attributes:
        decisions: what was found so far.
        looked: whether plain numbers or shapes were computed of values, by which the way could change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decisions = Decisions()
        self.looked = False
        self._origins = WeakTensorKeyDictionary()  # the decisions that a tensor was computed of, of these alone
        self._lost, self._ran = "", False

    def enter(self, running: Sequence[ModuleCall], inputs: Any) -> None:
        """Note modules that start once rows cannot be held together."""
        if self._lost:
            self.decisions.adrift.setdefault(running[-1].path, self._lost)

    def leave(self, call: ModuleCall, running: Sequence[ModuleCall], output: Any) -> None:
        """Note that what follows may depend on layers."""
        self._ran = True

    def operate(
        self, running: Sequence[ModuleCall], func: Any, args: Any, kwargs: Any, compute: Callable[[], Any]
    ) -> Any:
        """Note what an operation decides, and by which decisions it selects."""
        self.looked |= not _LOOKING.isdisjoint(getattr(func, "tags", ()))
        taken = list(tensors_in((args, kwargs)))
        origins = {id(origin): origin for tensor in taken for origin in self._origins.get(tensor, ())}
        if computes(func):
            self._use(origins.values(), selects=_name(func) in _SELECTING)
        key = self._key(running, func) if may_decide(func, taken) else None
        result = compute()
        if any(_fractional(tensor) and tensor not in self._origins for tensor in taken):
            made = None if key is None else _decision(key, func, result)
            origins = {} if made is None else {id(made): made}
            if made is not None and not isinstance(result, tuple) and (made.chooses or not isinstance(result, Tensor)):
                self.decisions.made[made.key] = made  # it may be read without an operation, as a list
            if _name(func) in _UNSTEADY and self._ran:
                self._lost = f"{func} draws as many random numbers as the values ask for that it is given"
        if origins:
            for tensor in tensors_in(result):
                if not (_fractional(tensor) and isinstance(result, tuple)):
                    self._origins[tensor] = tuple(origins.values())
        return result

    def _use(self, origins: Iterable[Decision], *, selects: bool) -> None:
        for origin in origins:
            if origin.result is not None and (selects or origin.chooses):
                self.decisions.made[origin.key] = origin
            elif origin.result is None and selects:
                self._lost = f"{origin.key[2]} selects its rows, by values that the layers before it change"


class Imposed(_Counting):
    """Lets a forward decide as another did.

    Args:
        decisions: of a network of the same structure on the same inputs.
    """

    def __init__(self, decisions: Decisions) -> None:
        super().__init__()
        self._decisions = decisions

    def operate(
        self, running: Sequence[ModuleCall], func: Any, args: Any, kwargs: Any, compute: Callable[[], Any]
    ) -> Any:
        """Return what was decided, where this operation decided it."""
        if not may_decide(func, tensors_in((args, kwargs))):
            return compute()
        made = self._decisions.made.get(self._key(running, func))
        if made is None:
            return compute()
        if isinstance(made.result, Tensor):
            chosen = made.result.clone()
            return _values_at(chosen, func, args, kwargs) if _name(func) in _WITH_PLACES else chosen
        return made.result


def may_decide(func: Any, taken: Iterable[Tensor]) -> bool:
    """Whether an operation returns whole numbers or truth values of fractional ones, as far as its name tells.

    Example:
        >>> x = torch.ones(2)
        >>> may_decide(torch.ops.aten.argmax.default, [x]), may_decide(torch.ops.aten.argmax.default, [x.long()])
        (True, False)
    """
    return computes(func) and any(map(_fractional, taken))


def _decision(key: Key, func: Any, result: Any) -> Decision | None:
    """Return what an operation on activations decided, if it did."""
    chooses = torch.Tag.pointwise not in getattr(func, "tags", ()) and _name(func) != "_to_copy"
    places = [tensor for tensor in tensors_in(result) if not _fractional(tensor)]
    if isinstance(result, Tensor | bool | int | float):
        found = places[0].detach().clone() if places else None if isinstance(result, Tensor) else result
        return None if found is None else Decision(key, found, chooses)
    if not places:
        return None
    known = _name(func) in _WITH_PLACES and len(places) == 1
    return Decision(key, places[0].detach().clone() if known else None, chooses)


def _values_at(places: Tensor, func: Any, args: Any, kwargs: Any) -> Any:
    """Return what an operation on its first argument returns: values along an axis, and the places given for them."""
    schema = getattr(func, "_schema", None)
    named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs if schema else kwargs
    x, axis = args[0], named.get("dim", -1)
    if places.dim() == x.dim():
        return torch.take_along_dim(x, places, axis), places
    return torch.take_along_dim(x, places.unsqueeze(axis), axis).squeeze(axis), places


def _fractional(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _name(func: Any) -> str:
    return str(getattr(getattr(func, "overloadpacket", func), "__name__", ""))
