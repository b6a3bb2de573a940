"""compress(): the verbs in a row. Profile, plan, apply, re-estimate, tune, measure."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from tenfold import checkpoint
from tenfold.calibration import calibrate, called_layers
from tenfold.decompositions import Decomposition, Moments
from tenfold.errors import PlanError, TenfoldWarning
from tenfold.parallel import Workers
from tenfold.planning import (
    DEFAULT_FORMATS,
    FastPlan,
    analyse,
    candidates_for,
    close_idle,
    open_for_plan,
    plan_fast,
    recost,
)
from tenfold.planning import plan as make_plan
from tenfold.profiling import Comparison, LatencyTable, compare_latency, environment, profile, to_memory_format
from tenfold.profiling.step_timer import Observe, StepTimer
from tenfold.ranks import RankRule, rule_from
from tenfold.records import Analysis, Budget, Candidates, Latency, Measurement, Plan, Profile, RunRecord
from tenfold.registry import check_choice, listed
from tenfold.reporting import render_record
from tenfold.surgery import (
    apply,
    apply_in_order,
    fuse_batchnorm_,
    fused_pairs,
    reestimate_batchnorm_,
    unroll_rnns,
    unrolled_rnns,
    with_errors,
)
from tenfold.tracing import device_of, gathered
from tenfold.training import TuneResult

UseData = Literal["sequential", "layers", "norms"]


@dataclass(frozen=True, eq=False)
class Compressed:
    """What ``compress`` returns: the smaller model, the plan behind it, and the record of both.

    ``model`` is an ordinary module. ``original`` is the model that was given, untouched. ``analyse`` finds the spectra
    and errors that a report shows; only ``save`` asks for them. ``candidates`` is what the plan chose from, where the
    rule is ``global``.
    """

    model: nn.Module
    plan: Plan
    record: RunRecord
    original: nn.Module = field(repr=False)
    analyse: Callable[[], Analysis] | None = field(default=None, repr=False)
    candidates: Candidates | None = field(default=None, repr=False)

    def summary(self) -> str:
        """Return the before/after table and the plan with its reasons, as text."""
        return render_record(self.record)

    def save(self, path: str | Path, *, beside: Callable[[Path], None] | None = None) -> Path:
        """Write model, plan, record and model card to the folder ``path``, whole or not at all; return it.

        ``analysis.json`` has what a report shows of spectra and errors, ``candidates.json`` what the explorer needs.
        ``beside`` is called with a folder and may write more files into it; see ``tenfold.save``.
        """
        found = None if self.analyse is None else self.analyse()
        return checkpoint.save(
            self.model, self.plan, path, record=self.record, analysis=found, candidates=self.candidates, beside=beside
        )


def compress(  # noqa: PLR0913 - the one call that has every choice
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget | Mapping[str, float] | None = None,
    rule: RankRule | str = "global",
    plan: Plan | None = None,
    formats: str | Sequence[str] = DEFAULT_FORMATS,
    algorithms: Mapping[str, Decomposition] | None = None,
    keep: str | Sequence[str] = (),
    keep_ends: bool | None = None,
    data: Iterable[Any] | None = None,
    use_data: UseData = "sequential",
    tune: Callable[[nn.Module], Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    fold: bool = False,
    latency: bool = True,
    latency_inputs: Any = None,
    clock: LatencyTable | None = None,
    seed: int = 0,
    workers: Workers | None = None,
    observe: Observe | None = None,
) -> Compressed:
    """Return a smaller version of a trained model that meets a budget, with the plan and the record of what came of it.

    GRUs and LSTMs are opened into linear layers, which are planned like any others, and closed again where nothing of
    them is factorized; under a budget of latency, and where ``keep`` names them, they stay as they are.

    Args:
        model: any trained module; stays as it is.
        example_inputs: what its forward takes: a tensor, tuple, dict or ``(args, kwargs)``. Costs and latency are those
            of one forward on them.
        budget: what the whole model may cost, such as ``{"macs": 0.5}``: a share up to 1, or an absolute above 1.
            ``latency`` is a share of the measured time of the model, in its best memory format, or milliseconds.
        rule: how ranks are chosen, by name or as an object; see ``tenfold.ranks``.
        plan: carry out this plan instead of making one; budget, rule, formats and keep then do not matter.
        formats: the decompositions to use, the preferred first.
        algorithms: by format, instead of the format's default algorithm.
        keep: layers to leave alone: paths, globs or ``re:`` expressions.
        keep_ends: leave a cheap first and last layer alone; by default unless the rule names layers.
        data: unlabeled batches as the forward takes them; a few thousand samples are plenty. Without, weights alone
            decide, and batch norm keeps its statistics.
        use_data: what the data are for. ``sequential``: plan by what the network's output loses, and fit each layer in
            closed form to the original's output, given what the layers compressed before it put out. ``layers``: the
            same plan, each layer fitted on its own. ``norms``: only to re-estimate batch norm.
        tune: called with the compressed model, to train it in place by any loop; the history of a ``TuneResult`` that
            it returns goes into the record.
        evaluate: returns the score of a model as a fraction; called on the original, and after each step of recovery.
        fold: for inference: fuse batch norms into the layers before them once all else is done: ``fuse_batchnorm``.
            Latencies, and the budget of latency, are then those of both models with batch norm folded.
        latency: measure original and result, interleaved.
        latency_inputs: what to measure latency on, such as a larger batch; the example inputs if left out.
        clock: times layers for a latency budget; one for the model's device and dtype if None.
        seed: of everything that draws random numbers.
        workers: who does what falls into independent layers - weighing their ranks, decomposing them, except where each
            is fitted to those before it; this process if None. The outcome is the same.
        observe: called with the name of each step as it begins.

    Raises:
        DataError: the data hold no batch.
        UnknownNameError: data are to be used in a way that does not exist.
        TenfoldError: see ``profile``, ``plan`` and ``apply``; the model is untouched in every case.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> small = compress(net, torch.zeros(1, 64), budget={"macs": 0.5}, latency=False)
        >>> small.record.before.macs, small.record.after.macs
        (8192, 4096)
    """
    check_use_data(use_data)
    steps = StepTimer(observe)
    inputs = example_inputs if latency_inputs is None else latency_inputs
    device = device_of(model, example_inputs)
    budget = Budget.of(dict(budget) if isinstance(budget, Mapping) else budget)
    formats, keep = listed(formats), listed(keep)
    source = open_for_plan(model, plan=plan, keep=keep, budget=budget)
    with steps("profile"):
        before = profile(source, example_inputs)
    batches: list[Any] = []
    moments = None
    if data is not None:
        with steps("calibrate"):
            batches = gathered(data, device)
            if use_data != "norms":
                moments = calibrate(source, batches, called_layers(before), seed=seed)
    with steps("plan"):
        fast = found = None
        if plan is None:
            choices: dict[str, Any] = {"formats": formats, "keep": keep, "keep_ends": keep_ends, "seed": seed}
            choices |= {"algorithms": algorithms, "workers": workers, "memory": {}}
            plan, fast = decide(
                source, before, inputs, budget=budget, rule=rule, moments=moments, clock=clock, fold=fold, **choices
            )
            found = candidates_for(source, before, plan, fast, moments=moments, **choices)
        else:
            plan = recost(plan, before)
        plan = close_idle(plan, model)
        _refuse_empty(plan)
        if plan.opened != unrolled_rnns(source):
            source = unroll_rnns(model, plan.opened)
            before = profile(source, example_inputs)
    fold, plan = fold or bool(plan.folded), plan.replace(folded={})  # at the end: what is folded cannot be tuned
    with steps("apply"):
        small, plan = replace_layers(source, plan, batches, moments, use_data, seed=seed, workers=workers)
    stale = batches if moments is None else []  # layers fitted to data leave the statistics right as they are
    scores, tuning = _recover(model, small, steps, data=stale, tune=tune, evaluate=evaluate)
    if fold:
        with steps("fold"):
            fuse_batchnorm_(small.eval(), example_inputs)
            plan = plan.replace(folded=fused_pairs(small))
    after = profile(small, example_inputs)
    times = Comparison({}, {})
    if latency:
        with steps("measure"):
            times = _compare(_folded(model, example_inputs) if fold else model, small, inputs, fast)
            if fast is not None:
                _warn_if_late(fast, times)
    record = RunRecord(
        seed=plan.seed,
        before=measurement(before, times.latencies.get("before"), scores.get("original")),
        after=measurement(after, times.latencies.get("after"), scores.get("tuned", scores.get("compressed"))),
        speedup=times.speedups.get("after"),
        scores=scores,
        plan=plan,
        tuning=tuning,
        seconds=steps.seconds,
        environment=environment(device),
    )
    return Compressed(small, plan, record, model, partial(analyse, source, before, plan), found)


def decide(
    model: nn.Module,
    before: Profile,
    latency_inputs: Any,
    *,
    budget: Budget | Mapping[str, float] | None = None,
    rule: RankRule | str = "global",
    moments: Mapping[str, Moments] | None = None,
    clock: LatencyTable | None = None,
    fold: bool = False,
    **choices: Any,
) -> tuple[Plan, FastPlan | None]:
    """Return a plan, and the measurements behind it where the budget names a latency.

    Args:
        model: the model that was profiled.
        before: its profile, whose costs are in the plan.
        latency_inputs: what a latency is measured on; may be of another batch size than the profile's.
        budget: what the whole model may cost; see ``compress``.
        rule: how ranks are chosen.
        moments: what data say of the layers; see ``calibrate``.
        clock: times layers; one for the model's device and dtype if None.
        fold: plan for models whose batch norms are folded; which ones then is in the plan.
        choices: all else that ``plan`` takes.
    """
    rule = rule_from(rule) if isinstance(rule, str) else rule
    budget = Budget.of(dict(budget) if isinstance(budget, Mapping) else budget)
    if budget.latency is None:
        plan = make_plan(model, before, rule=rule, budget=budget, moments=moments, **choices)
        return plan.replace(folded=fused_pairs(_folded(model, latency_inputs)) if fold else {}), None
    limits = budget.replace(latency=None).allowance(before.cost)
    shares = {name: min(1.0, limit / getattr(before.cost, name)) for name, limit in limits.items()}
    if clock is None:
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        clock = LatencyTable(device=device_of(model, latency_inputs), dtype=weight.dtype)
    fast = plan_fast(
        model,
        profile(model, latency_inputs),
        latency_inputs,
        clock=clock,
        budget=Budget(**shares, latency=budget.latency),
        rule=rule,
        moments=moments,
        fold=fold,
        **choices,
    )
    return recost(fast.plan, before).replace(budget={k: v for k, v in budget if v is not None}), fast


def check_use_data(use_data: str) -> None:
    """Raise UnknownNameError unless data can be used like this; see ``compress``."""
    check_choice("use_data", use_data, get_args(UseData))


def replace_layers(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    moments: Mapping[str, Moments] | None,
    use_data: UseData,
    *,
    original: nn.Module | None = None,
    seed: int = 0,
    workers: Workers | None = None,
) -> tuple[nn.Module, Plan]:
    """Return a model in which the plan is carried out as the data are to be used, and the plan with its errors.

    Args:
        model: stays as it is.
        plan: what to do with its layers.
        batches: unlabeled inputs on the device of the model; may be empty where there are no moments.
        moments: what they say of the layers; None to go by the weights alone.
        use_data: see ``compress``.
        original: whose outputs the fits in order are to meet; those of ``model`` if None.
        seed: of the draw of positions.
        workers: who decomposes layers that do not wait for others; this process if None.
    """
    if moments is not None and use_data == "sequential":
        minded = {path: own.output_gram for path, own in moments.items() if own.output_gram is not None}
        small = apply_in_order(model, plan, batches, original=original, outputs=minded, seed=seed)
    else:
        small = apply(model, plan, moments=moments, workers=workers)
    return small, with_errors(plan, small)


def _folded(model: nn.Module, inputs: Any) -> nn.Module:
    """Return a copy in evaluation mode with its batch norms folded."""
    copied = copy.deepcopy(model).eval()
    fuse_batchnorm_(copied, inputs)
    return copied


def _warn_if_late(fast: FastPlan, times: Comparison) -> None:
    """Warn where the finished model measures slower than the plan did when it met its budget."""
    found, planned = times.speedups["after"], fast.speedup
    if not fast.met or found.high < planned.low:
        msg = (
            f"the model measures {found.ratio:.2f} times faster ({found.low:.2f} to {found.high:.2f}), planned were "
            f"{planned.ratio:.2f}: the latency budget is {'missed' if not fast.met else 'in doubt'}. Measure again on "
            "a quiet machine, or lower the budget."
        )
        warnings.warn(msg, TenfoldWarning, stacklevel=3)


def _compare(model: nn.Module, small: nn.Module, inputs: Any, fast: FastPlan | None) -> Comparison:
    """Return original and result measured in turns; where the plan is by the clock, in the memory formats it chose."""
    if fast is None:
        return compare_latency({"before": (model, inputs), "after": (small, inputs)})
    formats = {"before": (model, fast.before.memory_format), "after": (small, fast.after.memory_format)}
    return compare_latency({name: to_memory_format(m, inputs, f) for name, (m, f) in formats.items()})


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


def _recover(
    model: nn.Module,
    small: nn.Module,
    steps: StepTimer,
    *,
    data: Sequence[Any],
    tune: Callable[[nn.Module], Any] | None,
    evaluate: Callable[[nn.Module], float] | None,
) -> tuple[dict[str, float], tuple[dict[str, Any], ...]]:
    """Re-estimate and tune ``small`` in place; return the scores on the way, by step, and the epochs of tuning."""
    scores: dict[str, float] = {}

    def score(name: str, candidate: nn.Module) -> None:
        if evaluate is not None:
            with steps("evaluate"):
                scores[name] = float(evaluate(candidate))

    score("original", model)
    if data:
        with steps("re-estimate batch norm"):
            reestimate_batchnorm_(small, data)
    score("compressed", small)
    if tune is not None:
        with steps("tune"):
            told = tune(small)
        score("tuned", small)
        if isinstance(told, TuneResult):
            return scores, tuple(epoch.model_dump() for epoch in told.history)
    return scores, ()


def _refuse_empty(plan: Plan) -> None:
    if not plan.factorized:
        reasons = {layer.reason for layer in plan.layers if layer.before.params}
        shown = "; ".join(sorted(reasons)[:3])
        msg = f"nothing is to be done: no layer would be factorized. Reasons: {shown}"
        raise PlanError(msg)
