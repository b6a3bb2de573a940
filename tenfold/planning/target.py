"""The runtime that a plan is made for, and the clock that measures in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tenfold.errors import ExportError, ProfileError
from tenfold.formats import FORMATS
from tenfold.profiling import LatencyTable, profile
from tenfold.records import LayerProfile, LayerSpec, Profile, Recipe
from tenfold.runtime import Runtime
from tenfold.runtimes import Conditions, TargetRuntime, runtime_named


@dataclass(frozen=True, eq=False)
class Target:
    """A runtime and its clock.

    Attributes:
        runtime: builds and runs models.
        clock: times their layers.
        profile: of the model on what latencies are measured on.
        refused: paths of layers that the runtime cannot build, with the reason.
    """

    runtime: TargetRuntime
    clock: LatencyTable
    profile: Profile
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, model: nn.Module, inputs: Any, runtime: Runtime) -> Target:
        """Return the target of a recipe, before anything is measured.

        Raises:
            UnknownNameError: no such runtime.
            MissingExtraError: a package that it needs is not installed.
            ProfileError: it has no such device or precision.
        """
        target = runtime_named(recipe.target)
        target.check(model, inputs)
        if runtime.clock is not None and runtime.clock.runtime != target.name:
            msg = (
                f"the clock measures in {runtime.clock.runtime} and the recipe is for {target.name}: leave the clock "
                f"out, or name runtime={runtime.clock.runtime!r}"
            )
            raise ProfileError(msg)
        clock = runtime.clock or target.clock(model, inputs, progress=runtime.counter("measure layers"))
        return cls(target, clock, profile(model, inputs))

    @property
    def at(self) -> Conditions:
        """How layers and models run."""
        own = Conditions()
        clock = self.clock
        return Conditions(clock.torch_device, clock.dtype, clock.threads or own.threads, clock.memory_format)

    def in_format(self, name: str) -> Target:
        """Return the same target in another memory format."""
        return replace(self, clock=self.clock.in_format(name))

    def ready(self, model: nn.Module, inputs: Any, memory_format: str) -> tuple[nn.Module, Any]:
        """Return the model as it runs there, and the inputs to call it with."""
        return self.runtime.ready(model, inputs, memory_format, self.at.threads)

    def step_of(self, spec: LayerSpec) -> int:
        """Return what channels of such layers should be multiples of there; see ``LatencyTable.step_of``."""
        return self.clock.step_of(spec)

    def refusal(self, format: str, spec: LayerSpec) -> str | None:
        """Return why layers in a format cannot be timed there, or None."""
        if not self.runtime.plain_layers:
            return None
        kind = FORMATS.get(format)
        least = kind.check_rank(spec, dict.fromkeys(kind.max_rank(spec), 1))  # full factors are left out
        if all(isinstance(stage, LayerSpec) for stage in kind.structure(spec, least)):
            return None
        return f"{format} has other parts than plain layers, and {self.runtime.name} times no others"

    def kept(self, formats: Iterable[str]) -> dict[str, str]:
        """Return the layers that stay as they are for what the runtime cannot do, by path, with the reason.

        Those that it cannot build are noted: they have no time of their own.
        """
        reasons: dict[str, str] = {}
        for layer in self.profile.layers:
            if layer.spec is None or not layer.calls:
                continue
            fails = "" if layer.format is not None else self._fails(layer, layer.spec)
            if fails:
                self.refused[layer.path] = fails
            served = [f for f in formats if not FORMATS.get(f).unsupported_reason(layer.spec)]
            refusals = [self.refusal(format, layer.spec) for format in served]
            if fails or (refusals and all(refusals)):
                reasons[layer.path] = fails or "; ".join(map(str, refusals))
        return reasons

    def _fails(self, layer: LayerProfile, spec: LayerSpec) -> str:
        try:
            self.clock.layer_ms(spec, layer.calls)
        except ExportError as error:
            return f"{self.runtime.name} cannot build it: {error}"
        return ""
