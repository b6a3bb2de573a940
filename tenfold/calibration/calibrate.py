"""All that unlabeled data say about a model: what enters its layers, and how much the network minds their errors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from tenfold.calibration.gradients import GradientSums
from tenfold.calibration.input_moments import collect_moments, measurable
from tenfold.decompositions import Moments
from tenfold.errors import CalibrationWarning, DataError
from tenfold.records import LayerSpec, Profile


def calibrate(
    model: nn.Module,
    batches: Sequence[Any],
    specs: Mapping[str, LayerSpec] | None = None,
    *,
    positions: int | None = 64,
    draws: int = 1,
    seed: int = 0,
    widest: int | None = None,
) -> dict[str, Moments]:
    """Return the moments of what enters linear layers, convolutions and embeddings, by path, with the output metric.

    One pass over the batches, forward for the moments and backward for how much the model's outputs change with those
    of each layer. The model is as before afterwards. Labels are not needed.

    Args:
        model: any module.
        batches: inputs as ``call_model`` takes them, on the device of the model; gone through once a draw.
        specs: the layers, with their dense geometry: see ``called_layers``. All there are if None.
        positions: output positions taken from each map of a convolution and batch; None for all.
        draws: random projections of the outputs for each batch.
        seed: of the positions and projections.
        widest: inputs wider than this are sketched, see ``moment_bytes``; 8192 by default.

    Raises:
        DataError: no batches, activations that are not finite, or a layer that the forward never reaches.

    Warns:
        CalibrationWarning: too few batches for the width of a layer, or outputs without gradients: then every layer
            counts as equally important.

    Example:
        >>> import torch
        >>> known = calibrate(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), [torch.randn(64, 4)])
        >>> known["0"].output.shape
        torch.Size([1, 3, 3])
    """
    specs = measurable(model) if specs is None else specs
    collect = partial(collect_moments, model, batches, specs, positions=positions, seed=seed, widest=widest)
    moments = None
    try:
        with GradientSums(model, specs, seed=seed) as gradients:
            moments = collect(forward=gradients.add)
            for batch in (batch for _ in range(draws - 1) for batch in batches):
                gradients.add(model, batch)
        minded = gradients.mean()
    except DataError as error:
        moments = collect() if moments is None else moments
        warnings.warn(f"{error}. All layers count as equally important.", CalibrationWarning, stacklevel=2)
        return moments
    return {path: own.replace(output=minded[path]) for path, own in moments.items()}


def called_layers(profile: Profile) -> dict[str, LayerSpec]:
    """Return the geometry, by path, of the layers whose inputs can be measured: those that the forward calls."""
    return {layer.path: layer.spec for layer in profile.layers if layer.spec is not None and layer.calls}
