"""From options to scores of a task's model with one layer factorized, and to the trade-off curve of a plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt

from tenfold.cli.terminal import Options

if TYPE_CHECKING:
    from torch import nn

    from tenfold.cli.source import Opened
    from tenfold.cli.terminal import Terminal
    from tenfold.parallel import Workers
    from tenfold.planning import Decision, Sensitivity
    from tenfold.records import Profile, Recipe

DEFAULT_SAMPLES = 256  # to look at, without labels


class Scoring(Options):
    """Measurement.

    Attributes:
        samples: score on so many labelled samples held out from training, or on all there are; 0 for no scores.
        table: take from this file, and keep there, what was measured: scores, for rules that need them; fits, for
            error.
    """

    samples: NonNegativeInt = 1000
    table: Path | None = None

    def factory(
        self, opened: Opened, recipe: Recipe, workers: Workers
    ) -> Callable[[nn.Module, Profile], Sensitivity] | None:
        """Return what makes scores for the rule; None where it asks for none, or can have none.

        The rule accuracy_drop always asks for them, the rule global where a table is given. A table that exists decides
        under which conditions more is measured.
        """
        from tenfold.allocation import rule_of
        from tenfold.records import SensitivityTable

        columns = set(rule_of(recipe.rule).columns)
        if not ({"expected_drop", "measured_drop"} & columns or ("distortion" in columns and self.table is not None)):
            return None
        samples, looked_at, method = self.samples, DEFAULT_SAMPLES, "sequential"
        if self.table is not None and self.table.exists():
            key = SensitivityTable.load(self.table).key
            looked_at, method = key.samples, "batchnorm" if key.batchnorm else "sequential"
            samples = int(key.about.get("scored") or samples)
        if not samples:
            return None
        calibration = recipe.calibration.replace(method=method, metric="gradients", refine=0)
        conditions = recipe.replace(keep=(), algorithms={}, calibration=calibration)

        def make(model: nn.Module, profile: Profile) -> Sensitivity:
            measured = {"samples": samples, "looked_at": looked_at}
            return sensitivity(opened, model, profile, conditions, **measured, path=self.table, workers=workers)

        return make


def sensitivity(
    opened: Opened,
    model: nn.Module,
    profile: Profile,
    recipe: Recipe,
    *,
    samples: int,
    looked_at: int,
    path: Path | None,
    workers: Workers,
) -> Sensitivity:
    """Return what measures the layers of a task's model, with what ``path`` holds already.

    Args:
        opened: the task.
        model: to measure.
        profile: of the model.
        recipe: formats, layers, seed, and the calibration method.
        samples: that are scored; 0 for no scores.
        looked_at: calibration samples for the errors of outputs; 0 for the errors of weights.
        path: of the table.
        workers: who measures.

    Raises:
        TenfoldError: the file at ``path`` was measured under other conditions; a format or pattern that names nothing.
    """
    from tenfold.cli.recovery import CalibrationBatches
    from tenfold.planning import Score, Sensitivity

    task, batches, score = opened.task, None, None
    if looked_at:
        there = task.calibration_size(recipe.seed)
        batches = CalibrationBatches(opened, min(looked_at, there), recipe.seed)
    if samples:
        evaluate = partial(task.evaluate, split="validation", limit=samples)
        score = Score(evaluate, {"task": opened.name, "scored": samples}, task.metric)
    return Sensitivity(model, profile, recipe, evaluate=score, batches=batches, path=path, workers=workers)


def draw_tradeoff(
    decision: Decision, path: Path, terminal: Terminal, scores: Callable[[nn.Module, Profile], Sensitivity] | None
) -> tuple[Path, ...]:
    """Write the trade-off curve of the rule with the plan marked, and return the files written."""
    from tenfold.allocation import ThresholdRule, choose, rule_of
    from tenfold.planning import tabulate, tradeoff
    from tenfold.records import Budget
    from tenfold.reporting.pictures import plot_tradeoff
    from tenfold.runtime import Runtime

    recipe, table = decision.recipe, decision.table
    rule = rule_of(recipe.rule)
    if isinstance(rule, ThresholdRule):
        recipe = recipe.replace(rule=rule.without_number().to_dict())
    if table is None or recipe.rule != decision.recipe.rule:
        made = None if scores is None else scores(decision.source, decision.profile)
        table = tabulate(decision.source, decision.profile, recipe, moments=decision.moments, scores=made)
    budget = next((name for name in recipe.budget.limited if name in ("params", "macs")), "macs")
    options = table
    curve = tradeoff(
        decision.source,
        decision.profile,
        lambda wanted: choose(options, recipe.replace(budget=Budget.of(wanted))),
        budget=budget,
        progress=Runtime(on_event=terminal.on_event).counter("budgets"),
    )
    return plot_tradeoff(curve, path, cost=decision.plan.after)
