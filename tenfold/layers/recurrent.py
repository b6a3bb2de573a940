"""GRU and LSTM whose matrices are layers of their own, so that each can be factorized: the recurrence, in the open."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tenfold.errors import WeightError
from tenfold.layers.recurrence import State, Way, is_transformed, plain_parts, run_fused, stepping


class RNNOptions(TypedDict, total=False):
    """Torch's own options of a recurrent network, with its defaults; ``proj_size`` is refused."""

    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int


class Cell(nn.Module):
    """One layer in one direction: ``ih`` from inputs to all gates, ``hh`` from hidden states to all gates."""

    def __init__(self, ih: nn.Module, hh: nn.Module) -> None:
        super().__init__()
        self.ih = ih
        self.hh = hh


class Recurrent(nn.Module, abc.ABC):
    """A recurrent network with the face of torch's, whose weights are layers: linear ones, or whatever stands for them.

    The gates are stacked, as in torch: ``cells[k].ih`` maps inputs to (gates · hidden) numbers, for the whole sequence
    at once before the recurrence begins, and ``cells[k].hh`` maps hidden states, step by step. Cells are ordered by
    layer and then by direction.

    Each cell runs in torch's own kernel, behind the first factors of its inputs and with those of its states multiplied
    out, or step by step in Python, whichever takes less time (``Way.fuses``); step by step in any case where its layers
    are others than linear and factorized ones, or watched by hooks: every layer runs then as a plan counts it.
    """

    mode: ClassVar[str]
    gates: ClassVar[int]
    states: ClassVar[int]
    dense: ClassVar[type[nn.GRU | nn.LSTM]]
    kernel: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        make_ih: Callable[[int], nn.Module],
        make_hh: Callable[[], nn.Module],
        num_layers: int = 1,
        **options: Unpack[RNNOptions],
    ) -> None:
        super().__init__()
        if num_layers < 1:
            msg = f"num_layers={num_layers} is at least 1"
            raise WeightError(msg)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self._follow(**options)
        self._ways = dict[int, Way]()
        sizes = [input_size] + [hidden_size * self.directions] * (num_layers - 1)
        self.cells = nn.ModuleList(Cell(make_ih(size), make_hh()) for size in sizes for _ in range(self.directions))

    def _follow(
        self,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> None:
        """Take over torch's own options."""
        if proj_size:
            msg = f"proj_size={proj_size}: a projection is a low-rank recurrent matrix already; leave it out"
            raise WeightError(msg)
        if not 0 <= dropout <= 1:
            msg = f"dropout={dropout} is a probability, in 0..1"
            raise WeightError(msg)
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, 0

    def __getstate__(self) -> dict[str, Any]:
        """Copy no products of factors."""
        return {**self.__dict__, "_ways": {}}

    @property
    def directions(self) -> int:
        """2 where it is bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    def matrices(self) -> list[Any]:
        """Return the layers of all cells: each cell's inputs first, then its hidden states."""
        return [layer for cell in self.cells for layer in (cell.ih, cell.hh)]

    def __getattr__(self, name: str) -> Any:
        """Return a weight or bias under torch's own name, such as ``weight_ih_l0``: models ask it for its dtype."""
        if name.startswith(("weight_", "bias_")) and "cells" in self._modules:
            for (weight, bias), layer in zip(_names(self), self.matrices(), strict=True):
                if name == weight or (name == bias and self.bias):
                    return layer.weight if name == weight else layer.bias
        return super().__getattr__(name)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no one buffer of weights. Models call this of torch's networks."""

    def close(self) -> nn.RNNBase:
        """Return torch's own network with these weights, factorized ones multiplied out."""
        like: Any = self.matrices()[0].weight
        made = self.dense(self.input_size, self.hidden_size, device=like.device, dtype=like.dtype, **_options(self))
        with torch.no_grad():
            for (weight, bias), layer in zip(_names(made), self.matrices(), strict=True):
                made.get_parameter(weight).copy_(layer.weight)
                if self.bias:
                    made.get_parameter(bias).copy_(layer.bias)
        return made.train(self.training)

    @abc.abstractmethod
    def _step(self, projected: Tensor, recurrent: Tensor, state: State) -> State:
        """Return the next state, the hidden state first, from both products of a step."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002 - torch's name
        """Return (output, last state), as torch's network does: packed, batched or of one sequence."""
        self._check(input, hx)
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            found: tuple[Any, Any] = torch.compiler.disable(self._forward)(input, hx)
            return found  # as of torch's own, of which nothing is compiled
        return self._forward(input, hx)

    def _forward(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:  # noqa: A002
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            first = self._first(hx, data, int(sizes[0]), order)
            out, last = self._run(data, sizes.tolist(), first)
            return PackedSequence(out, sizes, order, back), self._handed(last, back)
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
        if single and hx is not None:
            hx = tuple(h.unsqueeze(1) for h in hx) if self.states > 1 else hx.unsqueeze(1)
        steps, batch, _ = x.shape
        out, last = self._run(x, [batch] * steps, self._first(hx, x, batch, None))
        out = out.squeeze(1) if single else out.transpose(0, 1) if self.batch_first else out
        if single:
            last = [tuple(h.squeeze(1) for h in state) for state in last]
        return out, self._handed(last, None)

    def _check(self, x: Tensor | PackedSequence, hx: Any) -> None:
        """Raise WeightError for an input or a state of the wrong kind or size."""
        shape = x.data.shape if isinstance(x, PackedSequence) else x.shape
        if len(shape) not in (2, 3) or shape[-1] != self.input_size:
            msg = f"the input of {self.mode} has the shape {tuple(shape)}, its last axis is to have {self.input_size}"
            msg += " entries and one or two axes are to stand before it: (batch and) sequence"
            raise WeightError(msg)
        if hx is not None and isinstance(hx, Tensor) != (self.states == 1):
            wanted = "one tensor" if self.states == 1 else "a pair of tensors, (hidden, cell)"
            msg = f"hx of {self.mode} is {wanted}, not {type(hx).__name__}"
            raise WeightError(msg)

    def _first(self, hx: Any, like: Tensor, batch: int, order: Tensor | None) -> list[State]:
        """Return the first state of each cell, (1, batch, hidden) each."""
        if hx is None:
            zero = like.new_zeros(1, batch, self.hidden_size)
            return [(zero,) * self.states for _ in self.cells]
        given: State = (hx,) if self.states == 1 else tuple(hx)
        wanted = (len(self.cells), batch, self.hidden_size)
        for h in given:
            if tuple(h.shape) != wanted:
                msg = f"hx has the shape {tuple(h.shape)}, it must be {wanted}"
                raise WeightError(msg)
        if order is not None:
            given = tuple(h.index_select(1, order) for h in given)
        return [tuple(h[k : k + 1] for h in given) for k in range(len(self.cells))]

    def _handed(self, last: list[State], back: Tensor | None) -> Any:
        stacked = last[0] if len(last) == 1 else tuple(torch.cat(h) for h in zip(*last, strict=True))
        if back is not None:
            stacked = tuple(h.index_select(1, back) for h in stacked)
        return stacked[0] if self.states == 1 else stacked

    def _run(self, x: Tensor, sizes: list[int], first: list[State]) -> tuple[Tensor, list[State]]:
        """Return outputs and last states of all layers for inputs (steps, sequences, features), or packed ones."""
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
            outs = []
            for direction in range(self.directions):
                k = layer * self.directions + direction
                out, state = self._along(k, x, sizes, first[k], backwards=direction == 1)
                outs.append(out)
                last.append(state)
            x = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
        return x, last

    def _along(self, k: int, x: Tensor, sizes: list[int], state: State, *, backwards: bool) -> tuple[Tensor, State]:
        """Return outputs and the last state of a cell; sequences end where the sizes fall."""
        cell: Any = self.cells[k]
        ih, hh = cell.ih, cell.hh
        parts = None if is_transformed(x) else plain_parts(ih, hh)
        if parts is not None:
            way = self._ways.get(k)
            if way is None or way.parts != parts:
                way = self._ways[k] = Way(parts, ih, hh)
            packed = x.dim() == 2
            onednn = self.states > 1 and not packed and x.dtype != torch.float64
            if way.fuses(x, len(sizes), sum(sizes) if packed else len(sizes) * sizes[0], onednn=onednn):
                return run_fused(self.kernel, way, x, sizes, state, bias=self.bias, backwards=backwards)
        first = tuple(h[0] for h in state)
        out, last = self._step_by_step(cell, x.flatten(0, -2), sizes, first, backwards=backwards)
        return out.view(*x.shape[:-1], -1), tuple(h.unsqueeze(0) for h in last)

    def _step_by_step(
        self, cell: Cell, x: Tensor, sizes: list[int], state: State, *, backwards: bool
    ) -> tuple[Tensor, State]:
        """Return the same for packed inputs (Σ sizes, features), every layer called at each step."""
        projected, recurrent = cell.ih(x).split(sizes), stepping(cell.hh)
        outs: list[Tensor] = []
        start = state
        ended: list[State] = []  # of sequences that are over, the shortest first
        now = tuple(h[: sizes[-1] if backwards else sizes[0]] for h in start)
        for t in reversed(range(len(sizes))) if backwards else range(len(sizes)):
            have, size = now[0].shape[0], sizes[t]  # len() is a number, also where the batch is to stay open
            if size > have:  # backwards: longer sequences run already, these begin
                now = tuple(torch.cat([h, s[have:size]]) for h, s in zip(now, start, strict=True))
            elif size < have:
                ended.append(tuple(h[size:] for h in now))
                now = tuple(h[:size] for h in now)
            now = self._step(projected[t], recurrent(now[0]), now)
            outs.append(now[0])
        if ended:
            now = tuple(torch.cat([h, *(e[k] for e in reversed(ended))]) for k, h in enumerate(now))
        return torch.cat(outs[::-1] if backwards else outs), now

    def extra_repr(self) -> str:
        """Return sizes and the options that are not torch's defaults."""
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        changed = [f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join([text, *changed])


class GRU(Recurrent):
    """A GRU in the open; gates r, z, n stacked in this order, n = tanh(x + r · h) with both products' own biases.

    Example:
        >>> dense = nn.GRU(5, 4, num_layers=2)
        >>> x = torch.randn(7, 3, 5)
        >>> torch.allclose(open_recurrent(dense)(x)[0], dense(x)[0], atol=1e-6)
        True
    """

    mode, gates, states, dense = "GRU", 3, 1, nn.GRU
    kernel = staticmethod(torch.gru)

    def _step(self, projected: Tensor, recurrent: Tensor, state: State) -> State:
        size = self.hidden_size
        r, z = (projected[:, : 2 * size] + recurrent[:, : 2 * size]).sigmoid().chunk(2, -1)
        new = torch.addcmul(projected[:, 2 * size :], r, recurrent[:, 2 * size :]).tanh()
        return (torch.lerp(new, state[0].to(new.dtype), z),)  # autocast makes half-precision gates


class LSTM(Recurrent):
    """An LSTM in the open; gates i, f, g, o stacked in this order.

    Example:
        >>> dense = nn.LSTM(5, 4, bidirectional=True)
        >>> x = torch.randn(7, 3, 5)
        >>> torch.allclose(open_recurrent(dense)(x)[0], dense(x)[0], atol=1e-6)
        True
    """

    mode, gates, states, dense = "LSTM", 4, 2, nn.LSTM
    kernel = staticmethod(torch.lstm)

    def _step(self, projected: Tensor, recurrent: Tensor, state: State) -> State:
        gates, size = projected + recurrent, self.hidden_size
        i, f, _, o = gates.sigmoid().chunk(4, -1)  # one call for all; what g does not need costs less than two more
        cell = torch.addcmul(f * state[1], i, gates[:, 2 * size : 3 * size].tanh())
        return o * cell.tanh(), cell


def open_recurrent(dense: nn.RNNBase) -> GRU | LSTM:
    """Return the same network with linear layers ``cells.k.ih`` and ``cells.k.hh`` that hold the dense weights.

    The parameters are the dense network's own, shared. ``close`` leads back.

    Raises:
        WeightError: a network of another kind, or with a projection.

    Example:
        >>> open_recurrent(nn.LSTM(5, 4)).cells[0].ih
        Linear(in_features=5, out_features=16, bias=True)
    """
    kinds: dict[type, type[GRU | LSTM]] = {nn.GRU: GRU, nn.LSTM: LSTM}
    kind = kinds.get(type(dense))
    if kind is None:
        msg = f"a {type(dense).__name__} cannot be opened: only nn.GRU and nn.LSTM can, no derived classes"
        raise WeightError(msg)
    sources = stacked_weights(dense)
    made = kind(
        dense.input_size,
        dense.hidden_size,
        lambda _: _linear(next(sources)),
        lambda: _linear(next(sources)),
        proj_size=dense.proj_size,
        **_options(dense),
    )
    return made.train(dense.training)


def _options(network: Any) -> dict[str, Any]:
    names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
    return {name: getattr(network, name) for name in names}


def _names(dense: nn.RNNBase | Recurrent) -> Iterator[tuple[str, str]]:
    """Yield the names of weight and bias, inputs first and then hidden states, cell by cell."""
    for layer in range(dense.num_layers):
        for end in ("", "_reverse") if dense.bidirectional else ("",):
            for side in ("ih", "hh"):
                yield f"weight_{side}_l{layer}{end}", f"bias_{side}_l{layer}{end}"


def stacked_weights(dense: nn.RNNBase) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
    """Yield weight and bias of every matrix of torch's network: cell by cell, inputs first and then hidden states."""
    for weight, bias in _names(dense):
        yield getattr(dense, weight), getattr(dense, bias) if dense.bias else None


def _linear(source: tuple[nn.Parameter, nn.Parameter | None]) -> nn.Linear:
    weight, bias = source
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer
