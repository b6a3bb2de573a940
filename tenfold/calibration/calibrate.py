"""Collect input statistics and output-gradient covariances from unlabeled batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tenfold.calibration.collect import Forward, collect_moments, measurable
from tenfold.calibration.gradients import GradientSums
from tenfold.calibration.judge import Judge
from tenfold.decompositions import Moments
from tenfold.decompositions.covariance import shrunk
from tenfold.errors import CalibrationWarning, DataError
from tenfold.records import Calibration, LayerSpec, Profile
from tenfold.tracing.samples import count_samples, parted

# Samples that judge what is fitted to the others. Of more, both parts would profit, and neither can spare them.
HELD_OUT = 0.25
FEWEST = 4  # fewer cannot judge: then all samples both fit and judge, which at least knows how errors add up


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
    backward for the gradients. A quarter of the samples judges what is fitted to the others: ``Moments.held_out``. No
    labels are needed, and the model is unchanged afterwards.

    Args:
        model: any module.
        batches: inputs as ``call_model`` takes them, on the device of the model; iterated over once per draw.
        specs: the layers, with their dense geometry: see ``called_layers``. All layers if None.
        settings: positions and projections that are sampled, and the width from which inputs are sketched; the method
            decides nothing here.
        seed: of the positions and projections.

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
    work = _Work(model, specs, settings, seed)
    fitted, held = parted(model, batches, HELD_OUT)
    found = work.judged(fitted, held) if count_samples(held) >= FEWEST else None
    if found is None:  # too few samples, or a layer is reached by some of them only, or there is no gradient at all
        found = work.judged(batches, batches)
    if found is None:
        found = work.collect(batches)
        msg = f"{work.refusal}. All layers count as equally important."
        warnings.warn(msg, CalibrationWarning, stacklevel=2)
    return found


@dataclass
class _Work:
    """What is measured, and why gradients could not be."""

    model: nn.Module
    specs: Mapping[str, LayerSpec]
    settings: Calibration
    seed: int
    refusal: DataError | None = None

    def collect(self, batches: Sequence[Any], forward: Forward | None = None) -> dict[str, Moments]:
        positions, widest = self.settings.positions, self.settings.max_width
        return collect_moments(
            self.model, batches, self.specs, positions=positions, seed=self.seed, widest=widest, forward=forward
        )

    def judged(self, fitting: Sequence[Any], judging: Sequence[Any]) -> dict[str, Moments] | None:
        """Return moments of all samples, judged by the second part of them; None where that cannot be done."""
        try:
            with GradientSums(self.model, self.specs, seed=self.seed) as sums:
                moments = self._with_grams(fitting, sums)
            with Judge(self.model, self.specs, moments, seed=self.seed + 1) as judge, warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)  # of few rows, said already
                others = self._with_grams(judging, judge)
        except DataError as error:
            self.refusal = error
            return None
        curves = judge.curves()
        if judging is not fitting:
            moments = {path: own.pooled(others[path]) for path, own in moments.items()}
        return {path: own.replace(held_out=curves.get(path)) for path, own in moments.items()}

    def _with_grams(self, batches: Sequence[Any], sums: GradientSums) -> dict[str, Moments]:
        moments = self.collect(batches, sums.add)
        for batch in (batch for _ in range(self.settings.draws - 1) for batch in batches):
            sums.add(self.model, batch)
        grams = sums.mean()
        return {path: own.replace(output_gram=shrunk(grams[path], sums.samples)) for path, own in moments.items()}


def called_layers(profile: Profile) -> dict[str, LayerSpec]:
    """Return the geometry, by path, of the layers that the forward calls, whose inputs can therefore be measured."""
    return {layer.path: layer.spec for layer in profile.layers if layer.spec is not None and layer.calls}
