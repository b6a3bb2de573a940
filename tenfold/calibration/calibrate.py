"""Collect input statistics and output-gradient covariances from unlabeled batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tenfold.calibration.gradients import collect_gradients
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
    """Collect the input moments and output-gradient covariances of layers, by path, for data-aware plans and fits.

    Layers are linear layers, convolutions and embeddings. Two passes over the batches: one forward for the moments, one
    forward and backward for the gradients. No labels are needed, and the model is unchanged afterwards.

    Args:
        model: any module.
        batches: inputs as ``call_model`` takes them, on the device of the model; iterated over twice.
        specs: the layers, with their dense geometry: see ``called_layers``. All layers if None.
        positions: output positions sampled from each map of a convolution and batch; None for all.
        draws: random projections of the outputs for each batch.
        seed: of the positions and projections.
        widest: inputs wider than this are sketched, see ``moment_bytes``; 8192 by default.

    Raises:
        DataError: no batches, activations that are not finite, or a layer that the forward never reaches.

    Warns:
        CalibrationWarning: too few batches for the width of a layer, or outputs without gradients; all layers then
            count as equally important.

    Example:
        >>> import torch
        >>> known = calibrate(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), [torch.randn(64, 4)])
        >>> known["0"].output.shape
        torch.Size([1, 3, 3])
    """
    specs = measurable(model) if specs is None else specs
    moments = collect_moments(model, batches, specs, positions=positions, seed=seed, widest=widest)
    try:
        grams = collect_gradients(model, batches, specs, draws=draws, seed=seed)
    except DataError as error:
        warnings.warn(f"{error}. All layers count as equally important.", CalibrationWarning, stacklevel=2)
        return moments
    return {path: own.replace(output=grams[path]) for path, own in moments.items()}


def called_layers(profile: Profile) -> dict[str, LayerSpec]:
    """Return the geometry, by path, of the layers that the forward calls, whose inputs can therefore be measured."""
    return {layer.path: layer.spec for layer in profile.layers if layer.spec is not None and layer.calls}
