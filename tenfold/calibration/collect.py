"""Collect the moments of layer inputs in one pass over unlabeled batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

from torch import Tensor, nn

from tenfold.calibration.moment_sums import MomentSums, sketch_rows
from tenfold.calibration.shared_inputs import SharedSums, explaining
from tenfold.calibration.shares import Share, together_of
from tenfold.decompositions import Moments
from tenfold.errors import CalibrationWarning, DataError, warn
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.records import LayerSpec
from tenfold.tensors import plain_arithmetic, untransformed
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.masks import token_mask
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
    ``attention_mask`` (batch, sequence), padding contributes no rows. Layers that no batch reaches, such as experts
    without tokens, are left out.

    Args:
        model: whose inputs are measured.
        batches: inputs as ``call_model`` takes them, on the device of the model; a ``Share`` of them where other
            processes see the others.
        specs: the layers, with their dense geometry; all that ``measurable`` finds if None.
        dense: the dense model, if ``model`` is a compressed copy of it: the moments then also hold the outputs of the
            same layers of the dense model on the same batches, so that each layer can correct errors of those before.
        positions: output positions sampled from each map of a convolution, other ones for every batch; None for all.
            A few dozen are enough, because neighbouring positions are correlated.
        seed: of the positions, the sketches and what the forward draws.
        widest: second moments of patches wider than this are sketched, see ``moment_bytes``; 8192 by default.
        forward: runs the model on one batch; ``call_model`` by default.

    Raises:
        DataError: no batches, activations that are not finite, or no layer that the forward reaches.

    Warns:
        CalibrationWarning: a layer saw fewer rows than it has inputs, or fewer patches than a patch has numbers, which
            makes the moments singular.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> moments = collect_moments(model, [torch.randn(4, 3, 8, 8)])
        >>> moments["0"].count, moments["0"].width
        (144, 27)
    """
    specs = dict(specs) if specs is not None else measurable(model)
    _announce(specs, widest)
    sums = SharedSums({path: MomentSums(widest, seed) for path in specs})
    draw = _Draw(positions, seed)
    steps = batches.places if isinstance(batches, Share) else count()
    run = forward or call_model
    seen = 0
    with evaluating(model), layer_by_layer(), _watching(model, dense, specs, sums, draw):
        for seen, (batch, draw.step) in enumerate(zip(batches, steps, strict=False), start=1):  # noqa: B007
            draw.mask = token_mask(batch, model)
            if dense is not None:
                with evaluating(dense), Randomness(dense, batch).seeded(seed + draw.step):
                    run(dense, batch)
            with Randomness(model, batch).seeded(seed + draw.step):
                run(model, batch)
            sums.close()
    if seen == 0:
        msg = "there are no calibration batches. Pass an iterable with at least one."
        raise DataError(msg)
    together = together_of(batches)
    if together is not None:
        sums.gather(together, specs)
    moments = sums.moments()
    _warn_if_few({path: own for path, own in moments.items() if specs[path].kind != "embedding"}, specs)
    return moments


def _announce(specs: Mapping[str, LayerSpec], widest: int | None) -> None:
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
    model: nn.Module, dense: nn.Module | None, specs: Mapping[str, LayerSpec], sums: SharedSums, draw: _Draw
) -> Iterator[None]:
    """Add the inputs of the layers, and the outputs of the dense model's layers, to the sums."""
    waiting: dict[str, list[Tensor]] = {path: [] for path in specs}  # outputs of the dense model, which runs first

    def entering(path: str) -> Callable[..., None]:
        def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            y = waiting[path].pop(0) if waiting[path] else None
            with explaining(path):
                sums.add(path, next(tensors_in((args, kwargs))), specs[path], y, **draw.options())

        return enter

    def leaving(path: str) -> Callable[..., None]:
        @plain_arithmetic()
        def leave(module: Any, _args: Any, output: Tensor) -> None:
            y = untransformed(output).detach().clone()  # an activation in place may follow
            if getattr(module, "bias", None) is not None:
                y -= module.bias.view(-1, *[1] * specs[path].axes)
            waiting[path].append(y)

        return leave

    def begin(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = token_mask((args, kwargs))
        draw.mask = draw.mask if mask is None else mask  # that of a part of the batch

    with ExitStack() as stack:
        for whole in (model,) if dense is None else (dense, model):
            stack.enter_context(whole.register_forward_pre_hook(begin, with_kwargs=True))
        for path in specs:
            if dense is not None:
                stack.enter_context(dense.get_submodule(path).register_forward_hook(leaving(path), prepend=True))
            layer = model.get_submodule(path)
            stack.enter_context(layer.register_forward_pre_hook(entering(path), with_kwargs=True))
        yield


def _warn_if_few(moments: Mapping[str, Moments], specs: Mapping[str, LayerSpec]) -> None:
    few = {path: m for path, m in moments.items() if m.count < m.width}
    if few:
        path, worst = max(few.items(), key=lambda item: item[1].width / item[1].count)
        more = -(-worst.width // worst.count)
        if specs[path].axes:
            what = f"patches of {worst.width} numbers enter it, and {worst.count} of them were seen"
            remedy = ", or take more positions of larger maps (positions, in the recipe's calibration)"
        else:
            what = f"it has {worst.width} inputs, and {worst.count} rows of them were seen, one per sample or token"
            remedy = ""
        msg = (
            f"calibration data are few for {len(few)} layer{'s' * (len(few) > 1)}, most of all for {path!r}: {what}. "
            f"At least {worst.width} are needed, better ten times that: give {more} to {10 * more} times as many "
            f"calibration samples{remedy}."
        )
        warn(msg, CalibrationWarning)
