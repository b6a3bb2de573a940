"""Recurrence of higher order: the next state is a polynomial in the last few, with a tensor train of coefficients."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tenfold.errors import WeightError
from tenfold.layers.tt_modes import each_rank

State = tuple[Tensor, ...]


class HigherOrderCell(nn.Module):
    """All gates of a step from s = [1; h₋₁; ...; h₋L]: W·x + A₁(s)·A₂(s)·...·A_P(s), a tensor train of order P in s.

    Yu et al. 2017, arXiv 1711.00073, equations 3 to 5. The product s ⊗ ... ⊗ s of (L·H + 1)ᴾ numbers is never formed:
    the cores (r, L·H + 1, r') meet s one after the other. The last core carries the gates.

    It begins as a recurrence of order one on the last state, drawn as torch draws its own, with small terms of higher
    orders: polynomials of states that are not small yet would blow up. Use it in loops of your own; ``HigherOrderLSTM``
    is the whole layer.

    Args:
        input_size: of a step.
        hidden_size: H.
        gates: how many there are, each of H numbers.
        lags: L, how many states back it looks.
        order: P, of the polynomial.
        ranks: of all bonds between the cores, or of each.
        place: ``device`` and ``dtype`` as in torch.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        gates: int,
        *,
        lags: int,
        order: int,
        ranks: int | Sequence[int],
        **place: Any,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size, lags, order) < 1:
            msg = f"input_size={input_size}, hidden_size={hidden_size}, lags={lags}, order={order} are at least 1"
            raise WeightError(msg)
        self.hidden_size, self.lags, self.order = hidden_size, lags, order
        self.ranks = each_rank(ranks, order)
        self.ih = nn.Linear(input_size, gates * hidden_size, bias=False, **place)
        sides = (1, *self.ranks, gates * hidden_size)
        self.cores = nn.ParameterList(torch.empty(a, lags * hidden_size + 1, b, **place) for a, b in pairwise(sides))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: of order one as torch's, those of higher orders a tenth of that."""
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.ih.weight, -bound, bound)
        hidden = nn.init.uniform_(self.ih.weight.new_empty(self.cores[-1].shape[-1], self.hidden_size), -bound, bound)
        self.fill_(hidden, self.ih.weight.new_zeros(len(hidden)), noise=0.1)

    @torch.no_grad()
    def fill_(self, hidden: Tensor, bias: Tensor, *, noise: float = 0.0) -> None:
        """Make the train the affine map h₋₁ ↦ hidden · h₋₁ + bias, up to noise of this size in all other coefficients.

        Without noise the map is exact, and only the coefficients of its own path in the last core are not 0: those of
        other bonds get gradients, since the cores before the last are drawn all the same.
        """
        for core in list(self.cores)[:-1]:
            nn.init.normal_(core, std=core.shape[1] ** -0.5)
            core[0, :, 0] = 0
            core[0, 0, 0] = 1  # the constant of s passes the first bond on
            core[1:, :, 0] = 0
        last = self.cores[-1]
        nn.init.normal_(last, std=noise * (3 * last.shape[0] * last.shape[1]) ** -0.5)
        last[0, 0], last[0, 1 : self.hidden_size + 1] = bias, hidden.mT
        last[0, self.hidden_size + 1 :] = 0

    def forward(self, projected: Tensor, history: Tensor) -> Tensor:
        """Return the gates (batch, gates · H) from ih(x) (batch, gates · H) and the last states (batch, L·H)."""
        ones = history.new_ones(history.shape[0], 1)
        s = torch.cat([ones, history], 1)
        first, *others = self.cores
        v: Tensor = s @ first[0]
        for core in others:
            v = (v[:, :, None] * s[:, None, :]).flatten(1) @ core.flatten(0, 1)
        return projected + v

    def weight(self) -> Tensor:
        """Return all coefficients (gates · H, L·H + 1, ..., L·H + 1), multiplied out."""
        first, *others = self.cores
        found: Tensor = first[0]
        for core in others:
            found = torch.tensordot(found, core, 1)
        return found.movedim(-1, 0)

    def macs(self) -> int:
        """Return the multiply-accumulates of a step of one sequence, products with s included."""
        outer: int = sum(core.shape[0] * core.shape[1] for core in list(self.cores)[1:])
        every: int = sum(core.numel() for core in self.cores)
        return self.ih.weight.numel() + every + outer


