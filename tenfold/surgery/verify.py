"""Check that a carried-out plan is what runs: every factorized layer does in the forward what the dense one did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten

from tenfold.errors import PlanError, ProfileError, warn
from tenfold.records import Plan, Profile, Shape
from tenfold.surgery.apply import restructure_
from tenfold.surgery.modules import find
from tenfold.surgery.recognise_units import confirms
from tenfold.tensors import plain_arithmetic, untransformed
from tenfold.tracing import copied
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, shape_of, tensors_in
from tenfold.tracing.layers import entries
from tenfold.tracing.randomness import Randomness

_CLOSE = 1e-3  # the same operations run on the same numbers; fused kernels may still add in another order


@dataclass(frozen=True)
class _Step:
    """One call of a layer: what entered it, in two numbers."""

    path: str
    shape: Shape
    norm: float
    total: float

    def agrees(self, other: _Step) -> bool:
        """Whether the same entered the same layer."""
        if (self.path, self.shape) != (other.path, other.shape):
            return False
        largest = self.norm * torch.Size(self.shape).numel() ** 0.5  # that the total can be
        same_total = abs(self.total - other.total) <= _CLOSE * (largest + _CLOSE)
        return same_total and abs(self.norm - other.norm) <= _CLOSE * (self.norm + _CLOSE)


@dataclass(eq=False)
class _Run:
    """What one forward did: the calls of layers in order, and what came of it."""

    steps: list[_Step] = field(default_factory=list)
    output: Any = None
    error: ProfileError | None = None

    def calls(self) -> Counter[str]:
        return Counter(step.path for step in self.steps)


def verify(model: nn.Module, plan: Plan, inputs: Any) -> None:
    """Raise PlanError unless the forward of a model runs factorized layers as it runs those that they replace.

    A forward may pass over a factorized layer, or treat it otherwise, where it asks for classes
    (``isinstance(layer, nn.Conv2d)``), and may go on running the dense one where it reaches that by a way that nobody
    can follow. So the model runs once, and once more in the structure of the plan: each factorized layer runs, and what
    the dense one makes of the same input is passed on, so that whatever depends on values (routing, thresholds) goes
    the same way in both. Layer by layer, and in what they return, the two have to agree.

    Units are narrowed on a copy, with other factors of the same structure, to the outputs that these factors give.

    No factors are needed: this comes before they are found.

    Args:
        model: that the plan is to be carried out on; its recurrent networks are unrolled as the plan says.
        plan: what is to happen to its layers.
        inputs: example inputs.

    Raises:
        PlanError: the first layer that runs otherwise, and why.
    """
    if not confirms(model, plan.narrowed, inputs):
        pivots = ", ".join(repr(unit.pivot) for unit in plan.narrowed[:4])
        msg = (
            f"the forward gives other outputs, or none, with the units of {pivots} narrowed: take them out of the plan"
        )
        raise PlanError(msg)
    paths = [entry.path for entry in entries(model) if not isinstance(entry.module, torch.jit.ScriptModule)]
    changed = {layer.path: find(model, layer.path) for layer in plan.layers if layer.format}
    before = _run(model, inputs, paths, {})
    if before.error:
        raise before.error
    small = restructure_(copied(model), plan.replace(fused={}, units=()))
    after = _run(small, inputs, paths, changed)
    moved = next((path for path in changed if before.calls()[path] != after.calls()[path]), None)
    different = _difference(before, after, changed)
    if not (after.error or moved or different):
        return
    again = _run(model, inputs, paths, {})
    if before.calls() != again.calls() or (moved is None and _difference(before, again, changed)):
        return  # no two forwards are alike, whatever its layers are: nothing can be compared
    if after.error:
        names = ", ".join(map(repr, list(changed)[:4])) + (" ..." if len(changed) > 4 else "")
        msg = f"with {names} factorized, {after.error}. Keep the layers whose class or weight the forward asks for."
        raise PlanError(msg) from after.error
    if moved is not None:
        with _others(small, changed) as strangers:
            _run(small, inputs, paths, changed)
        now, was = after.calls()[moved], before.calls()[moved]
        why = _why_not_run(changed[moved], strangers)
        msg = f"layer {moved!r} runs {now} times once factorized, {was} times before: {why} Or keep {moved!r}."
        raise PlanError(msg)
    raise PlanError(different)


def warn_of_costs(plan: Plan, before: Profile, after: Profile) -> None:
    """Warn where the forward of a finished model takes other MACs than its plan says, and say which layers do."""
    if after.macs == plan.after.macs:
        return
    calls = {layer.path: layer.calls for layer in after.layers}
    moved = [layer.path for layer in before.layers if calls.get(layer.path) != layer.calls]
    msg = f"the model takes {after.macs:,} MACs, and its plan says {plan.after.macs:,}"
    if moved:
        msg += f": {moved[0]!r} runs on other shapes than before, since the forward depends on values"
    warn(msg)


def _run(model: nn.Module, inputs: Any, paths: Sequence[str], stand_ins: Mapping[str, nn.Module]) -> _Run:
    """Run a model and note what its layers do, with the outputs of others in place of those of some layers."""
    run = _Run()
    with ExitStack() as stack:
        for module in (model, *stand_ins.values()):
            stack.enter_context(evaluating(module))  # and keep gradients, of forwards that take some themselves
        for context in (layer_by_layer(), Randomness(model, inputs).seeded(0), _hooked(model, paths, stand_ins, run)):
            stack.enter_context(context)
        try:
            run.output = call_model(model, inputs)
        except ProfileError as error:
            run.error = error
    return run


@contextmanager
def _hooked(model: nn.Module, paths: Sequence[str], stand_ins: Mapping[str, nn.Module], run: _Run) -> Iterator[None]:
    handles = []
    for path in paths:
        layer = find(model, path)
        handles.append(layer.register_forward_pre_hook(_noting(path, run), with_kwargs=True))
        if path in stand_ins:
            # before the hooks of others, which may change the output
            handles.append(layer.register_forward_hook(_passing_on(stand_ins[path]), with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noting(path: str, run: _Run) -> Callable[..., None]:
    @plain_arithmetic()
    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        entering = next(tensors_in((args, kwargs)), None)
        if entering is None or entering.is_nested or entering.layout != torch.strided:
            run.steps.append(_Step(path, (), 0.0, 0.0))
            return
        values = _finite(untransformed(entering))
        run.steps.append(_Step(path, shape_of(entering), float(values.norm()), float(values.sum())))

    return note


def _passing_on(dense: nn.Module) -> Callable[..., Any]:
    def pass_on(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        wanted = dense.forward(*args, **kwargs)  # without the hooks, which the layer in its place has got
        if isinstance(output, Tensor) and output.shape != wanted.shape:
            return output  # the shape of what enters the next layer tells
        return wanted

    return pass_on


@contextmanager
def _others(model: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Iterator[list[nn.Module]]:
    """Collect the modules that run and are not in the model."""
    known = {id(m) for m in model.modules()}
    known |= {id(m) for layer in stand_ins.values() for m in layer.modules() if m is not layer}
    found: list[nn.Module] = []

    def note(module: nn.Module, _args: Any) -> None:
        if id(module) not in known:
            found.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _why_not_run(old: nn.Module, strangers: Sequence[nn.Module]) -> str:
    """Return why a layer does not run as often as before, and what helps."""
    kind = type(old).__name__
    if any(type(module) is type(old) and _weight_shape(module) == _weight_shape(old) for module in strangers):
        return (
            f"the forward still runs a {kind} outside of the model, by a way that cannot be followed (a global "
            "variable, a generator). Let it reach the layer through an attribute of its module."
        )
    return f"the forward asks for its class. Let it call the layer whatever its class is, which need not be {kind}."


def _weight_shape(module: nn.Module) -> Shape:
    weight = getattr(module, "weight", None)
    return shape_of(weight) if isinstance(weight, Tensor) else ()


def _difference(before: _Run, after: _Run, planned: Container[str]) -> str:
    """Return where a run has other values than the one before, and after which layer; empty if nowhere."""
    for i, (one, other) in enumerate(zip(before.steps, after.steps, strict=False)):
        if not one.agrees(other):
            return _otherwise([step.path for step in before.steps[: i + 1]], planned)
    if len(before.steps) != len(after.steps) or not _same_output(before.output, after.output):
        return _otherwise([step.path for step in before.steps], planned, "the output of the model")
    return ""


def _otherwise(ran: Sequence[str], planned: Container[str], what: str = "") -> str:
    """Return what is to be said of a difference that showed after these layers ran, or as the last of them began."""
    here = [] if what or ran[-1] not in planned else [ran[-1]]
    earlier = next((path for path in reversed(ran[: len(ran) - len(here)]) if path in planned), None)
    suspects = " or ".join(repr(path) for path in (earlier, *here) if path is not None)
    what = what or f"what enters layer {ran[-1]!r}"
    return (
        f"{what} changes once {suspects} is factorized, with the same outputs of all layers: the forward asks for its "
        f"class or its weight. Let it do without, or keep {suspects}."
    )


def _same_output(one: Any, other: Any) -> bool:
    """Whether two outputs have the same structure, shapes and values."""
    (ones, structure), (others, same) = tree_flatten(one), tree_flatten(other)
    if structure != same:
        return False
    return all(_same_leaf(a, b) for a, b in zip(ones, others, strict=True))


def _same_leaf(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    found, others = list(tensors_in(one)), list(tensors_in(other))
    return len(found) == len(others) and all(map(_same_tensor, found, others))


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if one.is_nested or one.layout != torch.strided:
        return one.layout == other.layout
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = _finite(one), _finite(other)
    return not float((a - b).norm()) > _CLOSE * (float(a.norm()) + _CLOSE)


def _finite(tensor: Tensor) -> Tensor:
    values = tensor.abs() if tensor.is_complex() else tensor
    return values.to(torch.float64 if values.numel() < 1_000_000 else torch.float32).nan_to_num()
