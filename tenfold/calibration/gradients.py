"""Output-gradient covariances of layers, from unlabeled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tenfold.calibration.clipping import clipped
from tenfold.calibration.drawn_labels import by_drawn_labels, labels_sent_back
from tenfold.calibration.last_layer import LastLayer
from tenfold.calibration.micro_batches import Split, parts_of, split_of
from tenfold.calibration.shares import Together
from tenfold.calibration.sketched_moments import SketchSums, sketch_size
from tenfold.decompositions.covariance import WIDE_OUTPUTS, Covariance, Sketch
from tenfold.errors import DataError, first_line
from tenfold.records import LayerSpec
from tenfold.tensors import plain_arithmetic, squarable, untransformed
from tenfold.tracing.contexts import device_of, evaluating, layer_by_layer
from tenfold.tracing.held_tensors import drop_graphs
from tenfold.tracing.inputs import batch_size_of, call_model, tensors_in
from tenfold.tracing.masks import real_places, real_tokens, token_mask
from tenfold.tracing.randomness import Randomness
from tenfold.tracing.samples import samples_in

Loss = Literal["outputs", "fisher"]


def output_sketch_rows(spec: LayerSpec, widest: int | None = None) -> int | None:
    """Return how many rows the sketch of a layer's output Gram matrix has, or None where the matrix is exact.

    At most ``widest``, and no more entries than four matrices of that width.

    Example:
        >>> [output_sketch_rows(LayerSpec(kind="linear", in_channels=8, out_channels=n)) for n in (1024, 4096, 50257)]
        [None, 1024, 83]
    """
    limit, outputs = WIDE_OUTPUTS if widest is None else widest, spec.out_channels // spec.groups
    return None if outputs <= limit else min(limit, sketch_size(outputs, 2 * limit))


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    specs: Mapping[str, LayerSpec],
    *,
    loss: Loss = "outputs",
    draws: int = 1,
    seed: int = 0,
    widest: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Covariance]:
    """Collect G = Σ E[g gᵀ] (groups, out/groups, out/groups) by path, g the gradient at an output position of a layer.

    An error e of the outputs costs about eᵀ·G·e per sample (the Kronecker-factored curvature of Martens & Grosse
    2015, arXiv 1503.05671, with the layer's own error in place of its inputs): the errors of different layers are on
    one scale and add up. It goes into ``Moments.output_gram``. Labels are not needed. Layers that no gradient reaches
    are left out: what runs under ``no_grad`` or is detached, or is not used for the outputs.

    Args:
        model: unchanged afterwards; its parameters get no gradients.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        specs: the layers, with their dense geometry.
        loss: ``outputs`` is the squared error of the model's outputs (any model): gradients of random projections of
            these. ``fisher`` is the divergence from the model's own predictions (classifiers): gradients of the
            cross-entropy with labels drawn from these; of very confident predictions few samples contribute.
        draws: random projections or labels for each batch.
        seed: of the projections, labels and sketches.
        widest: Gram matrices of more outputs than this are sketched, 1,024 by default: a diagonal, which is exact, and
            a few rows.
        forward: runs the model on one batch and returns its outputs; ``call_model`` by default.

    Raises:
        DataError: no batches, or outputs without gradients.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> specs = {"0": LayerSpec(kind="linear", in_channels=4, out_channels=3)}
        >>> collect_gradients(model, [torch.randn(8, 4)], specs)["0"].shape
        torch.Size([1, 3, 3])
    """
    with GradientSums(model, specs, loss=loss, seed=seed, widest=widest, forward=forward) as sums:
        for batch in batches:
            for _ in range(draws):
                sums.add(model, batch)
    return sums.mean()


class GradientSums:
    """A context that sums gradients at the outputs of layers over batches: see ``collect_gradients``.

    With ``last``, a layer whose outputs are those of the model does not run: the second moment of the gradients there
    is the identity for each position, and what goes back from it is drawn. By the loss ``fisher``, the layer runs on a
    few positions at a time, and is not measured itself.

    Attributes:
        split: how batches are differentiated.
        clip: norms at the positions of a sample are kept within their mean times and divided by this; see ``clipped``.
        entered: leaves among the inputs of the next batch whose gradients are wanted too: a hook on each is called.
        differentiating: whether the backward pass of the outputs runs, and not one that the forward takes itself.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, LayerSpec],
        *,
        loss: Loss = "outputs",
        seed: int = 0,
        widest: int | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        last: LastLayer | None = None,
    ) -> None:
        self._last, self._rows_at_last = last, 0
        self._model, self._specs, self._loss, self._forward = model, specs, loss, forward or call_model
        self._seed, self._widest = seed, widest
        self._squares: dict[str, Tensor] = {}
        self._sketches: dict[str, SketchSums] = {}
        self._starts: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._samples = 0
        self.differentiating = False
        self.clip: float | None = None
        self.entered: Sequence[Tensor] = ()
        self._size = 1
        self._open = ExitStack()
        self.split = Split()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for context in (evaluating(self._model), layer_by_layer(), _frozen(self._model)):
                stack.enter_context(context)
            for path, spec in self._specs.items():
                layer = self._model.get_submodule(path)
                stack.enter_context(
                    layer.register_forward_hook(self._leaving(path, spec), prepend=True, with_kwargs=True)
                )
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def split_like(self, batch: Any) -> None:
        """Look at a batch for how many samples to differentiate at a time; the sums do not depend on it.

        Labels are drawn for whole batches.
        """
        if self._loss == "outputs":
            self.split = split_of(self._model, batch, self._forward)
            self._starts.clear()

    def add(self, model: nn.Module, batch: Any) -> None:
        """Run one batch forward, and backward from one random projection or draw of labels.

        Raises:
            DataError: the outputs have no gradients, or none can be taken.
        """
        drawn = Projection(self._generator, batch, token_mask(batch, model))
        for part in parts_of(batch, self.split.rows):
            self.add_part(model, part, drawn)
            self._samples += samples_in(part)

    def add_sent_back(self, model: nn.Module, batch: Any, gradient: Tensor) -> None:
        """Run one batch forward, and backward from the gradient at its output, by whatever loss that is.

        Use it for a part of a network, once the parts behind it have said what their inputs cost.

        Raises:
            DataError: the output has no gradient, or none can be taken.
        """
        self.add_part(model, batch, SentBack(gradient))
        self._samples += samples_in(batch)

    def add_part(self, model: nn.Module, part: Any, drawn: Projection | SentBack) -> None:
        """Run some samples of a batch forward, and backward from their share of its projection."""
        self._starts[:] = self.entered
        self._size = samples_in(part)
        with torch.enable_grad(), Randomness(self._model, part).seeded(self._seed + self._samples):
            outputs, entered = self._run(model, part)
            mask = token_mask(part, model)
            if isinstance(drawn, SentBack) or self._loss == "outputs":
                gradients = drawn.of(outputs, mask)
            elif entered is None or self._last is None:
                outputs = [real_tokens(outputs[0], mask)]
                gradients = [by_drawn_labels(outputs[0].detach(), self._generator)]
            else:
                real = real_places(entered, mask)
                outputs = [entered.flatten(0, -2) if real is None else entered[real]]
                gradients = [labels_sent_back(self._last.module, outputs[0].detach(), self._generator)]
        if entered is not None and self._last is not None and self._loss == "outputs":
            at = next(i for i, output in enumerate(outputs) if output is entered)
            real = real_places(entered, mask)
            self._rows_at_last += entered[..., 0].numel() if real is None else int(real.sum())
            gradients[at] = self._last.sent_back(gradients[at])
            self.at_last(self._last, entered.detach(), gradients[at])
        self.differentiating = True
        try:
            torch.autograd.grad(outputs, self._starts, gradients, allow_unused=True)  # for its hooks only
        except RuntimeError as error:  # a forward that takes gradients itself has used the graph up, for instance
            msg = f"gradients of the model's outputs cannot be taken: {first_line(error)}"
            raise DataError(msg) from error
        finally:
            self.differentiating = False
            self._starts.clear()
            drop_graphs(model)

    def _run(self, model: nn.Module, part: Any) -> tuple[list[Tensor], Tensor | None]:
        """Return what to differentiate of a forward, and which of it enters the layer that is left out, if one is."""
        if self._last is None:
            return _differentiable(tensors_in(self._forward(model, part))), None
        outputs = self._last.run(model, part, self._forward)
        entered = outputs[self._last.place]
        if not entered.requires_grad:
            entered = outputs[self._last.place] = entered.detach().requires_grad_()
            self._starts.append(entered)
        return _differentiable(outputs), entered

    def at_last(self, last: LastLayer, entered: Tensor, gradient: Tensor) -> None:
        """Take note of what entered the layer that is left out, and of the gradient there."""

    def gather(self, together: Together) -> None:
        """Make these the sums of all processes, each of which calls this."""
        self._samples = sum(together.everyones(self._samples))
        self._squares = together.summed(self._squares)
        for path, spec in self._specs.items():
            rows = output_sketch_rows(spec, self._widest)
            if rows is not None:
                sketch = self._sketches.pop(path, None) or SketchSums(rows, self._seed)
                sketch.gather(together)
                if sketch.count:
                    self._sketches[path] = sketch

    @property
    def samples(self) -> int:
        """Samples added so far, one that was added twice counted twice."""
        return self._samples

    def mean(self) -> dict[str, Covariance]:
        """Return the sums divided by the number of samples, of the layers that a gradient reached. Frees the sums.

        Raises:
            DataError: no batches, no gradient anywhere, or gradients that are not finite.
        """
        even = self._last.path if self._last is not None and self._rows_at_last else ""
        reached = {*self._squares, *self._sketches, *({even} & {*self._specs})}
        if self._samples == 0 or (self._specs and not reached):
            what = (
                f"no gradient reaches {', '.join(list(self._specs)[:3])}" if self._samples else "there are no batches"
            )
            msg = f"cannot estimate how errors of layers affect the outputs: {what}"
            raise DataError(msg)
        odd = [path for path, own in self._squares.items() if not torch.isfinite(own).all()]
        odd += [path for path, own in self._sketches.items() if not own.finite()]
        if odd:
            msg = f"cannot estimate how errors of layers affect the outputs: gradients at {odd[0]} are not finite"
            raise DataError(msg)
        found: dict[str, Covariance] = {
            path: self._squares.pop(path).div_(self._samples) for path in list(self._squares)
        }
        for path in list(self._sketches):
            own = self._sketches.pop(path)
            sketch = own.sketch()
            found[path] = sketch.scaled(sketch.rest.new_full((len(sketch.rest),), own.count / self._samples))
        if even in reached:
            spec = self._specs[even]
            shape = spec.groups, spec.out_channels // spec.groups
            each = torch.full(shape, self._rows_at_last / self._samples, dtype=torch.float64)
            found[even] = Sketch.diagonal_of(each.to(device_of(self._model)))
        return {path: found[path] for path in self._specs if path in reached}

    def _leaving(self, path: str, spec: LayerSpec) -> Callable[..., Tensor]:
        """Return a hook that adds the gradients at the outputs of a layer to its sum."""

        def leave(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            # The graph starts at the outputs of the first layers that count, whatever parameters may be trained.
            if untransformed(output) is not output:
                return output  # within a transform of torch.func, which has gradients of its own
            if self._last is not None and path == self._last.path:
                return output
            if torch.is_grad_enabled() and not output.requires_grad:
                self._starts.append(output.detach().requires_grad_())
                output = self._starts[-1].clone()  # an operation in place may follow
            if output.requires_grad:
                entered = next(tensors_in((args, kwargs))).detach()
                output.register_hook(self.gathering(path, spec, entered, output.detach()))
            return output

        return leave

    def gathering(self, path: str, spec: LayerSpec, entered: Tensor, output: Tensor) -> Callable[[Tensor], None]:
        """Return what is called with the gradient at an output of a layer, which came of what entered it."""
        del entered, output
        size = output_sketch_rows(spec, self._widest)

        @plain_arithmetic()
        def add(gradient: Tensor) -> None:
            if not self.differentiating:
                return  # of a forward that takes gradients itself
            apart = channels_first(squarable(gradient.detach()), spec)
            rows = (apart if self.clip is None else clipped(apart, self._size, self.clip)).flatten(2)
            if size is not None:
                self._sketches.setdefault(path, SketchSums(size, self._seed)).add(rows)
            elif path in self._squares:
                self._squares[path].add_((rows @ rows.mT).double())
            else:
                self._squares[path] = (rows @ rows.mT).double()

        return add


def channels_first(values: Tensor, spec: LayerSpec) -> Tensor:
    """Return outputs of a layer, or gradients there, as (groups, out/groups, first axis, all other positions)."""
    moved = values.movedim(-1 - spec.axes, 0)
    return moved.reshape(spec.groups, spec.out_channels // spec.groups, moved.shape[1] if moved.dim() > 1 else 1, -1)


@dataclass(frozen=True, eq=False)
class SentBack:
    """The gradient at the one output of a part of a network, as the parts behind it send it back."""

    gradient: Tensor

    def of(self, outputs: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
        """Return what the output is multiplied with."""
        del mask  # padding has no gradient already
        if len(outputs) != 1 or outputs[0].shape != self.gradient.shape:
            msg = "a part of a network does not put out the one tensor that the part behind it takes"
            raise DataError(msg)
        return [self.gradient.to(outputs[0])]


@dataclass
class Projection:
    """A random projection of the outputs of one batch, given out part by part; its numbers depend on no part."""

    generator: torch.Generator
    batch: Any
    mask: Tensor | None
    _left: list[Tensor] = field(default_factory=list)

    def of(self, outputs: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
        """Return for each of the next outputs what it is multiplied with: 0 at padding."""
        real = [real_places(output, mask) for output in outputs]
        if not self._left:
            self._left = [self._draw(output, real=at is not None) for output, at in zip(outputs, real, strict=True)]
        found = []
        for i, (output, at) in enumerate(zip(outputs, real, strict=True)):
            count = len(output) if at is None else int(at.sum())
            own, self._left[i] = self._left[i][:count], self._left[i][count:]
            own = own.to(output)
            if at is not None:
                own = torch.zeros_like(output, requires_grad=False).index_put((at,), own)
            found.append(own)
        return found

    def _draw(self, output: Tensor, *, real: bool) -> Tensor:
        size = batch_size_of(self.batch) or 0
        if real and self.mask is not None:
            rows = int(self.mask.sum()) * (size if len(self.mask) == 1 else 1)
        else:
            rows = max(len(output), size)
        return torch.randn(rows, *output.shape[1 + real :], generator=self.generator, device="cpu")


def _differentiable(outputs: Iterable[Tensor]) -> list[Tensor]:
    found = [t for t in outputs if t.is_floating_point() and t.requires_grad]
    if not found:
        msg = "the model's outputs have no gradients: does its forward run under no_grad, or detach them?"
        raise DataError(msg)
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Run without gradients of parameters: they would take as long as those of the activations, and are not used."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad = True
