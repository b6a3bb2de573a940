"""How far two models agree on inputs without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.records import Agreement
from tenfold.tensors.free_memory import give_back
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.masks import real_tokens, token_mask
from tenfold.tracing.randomness import Randomness
from tenfold.tracing.samples import samples_in

_UNIT = 1e-3  # rows as near to length 1 as this are embeddings
_BLOCK = 1 << 20  # numbers that are compared at a time
_SMALLEST = 1e-8  # of norms in a cosine, as torch has it


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
    give_back()
    return Original(model, batches).agreement(small, held_out=held_out)


class Original:
    """A model with whose outputs those of others are compared, on the same batches.

    Use it to compare many: outputs are kept as far as they fit. One comparison is ``agreement``.

    Args:
        model: the original; must not change as long as not all of its outputs are kept.
        batches: inputs as the forward takes them, on its device; gone through once for each comparison.
        limit: bytes of outputs to keep.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], *, limit: int = 0) -> None:
        self._model, self._batches, self._room = model, batches, limit
        self._known: dict[int, list[Tensor]] = {}

    def agreement(self, other: nn.Module, *, held_out: bool = True) -> Agreement:
        """Return how near the outputs of another model are to those of this one; see ``agreement``."""
        sums = _Sums()
        with evaluating(self._model), evaluating(other):
            for number, batch in enumerate(self._batches):
                own, found = self._own(number, batch), _outputs(other, batch, seed=number)
                sums.add(own, found, token_mask(batch, self._model), samples_in(batch))
        return sums.result(held_out=held_out)

    def _own(self, number: int, batch: Any) -> list[Tensor]:
        if number in self._known:
            return self._known[number]
        outputs = _outputs(self._model, batch, seed=number)
        size = sum(t.numel() * t.element_size() for t in outputs)
        if size <= self._room:
            self._room -= size
            self._known[number] = outputs = [t.detach().clone() for t in outputs]
        return outputs


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
            x, y = (real_tokens(t, mask) for t in (a, b))
            rows, others = (t.flatten(1) if t.dim() > 1 else t[:, None] if t.dim() else t.view(1, 1) for t in (x, y))
            self._compare_vectors(rows, others)
            if first:
                self._compare_classes(x, y, mask)
            first = False

    def _compare_vectors(self, rows: Tensor, others: Tensor) -> None:
        """Compare the outputs of samples (n, width), some columns at a time."""
        dot, own, other = (torch.zeros(len(rows), dtype=torch.float64, device=rows.device) for _ in range(3))
        step = max(1, _BLOCK // max(len(rows), 1))
        for x, y in zip(rows.split(step, dim=1), others.split(step, dim=1), strict=True):
            p, q = x.double(), y.double()
            self.missed += float((p - q).square().sum())
            dot, own, other = dot + (p * q).sum(1), own + p.square().sum(1), other + q.square().sum(1)
        self.power += float(own.sum())
        self.cosines += float((dot / (own * other).sqrt().clamp_min(_SMALLEST)).sum())
        self.vectors += len(rows)

    def _compare_classes(self, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """Compare what may be scores of classes: rows (n, classes), or (batch, sequence, classes) of tokens."""
        if x.dim() == 3 and mask is None:
            x, y = x.flatten(0, 1), y.flatten(0, 1)
        if x.dim() != 2 or x.shape[1] < 2 or not len(x):
            self.classes = False
            return
        self.rows += len(x)
        for own, other in _blocks(x, y):
            self._unit = self._unit and bool((own.norm(dim=1) - 1).abs().max() < _UNIT)
            self.same += int((own.argmax(1) == other.argmax(1)).sum())
            p, q = own.log_softmax(1), other.log_softmax(1)
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


def _blocks(rows: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over pairs of rows in float64, some at a time: outputs over a vocabulary are large."""
    step = max(1, _BLOCK // max(rows.shape[1], 1))
    for own, other in zip(rows.split(step), others.split(step), strict=True):
        yield own.double(), other.double()
