"""Decisions that a network makes on the way, by which rows are selected: which expert, which token, which branch.

Two networks whose activations differ a little decide differently, and then their layers see other rows. Here the
decisions of one are recorded, and imposed on the other: what routes the rows is then the same in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tenfold.tracing.inputs import tensors_in
from tenfold.tracing.watchers import Operation, Watcher, computes

# Operations that pick, place or count rows as whole numbers or truth values say.
_SELECTING = frozenset(
    (
        "_grouped_mm",
        "_index_put_impl",
        "_local_scalar_dense",
        "_unsafe_index",
        "addmm",
        "baddbmm",
        "bincount",
        "bmm",
        "embedding",
        "embedding_bag",
        "gather",
        "index",
        "index_add",
        "index_copy",
        "index_put",
        "index_select",
        "masked_scatter",
        "masked_select",
        "mm",
        "nonzero",
        "repeat_interleave",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "searchsorted",
        "split_with_sizes",
        "take",
    )
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

    def _key(self, operation: Operation) -> Key:
        path, number = (operation.running[-1].path, operation.running[-1].number) if operation.running else ("", 0)
        of_first = (path, number, str(operation.func), 0)
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
        self._lost = ""
        self._inside = False  # whether anything was computed within a module of the model

    def identify(self, tensor: Tensor, other: Tensor) -> None:
        """Let a tensor be of the same decisions as the one that it stands for."""
        origins = self._origins.get(other)
        if origins is not None:
            self._origins[tensor] = origins

    def operate(self, operation: Operation) -> Any:
        """Note what an operation decides, and by which decisions it selects."""
        self.looked |= not _LOOKING.isdisjoint(getattr(operation.func, "tags", ()))
        taken = operation.inputs
        origins = {id(origin): origin for tensor in taken for origin in self._origins.get(tensor, ())}
        if computes(operation.func):
            self._use(origins.values(), selects=operation.name.removesuffix("_") in _SELECTING)
        if self._lost:
            self.decisions.adrift |= {call.path: self._lost for call in operation.running}
        key = self._key(operation) if may_decide(operation) else None
        result = operation.compute()
        if any(_fractional(tensor) and tensor not in self._origins for tensor in taken):
            made = None if key is None else _decision(key, operation, result)
            origins = {} if made is None else {id(made): made}
            places_only = not isinstance(result, tuple) or operation.name == "sort"  # as argsort does
            if made is not None and made.result is not None and made.chooses and places_only:
                self.decisions.made[made.key] = made  # it may be read without an operation, as a list
            if operation.name in _UNSTEADY and self._inside:
                self._lost = f"{operation.func} draws as many random numbers as the values ask for that it is given"
        self._inside |= len(operation.running) > 1
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
        self._names = {key[2] for key in decisions.made}

    def operate(self, operation: Operation) -> Any:
        """Return what was decided, where this operation decided it."""
        if str(operation.func) not in self._names or not may_decide(operation):
            return operation.compute()
        made = self._decisions.made.get(self._key(operation))
        if made is None:
            return operation.compute()
        if not isinstance(made.result, Tensor):
            return made.result
        chosen = made.result.clone()
        return _values_at(chosen, operation) if operation.name in _WITH_PLACES else chosen


def may_decide(operation: Operation) -> bool:
    """Whether an operation may return whole numbers or truth values of fractional ones."""
    return computes(operation.func) and any(map(_fractional, operation.inputs))


def _decision(key: Key, operation: Operation, result: Any) -> Decision | None:
    """Return what an operation on activations decided, if it did."""
    chooses = torch.Tag.pointwise not in getattr(operation.func, "tags", ()) and operation.name != "_to_copy"
    if isinstance(result, bool | int | float):
        return Decision(key, result, chooses=True)
    places = [tensor for tensor in tensors_in(result) if not _fractional(tensor)]
    if not places:
        return None
    known = isinstance(result, Tensor) or (operation.name in _WITH_PLACES and len(places) == 1)
    return Decision(key, places[0].detach().clone() if known else None, chooses)


def _values_at(places: Tensor, operation: Operation) -> tuple[Tensor, Tensor]:
    """Return what an operation along an axis returns: the values at the places given, and these."""
    x, axis = operation.args[0], operation.by_name.get("dim", -1)
    if places.dim() == x.dim():
        return torch.take_along_dim(x, places, axis), places
    return torch.take_along_dim(x, places.unsqueeze(axis), axis).squeeze(axis), places


def _fractional(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
