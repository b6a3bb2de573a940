"""GRU and LSTM with tensor trains for their matrices: for inputs so wide that a dense matrix is out of the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, Unpack, cast

import torch
from torch import Tensor, nn

from tenfold.errors import WeightError
from tenfold.layers.recurrent import GRU, LSTM, Recurrent, RNNOptions, stacked_weights
from tenfold.layers.tt_linear import TTLinear
from tenfold.tensors.modes import mode_factors

Sides = Literal["input", "both"]


class _Options(RNNOptions, total=False):
    device: Any
    dtype: Any


class _TTRecurrent(Recurrent):
    """The common part of ``TTGRU`` and ``TTLSTM``; everything is said there."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        ranks: int | Sequence[int] = 4,
        in_modes: Sequence[int] | None = None,
        hidden_modes: Sequence[int] | None = None,
        cores: int = 4,
        sides: Sides = "input",
        **options: Unpack[_Options],
    ) -> None:
        if sides not in ("input", "both"):
            msg = f"sides={sides!r}: trains hold the matrices of the inputs ('input') or of the states too ('both')"
            raise WeightError(msg)
        count = len(in_modes or hidden_modes or range(cores))
        hidden = tuple(hidden_modes) if hidden_modes else mode_factors(hidden_size, count, pad=False).modes
        stacked = (self.gates * hidden[0], *hidden[1:])
        place: Any = {name: options.pop(name) for name in ("device", "dtype") if name in options}
        bias = options.get("bias", True)

        def train(size: int, modes: Sequence[int] | None) -> TTLinear:
            return TTLinear(
                size,
                self.gates * hidden_size,
                ranks,
                in_modes=modes or mode_factors(size, count, pad=False).modes,
                out_modes=stacked,
                bias=bias,
                std=(3 * hidden_size) ** -0.5,  # of torch's own uniform weights
                **place,
            )

        def make_ih(size: int) -> nn.Module:
            return train(size, in_modes if size == input_size else None)

        def make_hh() -> nn.Module:
            if sides == "both":
                return train(hidden_size, hidden)
            return nn.Linear(hidden_size, self.gates * hidden_size, bias, **place)

        super().__init__(input_size, hidden_size, make_ih, make_hh, num_layers, **cast("RNNOptions", options))
        self.sides = sides
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights of the variance that torch gives its own, and biases as torch does."""
        bound = self.hidden_size**-0.5
        for layer in self.matrices():
            layer.reset_parameters()
            if self.bias:
                nn.init.uniform_(layer.bias, -bound, bound)

    @classmethod
    def from_dense(cls, dense: nn.RNNBase, ranks: int | Sequence[int] = 4, **options: Any) -> Self:
        """Return the network with the TT-SVD of trained matrices; ``options`` are modes, ``cores`` and ``sides``.

        Raises:
            WeightError: a network of another kind.
        """
        if type(dense) is not cls.dense:
            msg = f"{cls.__name__} is made from a {cls.dense.__name__}, not from a {type(dense).__name__}"
            raise WeightError(msg)
        like: Any = dense.weight_hh_l0
        names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
        own = {name: getattr(dense, name) for name in names}
        made = cls(
            dense.input_size, dense.hidden_size, **own, ranks=ranks, device=like.device, dtype=like.dtype, **options
        )
        with torch.no_grad():
            for layer, (weight, bias) in zip(made.matrices(), stacked_weights(dense), strict=True):
                _copy(layer, weight, bias)
        return made.train(dense.training)


def _copy(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    if isinstance(layer, TTLinear):
        layer.fill_(weight)
    else:
        layer.get_parameter("weight").copy_(weight)
    if bias is not None:
        layer.get_parameter("bias").copy_(bias)


class TTGRU(_TTRecurrent, GRU):
    """A GRU whose input matrix is a tensor train, and the matrix of its hidden states too where that is asked for.

    Takes the place of ``nn.GRU``, with its signature, options, formulas and outputs. All gates are one train, with the
    gate as the slow part of the first output mode (Yang et al. 2017, arXiv 1707.01786): three gates cost one larger
    core. The inputs of the whole sequence are projected in one contraction before the recurrence begins.

    Args:
        input_size: as in torch.
        hidden_size: as in torch.
        num_layers: as in torch.
        ranks: of all bonds, or of each.
        in_modes: of the inputs of the first layer; balanced when left out.
        hidden_modes: of the hidden size; balanced when left out.
        cores: how many cores, where no modes are given.
        sides: ``input`` for a dense recurrent matrix (Yang et al.), ``both`` for trains on both sides (Tjandra et al.
            2018, arXiv 1802.10410).
        options: ``bias``, ``batch_first``, ``dropout``, ``bidirectional``, ``device`` and ``dtype``, as in torch;
            ``proj_size`` is refused.

    Example:
        >>> net = TTGRU(57_600, 256, in_modes=(8, 20, 20, 18), hidden_modes=(4, 4, 4, 4), ranks=4)
        >>> sum(core.numel() for core in net.cells[0].ih.cores)
        3232
    """


class TTLSTM(_TTRecurrent, LSTM):
    """An LSTM whose input matrix is a tensor train, and the matrix of its hidden states too where that is asked for.

    As ``TTGRU``, with four gates.

    Example:
        >>> net = TTLSTM(57_600, 256, in_modes=(8, 20, 20, 18), hidden_modes=(4, 4, 4, 4), ranks=4)
        >>> sum(core.numel() for core in net.cells[0].ih.cores)
        3360
    """
