"""The front half of every compression: profile, calibrate, tabulate and choose; or cost again a plan that is given.

``tabulate`` measures what each layer could become; ``choose`` lets a rule of ``tenfold/allocation/rules`` select ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tenfold.allocation import choose, limits_latency
from tenfold.allocation.reasons import grouped_reasons, in_words
from tenfold.calibration import Needs, calibrate
from tenfold.decompositions import Moments
from tenfold.errors import DataError, PlanError, warn
from tenfold.planning.divergence import by_divergence
from tenfold.planning.eligible import changeable, check_formats, check_layers
from tenfold.planning.equal_heads import with_one_head_size
from tenfold.planning.latency_budget import FastPlan, plan_within_latency
from tenfold.planning.plan import recost
from tenfold.planning.rule_columns import Scores
from tenfold.planning.score import Score
from tenfold.planning.tabulate import tabulate
from tenfold.planning.target import Target
from tenfold.planning.unit_kinds import kinds_of, wants_projections, wants_units
from tenfold.planning.unroll import refuse_unused, unroll_for_plan
from tenfold.profiling import profile
from tenfold.records import OptionTable, Plan, Profile, Recipe
from tenfold.runtime import Runtime
from tenfold.surgery import fuse_batchnorm_, fused_pairs, recognise_units, separate, separated
from tenfold.tensors import normal_tensors
from tenfold.tensors.finite import check_finite
from tenfold.tracing import copied, device_of, gathered
from tenfold.tracing.input_batches import GatheredBatches
from tenfold.tracing.references import trainable_copy
from tenfold.tracing.samples import count_samples, parted


@dataclass(frozen=True, eq=False)
class Decision:
    """A plan, and all that it was made from and is to be carried out with.

    Attributes:
        recipe: what is wanted.
        plan: what is to happen to every layer.
        source: the model to carry it out on: that which was given, its recurrent networks unrolled and its
            experts unstacked where the plan factorizes their matrices.
        profile: of the source.
        inputs: example inputs.
        latency_inputs: what latencies are measured on.
        batches: calibration data to plan with and fit to, on the device of the model; none without.
        moments: what they say of the layers; None to go by the weights alone.
        table: what the plan was chosen from; None where the plan was given.
        timed: measurements behind the plan, where there is a latency budget.
        target: the runtime that the model is to run in, where it had a say.
        seconds: time taken, by step.
        held_out: calibration data that are left alone, on which the result is compared with the original.
        judged: those of the batches that the moments do not know, where divergences are measured on them; else none.
        score: of the model as it was given; None if it was not asked for.
    """

    recipe: Recipe
    plan: Plan
    source: nn.Module
    profile: Profile
    inputs: Any
    latency_inputs: Any
    batches: list[Any] = field(default_factory=list, repr=False)
    moments: Mapping[str, Moments] | None = field(default=None, repr=False)
    table: OptionTable | None = field(default=None, repr=False)
    timed: FastPlan | None = field(default=None, repr=False)
    target: Target | None = field(default=None, repr=False)
    seconds: dict[str, float] = field(default_factory=dict, repr=False)
    held_out: list[Any] = field(default_factory=list, repr=False)
    judged: list[Any] = field(default_factory=list, repr=False)
    score: float | None = None


@normal_tensors()
def decide(
    model: nn.Module,
    example_inputs: Any,
    recipe: Recipe | Plan,
    *,
    data: Iterable[Any] | None = None,
    scores: Callable[[nn.Module, Profile], Scores] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    runtime: Runtime | None = None,
) -> Decision:
    """Return what is to be done to a model, decided but not carried out.

    Use it to look at a plan, or to change it, before ``tenfold.pipeline.carry_out``; ``compress`` is both in a row.

    Args:
        model: any trained module; stays as it is.
        example_inputs: what its forward takes.
        recipe: what is wanted; or a plan, which is costed again and not made.
        data: unlabeled batches, as the forward takes them; what they are used for is in the recipe.
        scores: called with the model to plan for and its profile, returns what measures it with one layer replaced, for
            rules that weigh scores.
        evaluate: what ``carry_out`` is to score by, see ``compress``; called here, before the work begins, on the model
            that was given, so that nothing is lost by a score without sense. That score is not asked for again.
        runtime: workers, clock and progress.

    Raises:
        DataError: no calibration batches, or a score of the model that is none.
        WeightError: a parameter or buffer has NaN or infinity.
        TenfoldError: see ``profile`` and ``plan``; the model is untouched in every case.
    """
    runtime, seconds = runtime or Runtime(), dict[str, float]()
    given = recipe if isinstance(recipe, Plan) else None
    wanted = recipe.recipe if isinstance(recipe, Plan) else recipe
    _check_recipe(wanted, planned=given is None, data=data is not None)
    check_finite(model)
    original, model = model, trainable_copy(model)
    if given is None:
        heads = data is not None and wants_projections(wanted)
        source = unroll_for_plan(model, wanted, example_inputs, heads=heads)
    else:
        source = separate(model, given.unrolled)
    inputs = example_inputs if runtime.latency_inputs is None else runtime.latency_inputs
    with runtime.step("profile", seconds):
        cost = profile(source, example_inputs)
    if given is None:
        check_layers(cost, wanted)  # before what takes long
    score = None if evaluate is None else _scored(original, evaluate, runtime, seconds)
    target = Target.of(wanted, source, inputs, runtime) if wanted.timed else None
    known: dict[str, Any] = {"target": target, "seconds": seconds, "score": score}
    decision = Decision(wanted, _nothing(cost), source, cost, example_inputs, inputs, **known)
    if given is None and data is not None and wants_units(wanted):
        with runtime.step("find units", seconds):
            cost = cost.replace(units=recognise_units(source, cost, example_inputs, kinds_of(wanted)))
            decision = replace(decision, profile=cost)
    if data is not None and wanted.calibration.method != "none":
        with runtime.step("calibrate", seconds):
            decision = _calibrated(decision, data, given or wanted, runtime)
    moments = decision.moments
    with runtime.step("plan", seconds):
        if given is not None:
            decision = replace(decision, plan=with_one_head_size(recost(given, cost), cost))
        else:
            made = None if scores is None else scores(source, cost)
            table = tabulate(source, cost, wanted, moments=moments, scores=made, target=target, runtime=runtime)
            if decision.judged and moments is not None and made is None:
                table = by_divergence(table, source, decision.judged, moments=moments, runtime=runtime)
            decision = _chosen(replace(decision, table=table))
            decision = replace(decision, plan=with_one_head_size(decision.plan, cost))
        plan = refuse_unused(decision.plan, model)
        if plan.unrolled != separated(source):
            source = separate(model, plan.unrolled)
            cost = profile(source, example_inputs)
    return replace(decision, plan=plan, source=source, profile=cost)


def _check_recipe(wanted: Recipe, *, planned: bool, data: bool) -> None:
    """Say before any work what is wrong with a recipe; and what of it needs data, where there are none."""
    kinds_of(wanted)  # names that do not exist
    if planned:
        check_formats(wanted)
    if not data and (wanted.calibration.refine or (wanted.calibration.measures and planned)):
        name = "refine" if wanted.calibration.refine else "metric: divergence"
        msg = f"the recipe's calibration has {name}, which needs data: pass data="
        raise DataError(msg)
    if not data and wanted.units and planned:
        warn(f"units ({', '.join(wanted.units)}) are chosen by what the data say: without data= none is narrowed")


def _scored(
    model: nn.Module, evaluate: Callable[[nn.Module], float], runtime: Runtime, seconds: dict[str, float]
) -> float:
    """Return the score of a model as it is."""
    with runtime.step("evaluate", seconds):
        return Score.of(evaluate).of_original(model)


def refuse_empty(plan: Plan, profile: Profile) -> None:
    """Raise PlanError for a plan of the profiled model that factorizes nothing; the message says why, by reason."""
    if plan.factorized:
        return
    kept = [(layer.reason, float(layer.before.params)) for layer in plan.layers if layer.reason]
    if not kept:  # of what has neither parameters nor MACs a plan says nothing
        kept = [(layer.note, 0.0) for layer in profile.layers if layer.note]
    shown = in_words(grouped_reasons(kept), plan.before.params) or "the model has no layers"
    shown += (
        " (shares of the parameters)"
        if profile.params
        else ". It has no parameters: packed weights, as of a quantized model, cannot be factorized; compress it first"
    )
    msg = f"nothing is to be done: no layer would be factorized. Reasons: {shown}"
    raise PlanError(msg)


def fused_copy(model: nn.Module, inputs: Any) -> nn.Module:
    """Return a copy in evaluation mode with its batch norms fused."""
    twin = copied(model).eval()
    fuse_batchnorm_(twin, inputs)
    return twin


def _calibrated(decision: Decision, data: Iterable[Any], wanted: Recipe | Plan, runtime: Runtime) -> Decision:
    """Return the decision with batches, and what they say of the layers that may change, where they are to decide."""
    recipe, source = decision.recipe, decision.source
    every = gathered(data, source, decision.inputs, device_of(source, decision.inputs))
    batches, held_out = parted(source, every, recipe.calibration.held_out_of(count_samples(every)))
    decision = replace(decision, batches=GatheredBatches(batches), held_out=held_out)
    if not recipe.calibration.plans:
        return decision
    rest, judged = parted(source, batches, recipe.calibration.judged_of(count_samples(batches)))
    specs = changeable(source, decision.profile, wanted)
    cache = runtime.cache_bytes() if recipe.calibration.method == "sequential" else 0

    def say(needs: Needs) -> None:
        runtime.report("calibrate", note=needs.in_words(cache))

    rows = GatheredBatches(rest)
    count = runtime.counter("look at data")
    moments = calibrate(source, rows, specs, recipe.calibration, seed=recipe.seed, before=say, progress=count)
    return replace(decision, moments=moments, judged=judged)


def _chosen(decision: Decision) -> Decision:
    """Return the decision with a plan chosen from its table, by the clock where the runtime has a say."""
    table, source, inputs, target = decision.table, decision.source, decision.latency_inputs, decision.target
    if table is None:
        return decision
    if target is None or not (limits_latency(decision.recipe) or decision.recipe.gated):
        fused = fused_pairs(fused_copy(source, inputs)) if decision.recipe.fuse_batchnorm else {}
        return replace(decision, plan=choose(table).replace(fused=fused))
    timed = plan_within_latency(source, table, inputs, target)
    kept = {path: timed.plan.layer(path).reason for path in timed.returned}
    table = table.kept(kept)
    return replace(decision, plan=timed.plan, timed=timed, table=timed.timing.time(table))


def _nothing(cost: Profile) -> Plan:
    """Return the plan that does nothing, before there is one."""
    return Plan(tenfold="", model=cost.model, before=cost.cost, after=cost.cost, layers=())