class _HigherOrder(nn.Module, abc.ABC):
    """The common part of ``HigherOrderRNN`` and ``HigherOrderLSTM``; everything is said there."""

    gates: ClassVar[int]
    dense: ClassVar[type[nn.RNNBase]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        lags: int = 2,
        order: int = 2,
        ranks: int | Sequence[int] = 2,
        batch_first: bool = False,
        **place: Any,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            msg = f"num_layers={num_layers} is at least 1"
            raise WeightError(msg)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.lags, self.batch_first = lags, batch_first
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        options: dict[str, Any] = {"lags": lags, "order": order, "ranks": ranks, **place}
        self.cells = nn.ModuleList(HigherOrderCell(size, hidden_size, self.gates, **options) for size in sizes)

    @classmethod
    def from_dense(cls, dense: nn.RNNBase, **options: Any) -> Self:
        """Return the network that computes what a trained one of torch does, exactly, with room for higher orders.

        Args:
            dense: one direction, without a projection; of tanh, where it is an ``nn.RNN``.
            options: ``lags``, ``order`` and ``ranks``.

        Raises:
            WeightError: a network of another kind.
        """
        if type(dense) is not cls.dense or dense.bidirectional or dense.proj_size or dense.mode == "RNN_RELU":
            msg = f"{cls.__name__} is made from a {cls.dense.__name__} of one direction with tanh, not from {dense}"
            raise WeightError(msg)
        like: Any = dense.weight_hh_l0
        place = {"device": like.device, "dtype": like.dtype, "batch_first": dense.batch_first}
        made = cls(dense.input_size, dense.hidden_size, dense.num_layers, **place, **options)
        for k, layer in enumerate(made.cells):
            cell: Any = layer
            ih, hh = (dense.get_parameter(f"weight_{side}_l{k}").detach() for side in ("ih", "hh"))
            zero = ih.new_zeros(len(ih))
            bias = sum((dense.get_parameter(f"bias_{s}_l{k}").detach() for s in ("ih", "hh") if dense.bias), zero)
            cell.ih.weight.data.copy_(ih)
            cell.fill_(hh, bias)
        return made.train(dense.training)

    @abc.abstractmethod
    def start(self, x: Tensor) -> list[State]:
        """Return the first state of every layer, for an input (..., batch, input_size) of any dtype and device."""

    def step(self, x: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Return the output (batch, H) of one step (batch, input_size), and the states after it."""
        found = []
        for layer, state in zip(self.cells, states, strict=True):
            cell: Any = layer
            after = self._step(cell(cell.ih(x), state[0]), state)
            found.append((torch.cat([after[0], state[0]], 1)[:, : state[0].shape[1]], *after[1:]))
            x = after[0]
        return x, found

    @abc.abstractmethod
    def _step(self, gates: Tensor, state: State) -> State:
        """Return the new hidden state, and what else is carried."""

    def forward(self, input: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:  # noqa: A002
        """Return (outputs, last states) of a batch of sequences, (steps, batch, input_size) or batch first.

        States are one for each layer: the last L hidden states (batch, L·H), the latest first, and for an LSTM its
        cell (batch, H).
        """
        if input.dim() != 3 or input.shape[-1] != self.input_size:
            msg = f"the input has the shape {tuple(input.shape)}; two axes and then {self.input_size} are asked for"
            raise WeightError(msg)
        steps = input.unbind(1 if self.batch_first else 0)
        states = self.start(steps[0]) if states is None else states
        outputs = []
        for x in steps:
            out, states = self.step(x, states)
            outputs.append(out)
        return torch.stack(outputs, 1 if self.batch_first else 0), states

    def extra_repr(self) -> str:
        """Return sizes, lags, order and ranks."""
        cell: Any = self.cells[0]
        sizes = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        return f"{sizes}, lags={self.lags}, order={cell.order}, ranks={cell.ranks}, batch_first={self.batch_first}"


class HigherOrderRNN(_HigherOrder):
    """A recurrent network with tanh whose next state is a polynomial in the last few (HOT-RNN).

    Use it, or ``HigherOrderLSTM``, to forecast systems whose next state depends on products of past ones, with few
    parameters. A layer has H·input + (L·H + 1)·(r + ... + r·H) numbers. The first layer of a trained ``nn.RNN`` is
    exactly represented (``from_dense``).

    Args:
        input_size: as in torch.
        hidden_size: as in torch.
        num_layers: as in torch.
        lags: how many states back the polynomial looks.
        order: of the polynomial.
        ranks: of its tensor train, one for all ``order`` − 1 bonds or one for each.
        batch_first: as in torch.
        place: ``device`` and ``dtype`` as in torch.

    Raises:
        WeightError: a size below 1.
        RankError: not one positive rank for each bond.

    Example:
        >>> outputs, states = HigherOrderRNN(3, 8, lags=2, order=3)(torch.randn(5, 4, 3))
        >>> outputs.shape, states[0][0].shape
        (torch.Size([5, 4, 8]), torch.Size([4, 16]))
    """

    gates = 1
    dense = nn.RNN

    def start(self, x: Tensor) -> list[State]:
        """Return the first state of every layer: zeros."""
        return [(x.new_zeros(x.shape[-2], self.lags * self.hidden_size),) for _ in self.cells]

    def _step(self, gates: Tensor, state: State) -> State:
        del state
        return (gates.tanh(),)


class HigherOrderLSTM(_HigherOrder):
    """An LSTM whose four gates are polynomials in the last few hidden states (HOT-LSTM).

    Use it as ``HigherOrderRNN``, with torch's order of gates: input, forget, cell, output.

    Example:
        >>> net = HigherOrderLSTM(3, 16, lags=2, order=2, ranks=2)
        >>> sum(p.numel() for p in net.parameters())
        4482
    """

    gates = 4
    dense = nn.LSTM

    def start(self, x: Tensor) -> list[State]:
        """Return the first states of every layer: zeros."""
        batch, size = x.shape[-2], self.hidden_size
        return [(x.new_zeros(batch, self.lags * size), x.new_zeros(batch, size)) for _ in self.cells]

    def _step(self, gates: Tensor, state: State) -> State:
        i, f, g, o = gates.chunk(4, 1)
        carried = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * carried.tanh(), carried
