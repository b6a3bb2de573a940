"""Output-gradient covariances of layers, from unlabeled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.records import LayerSpec
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import batch_size_of, call_model, real_tokens, tensors_in, token_mask

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
    one scale and add up. It goes into ``Moments.output``. Labels are not needed.

    Args:
        model: unchanged afterwards; its parameters get no gradients.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        specs: the layers, with their dense geometry.
        loss: ``outputs`` is the squared error of the model's outputs (any model): gradients of random projections of
            these. ``fisher`` is the divergence from the model's own predictions (classifiers): gradients of the
            cross-entropy with labels drawn from these; of very confident predictions few samples contribute.
        draws: random projections or labels for each batch.
        seed: of the projections and labels.
        forward: runs the model on one batch and returns its outputs; ``call_model`` by default.

    Raises:
        DataError: no batches, or outputs without gradients.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> specs = {"0": LayerSpec(kind="linear", in_channels=4, out_channels=3)}
        >>> collect_gradients(model, [torch.randn(8, 4)], specs)["0"].shape
        torch.Size([1, 3, 3])
    """
    sums: dict[str, Tensor] = {}
    looked_up: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    samples = 0
    with evaluating(model), layer_by_layer(), _catching(model, specs, sums, looked_up):
        for batch in batches:
            for _ in range(draws):
                with torch.enable_grad():
                    value = _loss((forward or call_model)(model, batch), loss, generator, token_mask(batch))
                _back_to_inputs(value, model, looked_up)
                looked_up.clear()
                samples += batch_size_of(batch) or 1
    missing = [path for path in specs if path not in sums]
    if samples == 0 or missing:
        what = f"no gradient reaches {', '.join(missing[:3])}" if samples else "there are no batches"
        msg = f"cannot estimate how errors of layers affect the outputs: {what}"
        raise DataError(msg)
    return {path: value / samples for path, value in sums.items()}


def _loss(outputs: Any, loss: Loss, generator: torch.Generator, mask: Tensor | None) -> Tensor:
    """Return a scalar, summed over the batch, whose gradients have the second moments of ``loss``, without padding."""
    found = [t for t in tensors_in(outputs) if t.is_floating_point() and t.requires_grad]
    if not found:
        msg = "the model's outputs have no gradients: are all of its parameters frozen, or its forward under no_grad?"
        raise DataError(msg)
    total = torch.zeros((), device=found[0].device)
    for out in (real_tokens(t, mask) for t in (found[:1] if loss == "fisher" else found)):
        if loss == "outputs":
            total = total + (out * torch.randn(out.shape, generator=generator).to(out)).sum()
            continue
        logits = out.reshape(-1, out.shape[-1]).float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(out.device)
        total = total + nn.functional.cross_entropy(logits, drawn, reduction="sum")
    return total


def _back_to_inputs(value: Tensor, model: nn.Module, looked_up: list[Tensor]) -> None:
    """Run the backward pass for its hooks only, without accumulating gradients of parameters."""
    wanted = [*looked_up, *(p for p in model.parameters() if p.requires_grad)]
    torch.autograd.grad(value, wanted, allow_unused=True)


@contextmanager
def _catching(
    model: nn.Module, specs: Mapping[str, LayerSpec], sums: dict[str, Tensor], looked_up: list[Tensor]
) -> Iterator[None]:
    """Add the gradients at the outputs of the layers to the sums.

    Outputs of a frozen embedding have no gradient of their own: they are made leaves, and go to ``looked_up``.
    """

    def leaving(path: str, spec: LayerSpec) -> Callable[..., Tensor]:
        def add(gradient: Tensor) -> None:
            axis = -1 - spec.axes
            rows = gradient.detach().float().movedim(axis, 0).reshape(spec.groups, spec.out_channels // spec.groups, -1)
            square = (rows @ rows.mT).double()
            sums[path] = sums[path] + square if path in sums else square

        def leave(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if spec.kind == "embedding" and torch.is_grad_enabled() and not output.requires_grad:
                looked_up.append(output.detach().requires_grad_())
                output = looked_up[-1].clone()  # an operation in place may follow
            if output.requires_grad:
                output.register_hook(add)
            return output

        return leave

    handles = []
    try:
        for path, spec in specs.items():
            handles.append(model.get_submodule(path).register_forward_hook(leaving(path, spec), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
