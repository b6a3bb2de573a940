"""Output-gradient covariances of layers, from unlabeled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.records import LayerSpec
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import batch_size_of, call_model, real_tokens, tensors_in, token_mask
from tenfold.tracing.randomness import Randomness

Loss = Literal["outputs", "fisher"]


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    specs: Mapping[str, LayerSpec],
    *,
    loss: Loss = "outputs",
    draws: int = 1,
    seed: int = 0,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Tensor]:
    """Collect G = Σ E[g gᵀ] (groups, out/groups, out/groups) by path, g the gradient at an output position of a layer.

    An error e of the outputs costs about eᵀ·G·e per sample (the Kronecker-factored curvature of Martens & Grosse
    2015, arXiv 1503.05671, with the layer's own error in place of its inputs): the errors of different layers are on
    one scale and add up. It goes into ``Moments.output_gram``. Labels are not needed.

    Args:
        model: unchanged afterwards; its parameters get no gradients.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        specs: the layers, with their dense geometry.
        loss: ``outputs`` is the squared error of the model's outputs (any model): gradients of random projections of
            these. ``fisher`` is the divergence from the model's own predictions (classifiers): gradients of the
            cross-entropy with labels drawn from these; of very confident predictions few samples contribute.
        draws: random projections or labels for each batch.
        seed: of the projections, the labels and what the forward draws.
        forward: runs the model on one batch and returns its outputs; ``call_model`` by default.

    Raises:
        DataError: no batches, or outputs without gradients.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> specs = {"0": LayerSpec(kind="linear", in_channels=4, out_channels=3)}
        >>> collect_gradients(model, [torch.randn(8, 4)], specs)["0"].shape
        torch.Size([1, 3, 3])
    """
    with GradientSums(model, specs, loss=loss, seed=seed, forward=forward) as sums:
        for batch in batches:
            for _ in range(draws):
                sums.add(model, batch)
    return sums.mean()


class GradientSums:
    """A context that sums gradients at the outputs of layers over batches: see ``collect_gradients``."""

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, LayerSpec],
        *,
        loss: Loss = "outputs",
        seed: int = 0,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self._model, self._specs, self._loss, self._forward = model, specs, loss, forward or call_model
        self._sums: dict[str, Tensor] = {}
        self._starts: list[Tensor] = []
        self._seed, self._generator = seed, torch.Generator().manual_seed(seed)
        self._samples = 0
        self._open = ExitStack()

    def __enter__(self) -> Self:
        trainable = any(p.requires_grad for p in self._model.parameters())
        with ExitStack() as stack:
            for context in (evaluating(self._model), layer_by_layer(), _frozen(self._model)):
                stack.enter_context(context)
            for path, spec in self._specs.items():
                layer, hook = self._model.get_submodule(path), self._leaving(path, spec, trainable=trainable)
                stack.enter_context(layer.register_forward_hook(hook, prepend=True))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, model: nn.Module, batch: Any) -> None:
        """Run one batch forward, and backward from one random projection or draw of labels."""
        self._starts.clear()
        with torch.enable_grad(), Randomness(self._model, batch).seeded(self._seed + self._samples):
            value = _loss(self._forward(model, batch), self._loss, self._generator, token_mask(batch))
        torch.autograd.grad(value, self._starts, allow_unused=True)  # for its hooks only
        self._samples += batch_size_of(batch) or 1

    def mean(self) -> dict[str, Tensor]:
        """Return the sums divided by the number of samples.

        Raises:
            DataError: no batches, or a layer that no gradient reached.
        """
        missing = [path for path in self._specs if path not in self._sums]
        if self._samples == 0 or missing:
            what = f"no gradient reaches {', '.join(missing[:3])}" if self._samples else "there are no batches"
            msg = f"cannot estimate how errors of layers affect the outputs: {what}"
            raise DataError(msg)
        return {path: value / self._samples for path, value in self._sums.items()}

    def _leaving(self, path: str, spec: LayerSpec, *, trainable: bool) -> Callable[..., Tensor]:
        """Return a hook that adds the gradients at the outputs of a layer to its sum."""

        def add(gradient: Tensor) -> None:
            axis = -1 - spec.axes
            rows = gradient.detach().float().movedim(axis, 0).reshape(spec.groups, spec.out_channels // spec.groups, -1)
            square = (rows @ rows.mT).double()
            self._sums[path] = self._sums[path] + square if path in self._sums else square

        def leave(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            # The graph starts at the outputs of the first layers; without trainable parameters only at embeddings.
            starts = (trainable or spec.kind == "embedding") and torch.is_grad_enabled()
            if starts and not output.requires_grad:
                self._starts.append(output.detach().requires_grad_())
                output = self._starts[-1].clone()  # an operation in place may follow
            if output.requires_grad:
                output.register_hook(add)
            return output

        return leave


def _loss(outputs: Any, loss: Loss, generator: torch.Generator, mask: Tensor | None) -> Tensor:
    """Return a scalar, summed over the batch, whose gradients have the second moments of ``loss``, without padding."""
    differentiable = [t for t in tensors_in(outputs) if t.is_floating_point() and t.requires_grad]
    if not differentiable:
        msg = "the model's outputs have no gradients: are all of its parameters frozen, or its forward under no_grad?"
        raise DataError(msg)
    total = torch.zeros((), device=differentiable[0].device)
    for out in (real_tokens(t, mask) for t in (differentiable[:1] if loss == "fisher" else differentiable)):
        if loss == "outputs":
            total = total + (out * torch.randn(out.shape, generator=generator).to(out)).sum()
            continue
        logits = out.reshape(-1, out.shape[-1]).float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(out.device)
        total = total + nn.functional.cross_entropy(logits, drawn, reduction="sum")
    return total


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
