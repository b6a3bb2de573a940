"""Collect input statistics and output-gradient covariances from unlabeled batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from tenfold.calibration.collect import collect_moments, measurable
from tenfold.calibration.gradients import GradientSums
from tenfold.decompositions import Moments
from tenfold.errors import CalibrationWarning, DataError
from tenfold.records import Calibration, LayerSpec, Profile


def calibrate(
    model: nn.Module,
    batches: Sequence[Any],
    specs: Mapping[str, LayerSpec] | None = None,
    settings: Calibration | None = None,
    *,
    seed: int = 0,
) -> dict[str, Moments]:
    """Collect the input moments and output-gradient covariances of layers, by path, for data-aware plans and fits.

    Layers are linear layers, convolutions and embeddings. One pass over the batches, forward for the moments and
    backward for the gradients. No labels are needed, and the model is unchanged afterwards.

    Args:
        model: any module.
        batches: inputs as ``call_model`` takes them, on the device of the model; iterated over once per draw.
        specs: the layers, with their dense geometry: see ``called_layers``. All layers if None.
        settings: positions and projections that are sampled, and the width from which inputs are sketched; the method
            decides nothing here.
        seed: of the positions, the projections and what the forward draws.

    Raises:
        DataError: no batches, activations that are not finite, or a layer that the forward never reaches.

    Warns:
        CalibrationWarning: too few batches for the width of a layer, or outputs without gradients; all layers then
            count as equally important.

    Example:
        >>> import torch
        >>> known = calibrate(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), [torch.randn(64, 4)])
        >>> known["0"].output_gram.shape
        torch.Size([1, 3, 3])
    """
    settings = settings or Calibration()
    specs = measurable(model) if specs is None else specs
    positions, widest = settings.positions, settings.max_width
    collect = partial(collect_moments, model, batches, specs, positions=positions, seed=seed, widest=widest)
    moments = None
    try:
        with GradientSums(model, specs, seed=seed) as gradients:
            moments = collect(forward=gradients.add)
            for batch in (batch for _ in range(settings.draws - 1) for batch in batches):
                gradients.add(model, batch)
        grams = gradients.mean()
    except DataError as error:
        moments = collect() if moments is None else moments
        warnings.warn(f"{error}. All layers count as equally important.", CalibrationWarning, stacklevel=2)
        return moments
    return {path: own.replace(output_gram=grams[path]) for path, own in moments.items()}


def called_layers(profile: Profile) -> dict[str, LayerSpec]:
    """Return the geometry, by path, of the layers that the forward calls, whose inputs can therefore be measured."""
    return {layer.path: layer.spec for layer in profile.layers if layer.spec is not None and layer.calls}
