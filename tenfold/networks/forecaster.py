"""Forecasts of many steps: a recurrent network reads what was, and goes on from its own predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tenfold.errors import WeightError
from tenfold.networks.higher_order_rnn import HigherOrderLSTM, HigherOrderRNN

Kind = Literal["lstm", "rnn", "hot-lstm", "hot-rnn"]
KINDS: dict[str, Any] = {"hot-lstm": HigherOrderLSTM, "hot-rnn": HigherOrderRNN, "lstm": nn.LSTM, "rnn": nn.RNN}


class Forecaster(nn.Module):
    """Sequence to sequence: an encoder reads the past, a decoder predicts one step at a time from the step before.

    Use it with the kind ``hot-lstm`` (Yu et al. 2017, arXiv 1711.00073), and with ``lstm`` for comparison. In training
    the decoder may be given true steps in place of its own predictions (``taught``), fewer and fewer of them:
    scheduled sampling (Bengio et al. 2015, arXiv 1506.03099).

    Predictions are differences to the step before, which makes a constant forecast the start of training.

    Args:
        size: numbers in a step.
        hidden_size: of encoder and decoder.
        horizon: how many steps to predict.
        kind: ``hot-lstm``, ``hot-rnn``, ``lstm`` or ``rnn``.
        options: ``num_layers``; of the higher orders ``lags``, ``order`` and ``ranks``.

    Raises:
        WeightError: an unknown kind, or a horizon below 1.

    Example:
        >>> model = Forecaster(3, 16, horizon=20, kind="hot-lstm", lags=2, order=2, ranks=2)
        >>> model(torch.randn(4, 10, 3)).shape
        torch.Size([4, 20, 3])
    """

    def __init__(self, size: int, hidden_size: int, *, horizon: int, kind: Kind = "hot-lstm", **options: Any) -> None:
        super().__init__()
        if kind not in KINDS or horizon < 1:
            msg = f"kind={kind!r}, horizon={horizon}: a kind is one of {', '.join(KINDS)}, a horizon at least 1"
            raise WeightError(msg)
        self.size, self.horizon = size, horizon
        self.encoder = KINDS[kind](size, hidden_size, batch_first=True, **options)
        self.decoder = KINDS[kind](size, hidden_size, batch_first=True, **options)
        self.head = nn.Linear(hidden_size, size)
        nn.init.zeros_(self.head.bias)

    def forward(self, past: Tensor, truth: Tensor | None = None, taught: Tensor | None = None) -> Tensor:
        """Return the forecast (batch, horizon, size).

        Args:
            past: (batch, steps, size).
            truth: what really came, (batch, horizon, size): for training.
            taught: (batch, horizon), 1 where the step that begins a prediction is the true one; in the first column
                it is known anyway. Without it the forecast runs freely.
        """
        if past.dim() != 3 or past.shape[-1] != self.size:
            msg = f"the past has the shape {tuple(past.shape)}; (batch, steps, {self.size}) is asked for"
            raise WeightError(msg)
        _, states = self.encoder(past)
        last, found = past[:, -1], list[Tensor]()
        for k in range(self.horizon):
            if k and truth is not None and taught is not None:
                last = torch.where(taught[:, k, None] > 0, truth[:, k - 1], last)
            if isinstance(self.decoder, HigherOrderLSTM | HigherOrderRNN):
                hidden, states = self.decoder.step(last, states)
            else:
                out, states = self.decoder(last[:, None], states)
                hidden = out[:, 0]
            last = last + self.head(hidden)
            found.append(last)
        return torch.stack(found, 1)


def taught_steps(shape: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """Return (batch, horizon) of 1 with the probability ``share``, else 0: which steps a decoder is given.

    Use it as ``taught`` of a ``Forecaster`` in training, with a share that falls to 0.

    Example:
        >>> taught_steps((2, 3), 1.0, torch.Generator().manual_seed(0)).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    return (torch.rand(*shape, generator=generator) < share).float()
