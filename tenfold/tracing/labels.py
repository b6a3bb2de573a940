"""Tell labels from inputs in a batch, by the example inputs and the signature of the forward."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tenfold.errors import DataError, warn
from tenfold.tracing.inputs import arguments, describe_inputs, tensors_in

_NAMES = frozenset({"label", "labels", "target", "targets", "y", "label_ids", "start_positions", "end_positions"})
_SHAPES = re.compile(r"\[[^]]*\]")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class BatchReader:
    """Reads the inputs of a forward from batches that may hold labels too, and says once what it leaves out.

    The example inputs fix the structure: so many arguments, these keywords. What a batch holds beyond is an input only
    where the forward has an optional argument for it and it does not look like labels, which are integers (batch,), one
    for each sample, or have such a name. Without example inputs, the arguments that the forward requires count.

    Args:
        model: whose forward it is.
        example: inputs that it takes; None where nobody knows any.

    Example:
        >>> import torch
        >>> pair = [torch.zeros(2, 3), torch.zeros(2, 4)]
        >>> [tuple(t.shape) for t in BatchReader(nn.Bilinear(3, 4, 5)).read(pair)]
        [(2, 3), (2, 4)]
    """

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        self._example = example
        self._notes: list[str] = []  # of the batch at hand
        self._said: set[str] = set()
        parameters = _parameters(model)
        self._positional = [p for p in parameters if p.kind in _POSITIONAL]
        self._named = {p.name: p for p in parameters if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}}
        self._variable = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self._required = {name for name, p in self._named.items() if p.default is p.empty}
        self._args, self._kwargs = ((), {}) if example is None else arguments(example)

    def read(self, batch: Any) -> Any:
        """Return the inputs of a batch, as ``call_model`` takes them.

        Raises:
            DataError: the batch has no inputs that the forward takes.

        Warns:
            TenfoldWarning: something was left out, or taken for an optional argument; once for each.
        """
        self._notes.clear()
        inputs = self.inputs_of(batch)
        if not _holds_tensors(inputs) and (self._example is None or _holds_tensors(self._example)):
            msg = (
                f"a batch of the data is {_described(batch)}, without a tensor: the forward takes "
                f"{self._wanted()}. Texts are tokenized and pictures converted first, by the collate_fn of a DataLoader"
            )
            raise DataError(msg)
        for note in self._notes:
            key = _SHAPES.sub("", note)  # the last batch may be smaller
            if key not in self._said:
                self._said.add(key)
                msg = (
                    f"in each batch of the data {note}. Give the inputs alone, as the forward takes them, to decide it"
                )
                warn(msg)
        return inputs

    def inputs_of(self, batch: Any) -> Any:
        """Return the inputs of a batch, or what comes nearest to them."""
        if isinstance(batch, Mapping):
            return self._of_mapping(batch)
        if isinstance(batch, tuple | list) and not self._is_one_argument(batch):
            return self._of_sequence(batch)
        self._check_number((batch,))
        return batch

    # --- tuples and lists ---

    def _is_one_argument(self, batch: Any) -> bool:
        """Whether a list or named tuple is one argument, as it is in the example inputs."""
        if isinstance(batch, PackedSequence):
            return True
        alike = len(self._args) == 1 and type(batch) is type(self._args[0]) and type(batch) is not tuple
        return alike and not (batch and isinstance(batch[0], tuple | list))

    def _of_sequence(self, batch: Sequence[Any]) -> Any:
        if self._example is None:
            return self._by_signature(batch)
        if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
            args, kwargs = arguments(batch)
            known = kwargs.keys() <= self._named.keys() | self._kwargs.keys() if kwargs else not self._kwargs
            if len(args) == len(self._args) and known and not (self._args and _holds(args[0], self._args[0])):
                return batch
        takes_list = len(self._args) == 1 and isinstance(self._args[0], list)
        if len(batch) == 2 and _holds(batch[0], None if takes_list or not self._args else self._args[0]):
            self._note(_left_out(batch[1:], 1))  # inputs and targets, as ``finetune`` takes them
            return self.inputs_of(list(batch[0]) if takes_list else batch[0])
        if self._kwargs and not self._args:
            return self._onto_keywords(batch)
        self._check_number(batch)
        return self._with_optional(batch, len(self._args))

    def _check_number(self, batch: Sequence[Any]) -> None:
        """Raise DataError for a batch with fewer elements than the forward cannot do without."""
        need = [p.name for p in self._positional[: len(self._args)] if p.name in self._required]
        if len(batch) < len(need):
            msg = (
                f"a batch of the data is {_described(batch[0]) if len(batch) == 1 else _described(batch)}, and the "
                f"forward takes {describe_inputs(self._example)}. Pass batches of the same structure"
            )
            raise DataError(msg)

    def _onto_keywords(self, batch: Sequence[Any]) -> Any:
        """Return the elements by the keywords of the example inputs, in their order."""
        pairs = dict(zip(self._kwargs, batch, strict=False))
        alike = all(_alike(value, self._kwargs[name]) for name, value in pairs.items())
        if not alike or not pairs:
            msg = (
                f"a batch of the data is {_described(batch)}, and the example inputs are "
                f"{describe_inputs(self._example)}: pass mappings with these names"
            )
            raise DataError(msg)
        rest = batch[len(pairs) :]
        self._note(f"the elements are taken as {', '.join(pairs)}, in this order")
        self._note(_left_out(rest, len(pairs)))
        return pairs

    def _with_optional(self, batch: Sequence[Any], many: int) -> Any:
        """Return the first elements, and those of the rest that optional arguments take."""
        taken = list(batch[:many])
        for element, parameter in zip(batch[many:], self._positional[many:], strict=False):
            if parameter.name in self._kwargs or not _takes(parameter, element, taken[0]):
                break
            taken.append(element)
            self._note(f"element {len(taken)} ({_described(element)}) is taken as {parameter.name!r}")
        self._note(_left_out(batch[len(taken) :], len(taken)))
        if self._kwargs:
            return tuple(taken), dict(self._kwargs)
        return taken[0] if len(taken) == 1 and not isinstance(taken[0], Mapping | tuple) else tuple(taken)

    def _by_signature(self, batch: Sequence[Any]) -> Any:
        """Return the inputs of a batch of which nothing is known but the forward."""
        plain = isinstance(batch, tuple) and not hasattr(batch, "_fields")
        args, kwargs = arguments(batch) if plain else (tuple(batch), {})
        most = len(self._positional)
        if kwargs or self._variable or not most or not all(isinstance(a, Tensor) for a in args):
            return batch
        if plain and len(args) <= most:
            return batch  # the arguments one by one, as ``call_model`` takes them
        need = max(1, sum(p.name in self._required for p in self._positional))
        labelled = len(args) > need and all(_is_label(a, args[0]) for a in args[need:])
        if not plain and not (1 < need == len(args)) and not labelled:
            return batch  # a list is one argument
        return self._with_optional(args, need)

    # --- mappings ---

    def _of_mapping(self, batch: Mapping[str, Any]) -> Any:
        if len(self._args) == 1 and isinstance(self._args[0], Mapping):
            wanted = self._args[0].keys()
            kept = {k: v for k, v in batch.items() if k in wanted or not _is_label(v, None, k)}
            self._note_keys(batch, kept)
            return (kept, {})
        kept = {k: v for k, v in batch.items() if k in self._kwargs or self._accepts(k, v)}
        if not kept and self._args and not self._kwargs:
            inputs = [v for k, v in batch.items() if isinstance(v, Tensor) and not _is_label(v, None, k)]
            if len(inputs) == len(self._args):
                names = [k for k, v in batch.items() if any(v is x for x in inputs)]
                self._note(f"{', '.join(map(repr, names))} is what the forward is called with")
                return inputs[0] if len(inputs) == 1 else tuple(inputs)
        missing = [n for n in self._required - kept.keys() if n in self._named]
        if not kept or missing:
            msg = (
                f"a batch of the data has the keys {', '.join(map(str, batch))}, and the forward takes {self._wanted()}"
                f"{': it lacks ' + ', '.join(sorted(missing)) if kept else ''}. Name the inputs as the forward does"
            )
            raise DataError(msg)
        self._note_keys(batch, kept)
        return kept if len(kept) < len(batch) else batch

    def _accepts(self, name: str, value: Any) -> bool:
        """Whether the forward has an argument of that name, and it is none for labels."""
        if name in self._required:
            return True
        named = not self._named or name in self._named  # some take any keywords
        if not isinstance(value, Tensor):
            return named and (isinstance(value, bool | None) or _holds_tensors(value))
        return named and not _is_label(value, None, name)

    def _note_keys(self, batch: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
        left = [str(k) for k in batch if k not in kept]
        if left:
            self._note(f"{', '.join(map(repr, left))} {'is' if len(left) == 1 else 'are'} left out")

    def _wanted(self) -> str:
        if self._example is not None:
            return describe_inputs(self._example)
        return f"({', '.join(self._named)})"

    def _note(self, what: str) -> None:
        if what:
            self._notes.append(what)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    inner = getattr(model, "_orig_mod", None) or (model.module if isinstance(model, nn.DataParallel) else model)
    try:
        return list(inspect.signature(inner.forward).parameters.values())
    except (TypeError, ValueError):  # scripted, for instance: it takes what the example inputs have
        return []


def _is_label(value: Any, inputs: Any, name: str = "") -> bool:
    """Whether a value looks like labels: by its name, or as integers, one for each sample."""
    if name.lower() in _NAMES or not isinstance(value, Tensor):
        return True
    if value.is_floating_point() or value.is_complex():
        return False
    if value.dim() <= 1:
        return not name
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.dim() > 2:
        return value.shape == (*inputs.shape[:1], *inputs.shape[2:])  # a class for each pixel
    return not name and value.dim() == 2 and value.shape[1] == 1


def _takes(parameter: inspect.Parameter, element: Any, inputs: Any) -> bool:
    """Whether an optional argument is meant for an element of a batch beside the inputs."""
    if parameter.default is not parameter.empty and parameter.default is not None:
        return False  # an option such as a flag
    if parameter.name.lower() in _NAMES or _is_label(element, inputs):
        return False
    if "mask" in parameter.name and isinstance(inputs, Tensor):
        return bool(element.dim() > 1 and element.shape[:1] == inputs.shape[:1] and element.shape[1] > 1)
    return True


def _alike(value: Any, example: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and isinstance(example, Tensor)
        and value.dim() == example.dim()
        and value.is_floating_point() == example.is_floating_point()
    )


def _holds(value: Any, example: Any) -> bool:
    """Whether a value is a structure of inputs where the example has one tensor."""
    if isinstance(example, Tensor | None):
        return isinstance(value, Mapping | tuple | list) and not isinstance(value, PackedSequence)
    return False


def _holds_tensors(inputs: Any) -> bool:
    if isinstance(inputs, Mapping | tuple | list):
        return next(tensors_in(arguments(inputs)), None) is not None
    return not isinstance(inputs, str | bytes | int | float | None)  # a tensor, or a structure of somebody's own


def _left_out(rest: Sequence[Any], before: int) -> str:
    shown = ", ".join(f"element {before + i} ({_described(x)})" for i, x in enumerate(rest, start=1))
    return shown and f"{shown} {'is' if len(rest) == 1 else 'are'} left out, as labels"


def _described(value: Any) -> str:
    return describe_inputs((value,))[1:-1].removesuffix(",")
