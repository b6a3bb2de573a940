"""Matrices of a stack as one tensor, whose products are left to the stack: which of torch's functions are products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from tenfold.layers.lazy_weight import LazyWeight


class Multiplier(Protocol):
    """What holds a stack of matrices (count, rows, columns), and knows how to multiply with each of them."""

    full_shape: tuple[int, ...]

    def multiply(self, number: int, x: Tensor, *, turned: bool) -> Tensor:
        """Return x (..., k) times the matrix of this number, or times its transpose."""

    def dense(self) -> Tensor:
        """Return all matrices."""


class Matrices(LazyWeight):
    """Matrices of a stack (..., rows, columns), picked by ``numbers`` (...), perhaps transposed, as a tensor.

    A product with it, by whatever function of torch, is one call of ``multiply`` for each matrix, with all that it
    meets, and none for a matrix that meets nothing. Indexing and transposing give such tensors again. Any other
    function gets the entries themselves.
    """

    stack: Multiplier
    numbers: Tensor
    turned: bool

    @classmethod
    def picked(cls, stack: Multiplier, numbers: Tensor, like: Tensor, *, turned: bool = False) -> Self:
        """Return matrices, or their transposes, in the dtype of ``like``."""
        rows, columns = stack.full_shape[:0:-1] if turned else stack.full_shape[1:]

        def make() -> Tensor:
            chosen = stack.dense()[numbers]
            return chosen.mT if turned else chosen

        made = cls.of((*numbers.shape, rows, columns), like, make)
        made.stack, made.numbers, made.turned = stack, numbers, turned
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return a product, or what stands for other matrices; else what the function makes of the numbers."""
        name = getattr(func, "__name__", str(func)).rpartition(".")[2]
        own = _GETTERS.get(func) or _FUNCTIONS.get(name)
        made = NotImplemented if own is None else own(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs) if made is NotImplemented else made

    def other(self, numbers: Tensor, *, turn: bool = False) -> Matrices:
        """Return other matrices of the stack, or the transposes."""
        return Matrices.picked(self.stack, numbers, self, turned=self.turned != turn)

    @property
    def transposes(self) -> Matrices:
        """The transposes of these matrices."""
        return self.other(self.numbers, turn=True)

    def after(self, x: Tensor) -> Tensor:
        """Return x @ these matrices, as ``torch.matmul`` does."""
        if not self.numbers.dim():
            return self.stack.multiply(int(self.numbers), x, turned=self.turned)
        if x.dim() == 1:
            return self.after(x[None]).squeeze(-2)
        shape = torch.broadcast_shapes(x.shape[:-2], self.numbers.shape)
        numbers, lines = self.numbers.expand(shape).flatten().to(x.device), x.shape[-2]
        order = numbers.argsort(stable=True)
        rows = x.expand(*shape, *x.shape[-2:])[torch.unravel_index(order, shape)].flatten(0, 1)
        met = numbers[order].unique_consecutive(return_counts=True)
        found, counts = (each.tolist() for each in met)
        out = self.grouped(rows, found, [lines * count for count in counts])
        made: Tensor = out.unflatten(0, (len(numbers), lines))[order.argsort()].unflatten(0, shape)
        return made

    def grouped(self, rows: Tensor, numbers: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return the products (n, columns) of rows (n, k), so many of which meet the matrix of each number.

        Rows beyond are not multiplied: they become zero.
        """
        rest = len(rows) - sum(sizes)
        parts = [
            self.stack.multiply(number, part, turned=self.turned)
            for number, part in zip(numbers, rows.split([*sizes, rest]), strict=False)
            if len(part)
        ]
        return torch.cat([*parts, rows.new_zeros(rest, self.shape[-1])]) if rest or not parts else torch.cat(parts)


def _matmul(left: Any, right: Any, **options: Any) -> Any:
    if options or isinstance(left, Matrices) == isinstance(right, Matrices):
        return NotImplemented
    if isinstance(right, Matrices):
        return right.after(left)
    made = left.transposes.after(right.mT if right.dim() > 1 else right)
    return made.mT if right.dim() > 1 else made


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Matrices) or weight.numbers.dim():
        return NotImplemented
    made = weight.transposes.after(x)
    return made if bias is None else made + bias


def _add_product(bias: Tensor, left: Any, right: Any, **options: Any) -> Any:
    made = _matmul(left, right, **options)
    return made if made is NotImplemented else bias + made


def _grouped(x: Any, matrices: Any, offs: Tensor | None = None, **options: Any) -> Any:
    """Return what ``grouped_mm`` does for rows (n, k), sorted by matrix, that of each ending at ``offs`` (count,)."""
    plain = isinstance(matrices, Matrices) and matrices.numbers.dim() == 1 and x.dim() == 2
    if not plain or offs is None or any(option is not None for option in options.values()):
        return NotImplemented
    ends = offs.tolist()
    return matrices.grouped(x, matrices.numbers.tolist(), [b - a for a, b in zip([0, *ends], ends, strict=False)])


def _einsum(equation: str, *operands: Any) -> Any:
    """Return what the equation says, as products with one matrix each; sums over the stack come last."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    if len(operands) != 2 or not arrow or sum(isinstance(o, Matrices) for o in operands) != 1:
        return NotImplemented
    (mine, m), (letters, x) = sorted(
        zip(inputs.split(","), operands, strict=True), key=lambda pair: not isinstance(pair[1], Matrices)
    )
    if len(mine.replace(".", "")) != m.dim():
        return NotImplemented
    free = "".join(sorted({*ascii_letters} - {*equation}))[: x.dim() + 3 - len(letters)]
    letters, out = letters.replace("...", free), out.replace("...", free)
    picked, last = mine[:-2], mine[-2:]
    inner = [c for c in last if c in letters and c not in out]
    outer = [c for c in last if c in out and c not in letters]
    if len(inner) != 1 or len(outer) != 1 or len(set(letters)) != len(letters):
        return NotImplemented
    rows = [c for c in letters if c not in mine]
    both = [c for c in picked if c in letters]
    x = torch.einsum(f"{letters}->{''.join((*both, *rows))}{inner[0]}", x)
    sides = x.shape[len(both) : -1]
    x = x.reshape(*(x.shape[both.index(c)] if c in both else 1 for c in picked), -1, x.shape[-1])
    made = (m if last[0] == inner[0] else m.transposes).after(x if picked else x.flatten(0, -2))
    made = made.reshape(*m.numbers.shape, *sides, made.shape[-1])
    return torch.einsum(f"{picked}{''.join(rows)}{outer[0]}->{out}", made)


def _pick(m: Matrices, key: Any) -> Any:
    """Return the matrices at these places, where the key stops before rows and columns."""
    keys = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(k, int | slice | Tensor) for k in keys):
        return NotImplemented
    taken = sum(k.dim() if isinstance(k, Tensor) and k.dtype == torch.bool else 1 for k in keys)
    return m.other(m.numbers[key]) if taken <= m.numbers.dim() else NotImplemented


