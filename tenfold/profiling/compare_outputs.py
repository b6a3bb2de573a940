"""How far two models agree on inputs without labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.records import Agreement
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.inputs import batch_size_of, call_model, tensors_in
from tenfold.tracing.masks import real_tokens, token_mask
from tenfold.tracing.randomness import Randomness

_UNIT = 1e-3  # rows as near to length 1 as this are embeddings


def agreement(model: nn.Module, small: nn.Module, batches: Iterable[Any], *, held_out: bool = True) -> Agreement:
    """Return how near the outputs of a compressed model are to those of the original, without labels.

    Use it on inputs that ``compress`` has not seen; its own record holds that of the part of ``data`` that it left out.

    Args:
        model: the original.
        small: the same model, compressed.
        batches: inputs as the forward takes them, on the device of both.
        held_out: whether nothing was fitted to these inputs; goes into the result.

    Raises:
        DataError: no output can be compared: there are no floating-point tensors, or their shapes differ.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> found = agreement(model, model, [torch.randn(10, 4)])
        >>> found.samples, found.top1, found.relative_error
        (10, 1.0, 0.0)
    """
    sums = _Sums()
    with evaluating(model), evaluating(small):
        for number, batch in enumerate(batches):
            own, other = (_outputs(m, batch, seed=number) for m in (model, small))
            sums.add(own, other, token_mask(batch, model), batch_size_of(batch) or 1)
    return sums.result(held_out=held_out)


def _outputs(model: nn.Module, batch: Any, seed: int) -> list[Tensor]:
    """Return the output tensors of a batch, from the same random numbers in both models."""
    with Randomness(model, batch).seeded(seed):
        return list(tensors_in(call_model(model, batch)))


@dataclass
class _Sums:
    samples: int = 0
    rows: int = 0
    power: float = 0.0
    missed: float = 0.0
    cosines: float = 0.0
    vectors: int = 0
    same: int = 0
    divergence: float = 0.0
    classes: bool = True
    _unit: bool = field(default=True, repr=False)

    def add(self, own: list[Tensor], other: list[Tensor], mask: Tensor | None, samples: int) -> None:
        """Add the output tensors of one batch from both models."""
        self.samples += samples
        first = True
        for a, b in zip(own, other, strict=False):
            if not a.is_floating_point() or a.shape != b.shape:
                continue
            x, y = (real_tokens(t, mask).double() for t in (a, b))
            self.power += float(x.square().sum())
            self.missed += float((x - y).square().sum())
            rows, others = (t.flatten(1) if t.dim() > 1 else t[:, None] if t.dim() else t.view(1, 1) for t in (x, y))
            self.cosines += float(torch.cosine_similarity(rows, others, dim=1).sum())
            self.vectors += len(rows)
            if first:
                self._compare_classes(x, y, mask)
            first = False

    def _compare_classes(self, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """Compare what may be scores of classes: rows (n, classes), or (batch, sequence, classes) of tokens."""
        if x.dim() == 3 and mask is None:
            x, y = x.flatten(0, 1), y.flatten(0, 1)
        if x.dim() != 2 or x.shape[1] < 2 or not len(x):
            self.classes = False
            return
        self._unit = self._unit and bool((x.norm(dim=1) - 1).abs().max() < _UNIT)
        self.rows += len(x)
        self.same += int((x.argmax(1) == y.argmax(1)).sum())
        p, q = x.log_softmax(1), y.log_softmax(1)
        self.divergence += float((p.exp() * (p - q)).sum())

    def result(self, *, held_out: bool) -> Agreement:
        """Return the means.

        Raises:
            DataError: nothing was compared.
        """
        if not self.vectors:
            msg = (
                "agreement with the original cannot be measured: the outputs hold no floating-point tensors that have "
                "rows and the same shapes in both models. Return the scores or features that decisions are made from"
            )
            raise DataError(msg)
        scores = self.classes and self.rows > 0 and not self._unit
        return Agreement(
            samples=self.samples,
            held_out=held_out,
            rows=self.rows if scores else None,
            top1=self.same / self.rows if scores else None,
            kl=max(self.divergence / self.rows, 0.0) if scores else None,
            cosine=self.cosines / self.vectors,
            relative_error=(self.missed / self.power) ** 0.5 if self.power > 0 else float(self.missed > 0),
        )
