"""Collect the moments of layer inputs in one pass over unlabeled batches."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from tenfold.calibration.moment_sums import MomentSums, moment_bytes, sketch_rows
from tenfold.decompositions import Moments
from tenfold.errors import CalibrationWarning, DataError
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.records import LayerSpec
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in, token_mask
from tenfold.tracing.randomness import Randomness

logger = logging.getLogger("tenfold")

Forward = Callable[[nn.Module, Any], object]


def measurable(model: nn.Module) -> dict[str, LayerSpec]:
    """Return the geometry, by path, of all layers with measurable inputs: linear layers, convolutions, embeddings.

    A factorized layer counts as the dense one that it replaces. Modules that appear twice are listed once.
    """
    specs: dict[str, LayerSpec] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, FactorizedLayer):
            specs[path], inside = module.spec, (*inside, f"{path}.")
            continue
        spec, _ = spec_of(module)
        if spec is not None:
            specs[path] = spec
    return specs


def collect_moments(
    model: nn.Module,
    batches: Iterable[Any],
    specs: Mapping[str, LayerSpec] | None = None,
    *,
    dense: nn.Module | None = None,
    positions: int | None = None,
    seed: int = 0,
    widest: int | None = None,
    forward: Forward | None = None,
) -> dict[str, Moments]:
    """Collect the moments of the input patches of layers, by path, in one pass over unlabeled batches.

    The model runs in evaluation mode, without gradients, and is unchanged afterwards. Products are computed in the
    dtype of the activations (float32 at least) and summed in float64. Each call of a layer and each position of a
    sequence is a row. For an embedding the ids are counted: see ``MomentSums.add``. If a batch has the keyword
    ``attention_mask`` (batch, sequence), padding contributes no rows.

    Args:
        model: whose inputs are measured.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        specs: the layers, with their dense geometry; all that ``measurable`` finds if None.
        dense: the dense model, if ``model`` is a compressed copy of it: the moments then also hold the outputs of the
            same layers of the dense model on the same batches, so that each layer can correct errors of those before.
        positions: output positions sampled from each map of a convolution, other ones for every batch; None for all.
            A few dozen are enough, because neighbouring positions are correlated.
        seed: of the positions, the sketches and what the forward draws.
        widest: second moments of patches wider than this are sketched, see ``moment_bytes``; 8192 by default.
        forward: runs the model on one batch; ``call_model`` by default.

    Raises:
        DataError: no batches, activations that are not finite, or a layer that the forward never reaches.

    Warns:
        CalibrationWarning: fewer rows than a patch has entries, which makes the moments singular.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> moments = collect_moments(model, [torch.randn(4, 3, 8, 8)])
        >>> moments["0"].count, moments["0"].width
        (144, 27)
    """
    specs = dict(specs) if specs is not None else measurable(model)
    _announce(specs, targets=dense is not None, widest=widest)
    sums = {path: MomentSums(widest, seed) for path in specs}
    draw = _Draw(positions, seed)
    run = forward or call_model
    seen = 0
    with evaluating(model), layer_by_layer(), _watching(model, dense, specs, sums, draw):
        for seen, batch in enumerate(batches, start=1):  # noqa: B007
            draw.mask = token_mask(batch)
            if dense is not None:
                with evaluating(dense), Randomness(dense, batch).seeded(seed + draw.step):
                    run(dense, batch)
            with Randomness(model, batch).seeded(seed + draw.step):
                run(model, batch)
            draw.step += 1
    if seen == 0:
        msg = "there are no calibration batches. Pass an iterable with at least one."
        raise DataError(msg)
    moments = {path: own.moments(path) for path, own in sums.items()}
    _warn_if_few({path: own for path, own in moments.items() if specs[path].kind != "embedding"})
    return moments


def _announce(specs: Mapping[str, LayerSpec], *, targets: bool, widest: int | None) -> None:
    size = moment_bytes(specs, targets=targets, widest=widest)
    logger.info("moments of %d layers take %.1f MiB", len(specs), size / 2**20)
    for path, spec in specs.items():
        rows = sketch_rows(spec, widest)
        if rows is not None:
            width = prod(spec.group_shape[2:])
            logger.info("layer %r: inputs %d wide, of which a sketch of %d rows is kept", path, width, rows)


@dataclass
class _Draw:
    """Positions and tokens to sample: the same in both models, different in each batch."""

    positions: int | None
    seed: int
    step: int = 0
    mask: Tensor | None = None  # which tokens of the batch are real

    def options(self) -> dict[str, Any]:
        return {"positions": self.positions, "seed": self.seed * 1_000_003 + self.step, "mask": self.mask}


@contextmanager
def _watching(
    model: nn.Module, dense: nn.Module | None, specs: Mapping[str, LayerSpec], sums: dict[str, MomentSums], draw: _Draw
) -> Iterator[None]:
    """Add the inputs of the layers, and the outputs of the dense model's layers, to the sums."""
    waiting: dict[str, list[Tensor]] = {path: [] for path in specs}  # outputs of the dense model, which runs first

    def entering(path: str) -> Callable[..., None]:
        def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x = next(tensors_in((args, kwargs))).detach()
            y = waiting[path].pop(0) if waiting[path] else None
            sums[path].add(x, specs[path], y, **draw.options())

        return enter

    def leaving(path: str) -> Callable[..., None]:
        def leave(module: Any, _args: Any, output: Tensor) -> None:
            y = output.detach().clone()  # an activation in place may follow
            if getattr(module, "bias", None) is not None:
                y -= module.bias.view(-1, *[1] * specs[path].axes)
            waiting[path].append(y)

        return leave

    with ExitStack() as stack:
        for path in specs:
            if dense is not None:
                stack.enter_context(dense.get_submodule(path).register_forward_hook(leaving(path), prepend=True))
            layer = model.get_submodule(path)
            stack.enter_context(layer.register_forward_pre_hook(entering(path), with_kwargs=True))
        yield


def _warn_if_few(moments: Mapping[str, Moments]) -> None:
    few = {path: m for path, m in moments.items() if m.count < m.width}
    if few:
        path, worst = max(few.items(), key=lambda item: item[1].width / item[1].count)
        more = -(-worst.width // worst.count)
        layers = f"{len(few)} layer{'s' * (len(few) > 1)}"
        msg = (
            f"{layers} saw fewer rows than patches are wide; layer {path!r} saw {worst.count} and needs at least "
            f"{worst.width}, better ten times that. Give {more} to {10 * more} times as many calibration samples, or "
            "take more positions of each."
        )
        warnings.warn(msg, CalibrationWarning, stacklevel=3)
