"""How errors of whole blocks affect the outputs of a network: Gram matrices of the gradients at what blocks put out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.calibration.gradients import Projection
from tenfold.calibration.last_layer import LastLayer, UnlikeOutputsError
from tenfold.decompositions.covariance import add_ridge, shrunk
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, map_tensors, tensors_in
from tenfold.tracing.masks import token_mask
from tenfold.tracing.randomness import Randomness
from tenfold.tracing.samples import samples_in

_RIDGE = 1e-3  # directions that no gradient has seen count a little


def rows_of(output: Tensor) -> Tensor:
    """Return an output as rows (n, channels): features are the last axis, channels of maps the second one."""
    return output.flatten(0, -2) if output.dim() < 4 else output.movedim(1, -1).flatten(0, -2)


def block_roots(model: nn.Module, paths: Sequence[str], batches: Sequence[Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Return R (channels, channels) by path with R Rᵀ ∝ Σ g gᵀ, g the gradient of the outputs at a block's own output.

    An error e of a block costs the network about ‖e R‖²; see ``collect_gradients``, which has this of layers. Blocks
    that no gradient reaches are left out. A last layer of very many outputs, such as the head of a language model, does
    not run where it need not: see ``LastLayer``.

    Args:
        model: unchanged afterwards.
        paths: of modules that put out tensors, the first of which counts.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        seed: of the random projections of the outputs.
    """
    last = LastLayer.of(model, batches[0], call_model)
    try:
        sums, samples = _summed(model, paths, batches, seed, last)
    except UnlikeOutputsError:
        sums, samples = _summed(model, paths, batches, seed, None)
    return {path: _root(square, samples) for path, square in sums.items() if bool(square.isfinite().all())}


def _summed(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Any], seed: int, last: LastLayer | None
) -> tuple[dict[str, Tensor], int]:
    """Return Σ g gᵀ by path, and the number of samples."""
    sums: dict[str, Tensor] = {}
    generator, samples = torch.Generator().manual_seed(seed), 0
    with evaluating(model), layer_by_layer(), torch.enable_grad():
        for batch in batches:
            samples += samples_in(batch)
            for path, gradient in _gradients(model, paths, batch, generator, last).items():
                rows = rows_of(gradient).double()
                square = rows.mT @ rows
                sums[path] = sums[path] + square if path in sums else square
    return sums, samples


def _gradients(
    model: nn.Module, paths: Sequence[str], batch: Any, generator: torch.Generator, last: LastLayer | None
) -> dict[str, Tensor]:
    """Return the gradients of one random projection of the outputs at what the blocks put out."""
    seen: dict[str, Tensor] = {}

    def leaving(path: str) -> Any:
        def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
            # The graph starts at the first block: what was made before it has no gradients.
            known = map_tensors(output, lambda t: t if t.requires_grad or not t.is_floating_point() else _start(t))
            seen[path] = next(tensors_in(known))
            return known

        return leave

    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(model.get_submodule(path).register_forward_hook(leaving(path)))
        with Randomness(model, batch).seeded(0):
            every = [*tensors_in(call_model(model, batch))] if last is None else last.run(model, batch, call_model)
    entered = None if last is None else every[last.place]
    outputs = [t for t in every if t.is_floating_point() and t.requires_grad]
    if not outputs or not seen:
        return {}
    mask = token_mask(batch, model)
    drawn = Projection(generator, batch, mask).of(outputs, mask)
    if last is not None:
        drawn = [last.sent_back(g) if output is entered else g for g, output in zip(drawn, outputs, strict=True)]
    found = torch.autograd.grad(outputs, list(seen.values()), drawn, allow_unused=True)
    return {path: gradient for path, gradient in zip(seen, found, strict=True) if gradient is not None}


def _start(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _root(square: Tensor, samples: int) -> Tensor:
    """Return a root of the matrix, scaled to a mean diagonal of 1 and drawn towards its mean where samples are few."""
    level = square.diagonal().mean().clamp_min(torch.finfo(square.dtype).tiny)
    scaled = shrunk((square / level)[None], samples)
    assert isinstance(scaled, Tensor)  # noqa: S101 - of a matrix that is none but a matrix
    root: Tensor = torch.linalg.cholesky(add_ridge(scaled, _RIDGE)[0])
    return root
