"""compress(): the verbs in a row. Decide, apply, re-estimate, tune, measure.

Ranks are chosen in ``tenfold.planning.decide``, by the rule of the recipe; the default is
``tenfold/allocation/rules/global_budget.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from tenfold import checkpoint
from tenfold.allocation import explorable, limits_latency, pruned
from tenfold.checkpoint.hub_facts import HubFacts
from tenfold.errors import AgreementWarning, DataError, warn
from tenfold.planning import Decision, Score, analyse, decide
from tenfold.planning.decide import fused_copy, refuse_empty
from tenfold.planning.outcome import warn_if_late, warn_if_low, warn_if_slower, warn_without_data
from tenfold.profiling import Comparison, agreement, compare_latency, environment, profile
from tenfold.records import (
    Agreement,
    Analysis,
    Latency,
    Measurement,
    Metric,
    OptionTable,
    Plan,
    Profile,
    Recipe,
    RunRecord,
)
from tenfold.records.metric import FRACTION
from tenfold.reporting import render_outcome
from tenfold.runtime import Runtime
from tenfold.surgery import (
    FIT_LAYERS,
    Refinement,
    SequentialFit,
    apply,
    apply_sequentially,
    fuse_batchnorm_,
    fused_pairs,
    reestimate_batchnorm_,
    refine_blocks_,
    separate,
    verify,
    warn_of_costs,
    with_errors,
)
from tenfold.tensors import normal_tensors
from tenfold.tracing import device_of
from tenfold.tracing.contexts import same_random_numbers
from tenfold.tracing.samples import count_samples
from tenfold.training import TuneResult


@dataclass(frozen=True, eq=False, repr=False)
class Compressed:
    """What ``compress`` returns: the smaller model, the plan behind it, and the record of both.

    Use ``model`` like any other module: train it on, export it, quantize it. ``print`` shows before and after,
    ``summary`` every layer with its reasons, a notebook a picture. ``save`` writes a folder for ``tenfold.load``.

    ``original`` is the model that was given, untouched. ``analyse`` finds the spectra
    and errors that a report shows; only ``save`` asks for them. ``table`` is what the plan was chosen from.
    """

    model: nn.Module
    plan: Plan
    record: RunRecord
    original: nn.Module
    analyse: Callable[[], Analysis] | None = None
    table: OptionTable | None = None

    def __repr__(self) -> str:
        return repr(self.record).replace(RunRecord.__name__, type(self).__name__, 1)

    def __str__(self) -> str:
        return render_outcome(self.record)

    def _repr_html_(self) -> str:
        return self.record._repr_html_()

    def summary(self) -> str:
        """Return the before/after table and the plan with its reasons, as text."""
        return self.record.summary()

    def save(self, path: str | Path, *, beside: Callable[[Path], HubFacts | None] | None = None) -> Path:
        """Write model, plan, record and model card to the folder ``path``, whole or not at all; return it.

        ``analysis.json`` has what a report shows of spectra and errors, ``options.json`` what the explorer needs.
        ``beside`` is called with a folder and may write more files into it; see ``tenfold.save``.
        """
        analysis = None if self.analyse is None else self.analyse()
        table = None if self.table is None or not explorable(self.table) else pruned(self.table)
        return checkpoint.save(
            self.model, self.plan, path, record=self.record, analysis=analysis, table=table, beside=beside
        )


def compress(
    model: nn.Module,
    example_inputs: Any,
    recipe: Recipe | Plan | Mapping[str, Any] | str,
    *,
    data: Iterable[Any] | None = None,
    tune: Callable[[nn.Module], Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    runtime: Runtime | None = None,
) -> Compressed:
    """Return a smaller version of a trained model that meets a budget, with the plan and the record of what came of it.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> small = compress(net, torch.zeros(1, 64), "macs=0.5", runtime=Runtime(measure=False))
        >>> small.record.before.macs, small.record.after.macs
        (8192, 4096)

    Use it first: it is the other verbs in a row. Use these one by one where you want to step in between.

    GRUs and LSTMs are unrolled into linear layers, and parameters that stack the matrices of experts become a layer for
    each. These are planned like any others, and such a module is left whole where nothing of it is factorized and where
    ``keep`` names it. Under a latency budget experts are left whole, and recurrent matrices dense.

    Args:
        model: any trained module; stays as it is.
        example_inputs: what its forward takes: a tensor, tuple, dict or ``(args, kwargs)``. Costs and latency are those
            of one forward on them.
        recipe: what is wanted: a ``Recipe``, a mapping of its fields, or only a budget such as ``"macs=0.5"``. A
            ``Plan`` is carried out as it is.
        data: batches of inputs, such as a DataLoader, a data set, or one tensor of all samples; a few thousand samples
            are plenty. Labels in them are not used: what the forward does not take is left out, and said. They decide
            ranks and factors, and batch norms, as ``recipe.calibration`` says. Without, weights alone decide, and batch
            norms keep their statistics.
        tune: called with the compressed model, to train it in place by any loop; the history of a ``TuneResult`` that
            it returns goes into the record.
        evaluate: returns the score of a model: a fraction, the larger the better; a ``tenfold.Score`` for any other,
            which says its name, unit and direction. Called on the original, before the work begins, and after each
            step of recovery.
        runtime: how it is done: workers, clock, what to measure on, progress. The result does not depend on it.

    Raises:
        RecipeError: a field or value of the recipe that does not exist.
        BudgetError: the budget cannot be met.
        DataError: no calibration batches.
        TenfoldError: see ``profile``, ``plan`` and ``apply``; the model is untouched in every case.
    """
    wanted = recipe if isinstance(recipe, Plan) else Recipe.of(recipe)
    decision = decide(model, example_inputs, wanted, data=data, evaluate=evaluate, runtime=runtime)
    return carry_out(model, decision, tune=tune, evaluate=evaluate, runtime=runtime)


@normal_tensors()
def carry_out(
    model: nn.Module,
    decision: Decision,
    *,
    tune: Callable[[nn.Module], Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    runtime: Runtime | None = None,
) -> Compressed:
    """Return the model with a decision carried out, recovered and measured: the second half of ``compress``.

    Args:
        model: the model that ``decide`` was given; stays as it is.
        decision: what to do.
        tune: trains the compressed model in place; see ``compress``.
        evaluate: returns the score of a model; see ``compress``.
        runtime: how it is done.

    Raises:
        PlanError: the plan factorizes nothing.
        TenfoldError: see ``apply``.
    """
    runtime, seconds = runtime or Runtime(), decision.seconds
    refuse_empty(decision.plan, decision.profile)
    recovery = _Recovery(runtime, seconds, None if evaluate is None else Score.of(evaluate))
    recovery.score_original(model, decision.score)
    # Batch norms are fused at the end: what is fused cannot be tuned.
    fuse, plan = decision.recipe.fuse_batchnorm or bool(decision.plan.fused), decision.plan.replace(fused={})
    with runtime.step("apply", seconds):
        small, plan = apply_decision(decision, plan, runtime, folder=runtime.folder)
    stale = bool(decision.batches) and decision.moments is None  # layers fitted to data leave the statistics right
    tuning = recovery.run(small, tune, decision.batches if stale else [])
    if fuse:
        with runtime.step("fuse batch norm", seconds):
            fuse_batchnorm_(small.eval(), decision.inputs)
            plan = plan.replace(fused=fused_pairs(small))
    after = profile(small, decision.inputs)
    if tune is None:  # which may prune
        warn_of_costs(plan, decision.profile, after)
    agreed = _agreement(model, small, decision, runtime, tuned=tune is not None)
    times = Comparison({}, {})
    if runtime.measure:
        with runtime.step("measure", seconds):
            times = _compare(fused_copy(model, decision.latency_inputs) if fuse else model, small, decision)
            if decision.timed is not None and limits_latency(decision.recipe):
                warn_if_late(decision.timed, times)
            warn_if_slower(times, decision.recipe)
    scores = recovery.scores
    record = RunRecord(
        before=measurement(decision.profile, times.latencies.get("before"), scores.get("original")),
        after=measurement(after, times.latencies.get("after"), scores.get("tuned", scores.get("compressed"))),
        speedup=times.speedups.get("after"),
        scores=scores,
        metric=recovery.metric,
        agreement=agreed,
        plan=plan,
        tuning=tuning,
        seconds=seconds,
        environment=environment(device_of(model, decision.inputs)),
    )
    late = partial(analyse, decision.source, decision.profile, plan)
    return Compressed(small, plan, record, model, late, decision.table)


def apply_decision(
    decision: Decision,
    plan: Plan,
    runtime: Runtime,
    *,
    target: nn.Module | None = None,
    folder: str | Path | None = None,
) -> tuple[nn.Module, Plan]:
    """Return a model in which a plan is carried out as the data are to be used, and the plan with its errors.

    Args:
        decision: the model, its data and what they say.
        plan: what to do with its layers.
        runtime: who decomposes layers that do not wait for others.
        target: whose outputs sequential fits are to meet; those of the model itself if None.
        folder: where refined blocks are kept until the model is.
    """
    moments, source = decision.moments, decision.source
    verify(source, plan, decision.inputs)
    if moments is not None and decision.recipe.calibration.method == "sequential":
        grams = {path: own.output_gram for path, own in moments.items() if own.output_gram is not None}
        calibration = decision.recipe.calibration
        config = SequentialFit(
            positions=calibration.positions,
            seed=decision.recipe.seed,
            max_width=calibration.max_width,
            max_cache=runtime.cache_bytes(),
        )
        with same_random_numbers(device_of(source, decision.inputs)):
            small = apply_sequentially(
                source,
                plan,
                decision.batches,
                target=target,
                output_grams=grams,
                config=config,
                progress=runtime.counter(FIT_LAYERS),
            )
    else:
        count = runtime.counter(FIT_LAYERS)
        small = apply(source, plan, moments=moments, progress=count, workers=runtime.workers)
    if decision.recipe.calibration.refine and decision.batches:
        original = source if target is None else separate(target, plan.unrolled)
        _refine(small, original, decision, runtime, folder)
    return small, with_errors(plan, small)


def _refine(
    small: nn.Module, original: nn.Module, decision: Decision, runtime: Runtime, folder: str | Path | None
) -> None:
    """Refine the blocks of a compressed model, and log what came of it."""
    steps, room = decision.recipe.calibration.refine, runtime.cache_bytes()
    config = Refinement(steps=steps, seed=decision.recipe.seed, max_cache=room)
    counted = runtime.counter("refine blocks")
    blocks = refine_blocks_(small, original, decision.batches, config, folder=folder, progress=counted)
    if blocks:
        better = [block for block in blocks if block.kept]
        errors = (sum(b.before for b in blocks) / len(blocks), sum(b.after for b in blocks) / len(blocks))
        note = f"{len(better)} of {len(blocks)} blocks refined: mean error of their outputs on samples held out of it "
        runtime.report("refine blocks", note=f"{note}{errors[0]:.4f} before, {errors[1]:.4f} after")


def _agreement(
    model: nn.Module, small: nn.Module, decision: Decision, runtime: Runtime, *, tuned: bool
) -> Agreement | None:
    """Return how far the result agrees with the original where nothing was fitted; warn if little, or without data."""
    if not decision.batches:
        if not tuned:
            warn_without_data(model)
        return None
    with runtime.step("compare", decision.seconds):
        held_out = bool(decision.held_out)
        try:
            agreed = agreement(model, small, decision.held_out or decision.batches, held_out=held_out)
        except DataError as error:
            warn(f"{error}.", AgreementWarning)
            return None
    warn_if_low(agreed, count_samples(decision.batches), tuned=tuned)
    return agreed


@dataclass
class _Recovery:
    """Re-estimation and tuning of the compressed model, scored on the way."""

    runtime: Runtime
    seconds: dict[str, float]
    evaluate: Score | None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        """What the scores are."""
        return FRACTION if self.evaluate is None else self.evaluate.metric

    def score_original(self, model: nn.Module, known: float | None) -> None:
        """Score the model as it is, where its score is not ``known``."""
        if known is not None:
            self.scores["original"] = known
        elif self.evaluate is not None:
            with self.runtime.step("evaluate", self.seconds):
                self.scores["original"] = self.evaluate.of_original(model)

    def run(
        self, small: nn.Module, tune: Callable[[nn.Module], Any] | None, batches: list[Any]
    ) -> tuple[dict[str, Any], ...]:
        """Recover ``small`` in place; return the epochs of tuning."""
        if batches:
            with self.runtime.step("re-estimate batch norm", self.seconds):
                reestimate_batchnorm_(small, batches)
        self._score("compressed", small)
        if tune is None:
            return ()
        with self.runtime.step("tune", self.seconds):
            result = tune(small)
        self._score("tuned", small)
        return tuple(epoch.model_dump() for epoch in result.history) if isinstance(result, TuneResult) else ()

    def _score(self, name: str, model: nn.Module) -> None:
        if self.evaluate is not None:
            with self.runtime.step("evaluate", self.seconds):
                self.scores[name] = self.evaluate(model)


def _compare(model: nn.Module, small: nn.Module, decision: Decision) -> Comparison:
    """Return original and result measured in turns, in the runtime that they are for, as the plan would have them."""
    models, inputs, fast = {"before": model, "after": small}, decision.latency_inputs, decision.timed
    target = decision.target
    if target is None:
        return compare_latency({name: (one, inputs) for name, one in models.items()})
    formats = dict.fromkeys(models, target.runtime.memory_formats(inputs)[0])
    if fast is not None:
        formats = {"before": fast.before.memory_format, "after": fast.after.memory_format}
    variants = {name: target.ready(one, inputs, formats[name]) for name, one in models.items()}
    return compare_latency(variants, threads=target.at.threads)


def measurement(cost: Profile, latency: Latency | None = None, score: float | None = None) -> Measurement:
    """Return what was measured of a model, for its record."""
    return Measurement(
        params=cost.params,
        macs=cost.macs,
        bytes=cost.bytes,
        latency_ms=None if latency is None else latency.median_ms,
        latency=latency,
        score=score,
    )
