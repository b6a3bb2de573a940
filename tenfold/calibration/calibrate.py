"""Collect input statistics and output-gradient covariances from unlabeled batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn

from tenfold.calibration.collect import Forward, collect_moments, measurable
from tenfold.calibration.gradients import GradientSums
from tenfold.calibration.judge import Judge
from tenfold.calibration.last_layer import LastLayer, UnlikeOutputsError
from tenfold.calibration.needs import Needs
from tenfold.calibration.shares import over_all, together_of
from tenfold.calibration.unused import unused_layers
from tenfold.decompositions import Moments, Sketch
from tenfold.decompositions.covariance import Covariance, shrunk
from tenfold.decompositions.held_out import HeldOutCurve
from tenfold.errors import CalibrationWarning, DataError, warn
from tenfold.formats import split_groups
from tenfold.layers import dense_weight
from tenfold.progress import counter
from tenfold.records import Calibration, LayerSpec, Profile
from tenfold.tensors import normal_tensors
from tenfold.tensors.free_memory import give_back
from tenfold.tracing.contexts import device_of, same_random_numbers
from tenfold.tracing.input_batches import input_batches
from tenfold.tracing.inputs import call_model
from tenfold.tracing.references import trainable_copy
from tenfold.tracing.samples import count_samples, parted

# Adds one batch to sums of gradients: called with these, the model, the batch, its number and the number of the draw.
Feed = Callable[[GradientSums, nn.Module, Any, int, int], None]

# Samples that judge what is fitted to the others. Of more, both parts would profit, and neither can spare them.
HELD_OUT = 0.25
JUDGED = 64  # draws of labels at least, over the samples that judge: each says one number of each layer
FEWEST = 4  # fewer cannot judge: then all samples both fit and judge, which at least knows how errors add up


@normal_tensors()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    specs: Mapping[str, LayerSpec] | None = None,
    settings: Calibration | None = None,
    *,
    seed: int = 0,
    before: Callable[[Needs], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Moments]:
    """Collect the input moments and output-gradient covariances of layers, by path, for data-aware plans and fits.

    Use it to let data decide step by step: ``tabulate`` and ``apply`` take what it returns as ``moments``.

    Layers are linear layers, convolutions and embeddings; those that no batch reaches, such as experts without tokens,
    are left out. One pass over the batches, forward for the moments and backward for the gradients. A quarter of the
    samples judges what is fitted to the others: ``Moments.held_out``. No labels are needed, and the model is unchanged
    afterwards.

    Args:
        model: any module.
        batches: inputs as ``call_model`` takes them, on the device of the model; iterated over once per draw.
        specs: the layers, with their dense geometry: see ``called_layers``. All layers if None.
        settings: positions and projections that are sampled, and the width from which inputs are sketched; the method
            decides nothing here.
        seed: of the positions, the projections and what the forward draws.
        before: called with the memory that it will take, before it is taken.
        progress: called with (batches done, batches in all); they are logged if None.

    Raises:
        DataError: no batches, or activations that are not finite.

    Warns:
        CalibrationWarning: too few batches for the width of a layer; outputs without gradients, where all layers count
            as equally important; layers that no gradient reaches, which count as much as the most important other, or
            are not used and stay as they are.

    Example:
        >>> import torch
        >>> known = calibrate(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), [torch.randn(64, 4)])
        >>> known["0"].output_gram.shape
        torch.Size([1, 3, 3])
    """
    settings, model = settings or Calibration(), trainable_copy(model)
    batches = list(input_batches(batches, model))
    specs = measurable(model) if specs is None else specs
    if not specs:
        return {}
    with same_random_numbers(device_of(model)):
        told = progress or counter("look at data")
        work = _Work(model, specs, settings, seed, count_samples(batches), before, told)
        fitted, held = parted(model, batches, HELD_OUT)
        found = work.judged(fitted, held) if count_samples(held) >= FEWEST else None
        if found is None:  # too few samples, or a layer is reached by some of them only, or there is no gradient at all
            found = work.judged(batches, batches)
        if found is None:
            found = work.collect(batches)
            msg = f"{work.refusal}. All layers count as equally important."
            warn(msg, CalibrationWarning)
            return found
    return found | _unreached(model, specs, found, batches)


def _unreached(
    model: nn.Module, specs: Mapping[str, LayerSpec], found: Mapping[str, Moments], batches: Sequence[Any]
) -> dict[str, Moments]:
    """Return the moments of layers that no gradient reaches: judged by nothing, or as important as any other.

    Where the outputs do not depend on what a layer puts out, data cannot judge it, and it stays as it is. Else, what it
    costs the network where all of its output is lost is taken to be the most that it is anywhere: so such layers are
    changed last.
    """
    unreached = [path for path, own in found.items() if own.output_gram is None]
    if not unreached:
        return {}
    unused = unused_layers(model, unreached, batches)
    blind = [path for path in unreached if path not in unused]
    if unused:
        msg = (
            f"{_some([p for p in unreached if p in unused], len(found))} run and are not used: no output depends on "
            "them. They stay as they are; where they are dead weight, leave them out of the model."
        )
        warn(msg, CalibrationWarning)
    if blind:
        msg = (
            f"no gradient of the outputs reaches {_some(blind, len(found))}: they run under no_grad or are detached. "
            "Each counts as much as the most important of the others."
        )
        warn(msg, CalibrationWarning)
    most = max(float(_power(model, path, specs[path], own)) for path, own in found.items() if path not in unreached)
    changed = {}
    for path in unreached:
        spec, own = specs[path], found[path]
        each = 0.0 if path in unused else most / (_power(model, path, spec, own) or 1.0)
        level = own.mean.new_full((spec.groups, spec.out_channels // spec.groups), each)
        held_out = HeldOutCurve.of([], [], 0) if path in unused else own.held_out
        changed[path] = own.replace(output_gram=Sketch.diagonal_of(level), held_out=held_out)
    return changed


def _some(paths: Sequence[str], total: int) -> str:
    return f"{len(paths)} of {total} layers ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"


def _power(model: nn.Module, path: str, spec: LayerSpec, moments: Moments) -> float:
    """Return what it costs to lose all that a layer puts out but its mean."""
    with torch.no_grad():
        weight = split_groups(dense_weight(model.get_submodule(path)).detach(), spec).double().flatten(2)
    return moments.distortion(weight, torch.zeros_like(weight))


def calibrate_part(
    part: nn.Module,
    specs: Mapping[str, LayerSpec],
    fitting: Sequence[Any],
    judging: Sequence[Any],
    feed: Feed,
    settings: Calibration | None = None,
    *,
    seed: int = 0,
    ends: bool = False,
) -> dict[str, Moments]:
    """Collect the moments of a part of a network, whose gradients the parts behind it send back.

    Use it where a network does not fit into memory: what ``calibrate`` finds in one pass over the whole, this finds
    part by part, the last one first.

    Args:
        part: a block of the network, or what comes before or after its blocks.
        specs: the layers of the part, with their dense geometry.
        fitting: inputs of the part, of samples that are fitted to; a ``Share`` where other processes have the others.
        judging: of samples that judge what is fitted to the others; the same object where all samples do both.
        feed: adds one batch to the sums, by the gradient at the output of the part.
        settings: see ``calibrate``.
        seed: that of the whole.
        ends: whether the part is the end of the network, whose outputs are its own.

    Raises:
        DataError: no gradient reaches the layers.
    """
    work = _Work(part, specs, settings or Calibration(), seed, feed=feed)
    found = work.judged(fitting, judging, whole=not ends)
    if found is None:
        raise work.refusal or DataError
    return found


def judged_apart(batches: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Return the numbers of those of many batches that are fitted to, and of those that judge.

    The same as ``calibrate`` does to batches of which there are enough for whole ones to judge.

    Raises:
        DataError: there are too few.

    Example:
        >>> judged_apart([torch.zeros(2, 4)] * 8)
        ([0, 1, 3, 4, 5, 7], [2, 6])
    """
    numbers = list(range(len(batches)))
    fitted, held = parted(nn.Identity(), numbers, HELD_OUT) if HELD_OUT * len(numbers) >= 2 else (numbers, [])
    if count_samples([batches[i] for i in held]) < FEWEST:
        msg = f"there are {len(batches)} calibration batches, of which a quarter is to judge: pass 16 or more"
        raise DataError(msg)
    return fitted, held