def _transpose(m: Matrices, first: int, second: int) -> Any:
    return m.transposes if {first % m.dim(), second % m.dim()} == {m.dim() - 2, m.dim() - 1} else NotImplemented


def _permute(m: Matrices, *order: Any) -> Any:
    places = [place % m.dim() for place in (order[0] if isinstance(order[0], list | tuple) else order)]
    last = m.dim() - 1
    return m.transposes if places == [*range(last - 1), last, last - 1] else NotImplemented


def _unbind(m: Matrices, dim: int = 0) -> Any:
    return tuple(m.other(n) for n in m.numbers) if dim == 0 and m.numbers.dim() else NotImplemented


def _iterate(m: Matrices) -> Any:
    return iter(_unbind(m)) if m.numbers.dim() else NotImplemented


def _index_select(m: Matrices, dim: int, index: Tensor) -> Any:
    return m.other(m.numbers[index]) if dim == 0 and m.numbers.dim() else NotImplemented


def _flat_transpose(m: Matrices) -> Any:
    return m.transposes if m.dim() == 2 else NotImplemented


def _converted(name: str) -> Callable[..., Any]:
    """Return the method of this name: it changes nothing where dtype and device stay."""

    def method(m: Matrices, *args: Any, **kwargs: Any) -> Any:
        made = getattr(torch.empty(0, dtype=m.dtype, device=m.device), name)(*args, **kwargs)
        return m if (made.dtype, made.device) == (m.dtype, m.device) else NotImplemented

    return method


_GETTERS: dict[Any, Callable[..., Any]] = {
    Tensor.T.__get__: _flat_transpose,  # type: ignore[attr-defined]
    Tensor.mT.__get__: lambda m: m.transposes,  # type: ignore[attr-defined]
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _matmul),
    "__rmatmul__": lambda right, left: _matmul(left, right),
    "linear": _linear,
    **dict.fromkeys(("addmm", "baddbmm"), _add_product),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _grouped),
    "einsum": _einsum,
    "__getitem__": _pick,
    "index_select": _index_select,
    "unbind": _unbind,
    "__iter__": _iterate,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    "t": _flat_transpose,
    **{name: _converted(name) for name in ("to", "type_as", "float", "double", "half", "bfloat16", "contiguous")},
}