def judging_draws(settings: Calibration, samples: int) -> int:
    """Return how often labels are drawn for so many samples that judge.

    A sequence of tokens is one sample: of eight sequences, drawn once, how much a layer matters is known to a half.
    """
    enough = -(-JUDGED // max(1, samples)) if settings.loss == "fisher" else 1
    return max(settings.draws, enough)


@dataclass
class _Work:
    """What is measured, and why gradients could not be."""

    model: nn.Module
    specs: Mapping[str, LayerSpec]
    settings: Calibration
    seed: int
    samples: int = 0  # that a forward runs on, for who asks ``before``
    before: Callable[[Needs], None] | None = None
    progress: Callable[[int, int], None] | None = None
    refusal: DataError | None = None
    done: int = 0  # batches that gradients were taken of
    feed: Feed | None = None  # None: each batch runs through to the outputs of the model

    def collect(self, batches: Sequence[Any], forward: Forward | None = None) -> dict[str, Moments]:
        positions, widest = self.settings.positions, self.settings.max_width
        return collect_moments(
            self.model, batches, self.specs, positions=positions, seed=self.seed, widest=widest, forward=forward
        )

    def judged(
        self, fitting: Sequence[Any], judging: Sequence[Any], *, whole: bool = False
    ) -> dict[str, Moments] | None:
        """Return moments of all samples, judged by the second part of them; None where that cannot be done."""
        widest = self.settings.max_width
        loss = self.settings.loss
        last = None if whole else LastLayer.of(self.model, fitting[0], call_model)
        if last is not None and loss == "fisher" and (last.place > 0 or last.path in self.specs):
            last = None  # what is known of predictions is known behind it
        draws = judging_draws(self.settings, over_all(judging, count_samples(judging)))
        self.done, total = 0, len(fitting) * self.settings.draws + len(judging) * draws
        try:
            with GradientSums(self.model, self.specs, loss=loss, seed=self.seed, widest=widest, last=last) as sums:
                if self.feed is None:
                    sums.split_like(fitting[0])
                sums.clip = self.settings.clip
                self._say(sums)
                moments = self._with_grams(fitting, sums, total, self.settings.draws)
            give_back()
            judge = Judge(self.model, self.specs, moments, loss=loss, seed=self.seed + 1, widest=widest, last=last)
            judge.split, judge.clip = sums.split, sums.clip
            with judge, warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)  # of few rows, said already
                others = self._with_grams(judging, judge, total, draws)
        except UnlikeOutputsError:
            return self.judged(fitting, judging, whole=True)
        except DataError as error:
            self.refusal = error
            return None
        curves = judge.curves()
        del judge  # with its fits, before there are statistics of all samples too
        give_back()
        if judging is not fitting:
            moments = _of_both(moments, others)
        give_back()
        return {path: own.replace(held_out=curves.get(path)) for path, own in moments.items()}

    def _say(self, sums: GradientSums) -> None:
        if self.before is not None:
            alive = sums.split.alive * self.samples
            needs = Needs.of(self.specs, self.settings.max_width, sums.split.held, alive)
            self.before(needs)
            self.before = None

    def _with_grams(self, batches: Sequence[Any], sums: GradientSums, total: int, draws: int) -> dict[str, Moments]:
        numbers = count()

        def add(model: nn.Module, batch: Any, draw: int = 0) -> None:
            if self.feed is None:
                sums.add(model, batch)
            else:
                self.feed(sums, model, batch, next(numbers) % len(batches), draw)
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, total)

        moments = self.collect(batches, add)
        for draw in range(1, draws):
            for batch in batches:
                add(self.model, batch, draw)
        together = together_of(batches)
        if together is not None:
            sums.gather(together)
        means = sums.mean()
        grams = {path: shrunk(means.pop(path), sums.samples) for path in list(means)}
        return {path: own.replace(output_gram=grams.get(path)) for path, own in moments.items()}


def _of_both(moments: dict[str, Moments], others: dict[str, Moments]) -> dict[str, Moments]:
    """Return the moments of all samples, and use up those of both parts; what layers share stays shared."""
    found = others | moments
    moments.clear()
    both = [path for path in found if path in others and found[path] is not others[path]]
    shared = {path: (id(found[path].input_second_moment), id(others[path].input_second_moment)) for path in both}
    known: dict[tuple[int, int], Covariance] = {}
    for path in both:
        found[path] = found[path].pooled(others.pop(path), known.get(shared[path]))
        known[shared[path]] = found[path].input_second_moment
    return found


def called_layers(profile: Profile) -> dict[str, LayerSpec]:
    """Return the geometry, by path, of the layers whose inputs can be measured: those that a forward calls.

    What was never called here may be called elsewhere, an expert by other tokens, unless its parent reads its weight.
    """
    known = ((layer, layer.spec) for layer in profile.layers if layer.calls or not layer.read)
    return {layer.path: spec for layer, spec in known if spec is not None}
