"""Which batch norm can be merged into which layer: seen while the model runs once, each refusal with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer, stage_specs
from tenfold.records import LayerSpec
from tenfold.surgery.batchnorm import BATCH_NORMS
from tenfold.surgery.modules import HOOKS
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.layers import Entry, entries

# What else a batch norm may do after it has normalized, in this order: the layers with an activation of timm.
AFTER = ("drop", "act")


@dataclass(frozen=True)
class Folds:
    """What becomes of the batch norms of a model.

    Attributes:
        pairs: paths of those that are merged, each with the path of the layer that takes them.
        kept: paths of those that stay, each with the reason.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def find_folds(model: nn.Module, inputs: Any) -> Folds:
    """Return which batch norms of a model can be merged into the layer before them, and why the others cannot.

    The model runs once, in evaluation mode. A pair is a layer whose output is taken by the batch norm and by nothing
    else, both of which run once. What runs must not depend on the inputs.

    Args:
        model: in evaluation mode; stays as it is.
        inputs: example inputs as ``call_model`` takes them.

    Raises:
        PlanError: the model is in training mode.
        ProfileError: it does not run on these inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
        >>> find_folds(net, torch.zeros(1, 3, 8, 8))
        Folds(pairs={'1': '0'}, kept={'3': 'it follows ReLU, which cannot take it'})
    """
    if model.training:
        msg = "folding batch norm is for inference, and the model is in training mode: call model.eval() first"
        raise PlanError(msg)
    known = entries(model)
    norms = [entry for entry in known if isinstance(entry.module, BATCH_NORMS)]
    if not norms:
        return Folds()
    unfit = {norm.path: _reason_of_norm(norm.module) for norm in norms}  # before there are hooks of our own
    hooked = {entry.path for entry in known if _has_hooks(entry.module)}
    watch = _Watch(known)
    with evaluating(model), layer_by_layer(), watch.on():
        watch.returned(call_model(model, inputs))
    folds = Folds()
    by_path = {entry.path: entry for entry in known}
    for norm in norms:
        maker = by_path.get(watch.makers.get(norm.path, ""))
        reason = unfit[norm.path] or watch.reason(norm.path) or _reason_of_layer(maker, norm.module, hooked)
        if reason or maker is None:
            folds.kept[norm.path] = reason
        else:
            folds.pairs[norm.path] = maker.path
    return folds


def _reason_of_norm(norm: Any) -> str:
    """Return why a batch norm cannot be merged into any layer, or an empty string."""
    if norm.training:
        return "it is in training mode: its statistics change with every batch"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics: what it does depends on the batch"
    if parametrize.is_parametrized(norm):
        return "its parameters are parametrized"
    if _has_hooks(norm):
        return "it has hooks, which would no longer see its input"
    if not plain(norm) and {name for name, _ in norm.named_children()} != set(AFTER):
        return f"{type(norm).__name__} is a batch norm with a forward of its own"
    return ""


def plain(norm: nn.Module) -> bool:
    """Whether a batch norm does what torch's own do, and nothing after it."""
    return any(type(norm).forward is base.forward for base in BATCH_NORMS)


def _reason_of_layer(layer: Entry | None, norm: Any, hooked: set[str]) -> str:
    """Return why a layer cannot take the batch norm after it, or an empty string."""
    if layer is None:
        return "what it takes is not the output of a layer"
    if layer.spec is None:
        own = not any(True for _ in layer.module.parameters())
        return f"it follows {type(layer.module).__name__}, which cannot take it" if own else layer.reason
    if layer.spec.kind == "embedding":
        return "it follows an embedding, which has no bias"
    if layer.tied:
        return f"layer {layer.path!r} shares a parameter with {', '.join(layer.tied)}"
    if layer.path in hooked:
        return f"layer {layer.path!r} has hooks, which would see another output"
    if layer.spec.out_channels != norm.num_features:
        return f"layer {layer.path!r} has {layer.spec.out_channels} outputs, it has {norm.num_features} channels"
    if isinstance(layer.module, FactorizedLayer) and not isinstance(last_spec(layer.module), LayerSpec):
        return f"layer {layer.path!r} does not end with a plain torch layer"
    return ""


def last_spec(layer: FactorizedLayer) -> Any:
    """Return the geometry of the last stage of a factorized layer."""
    return stage_specs(layer)[-1]


def _has_hooks(module: nn.Module) -> bool:
    parts = module.modules() if isinstance(module, FactorizedLayer) else (module,)
    return any(bool(part.__dict__.get(name)) for part in parts for name in HOOKS)


class _Watch(TorchDispatchMode):
    """Sees what each batch norm takes, and what else is made of it. Tensors are held, so that ids stay their own."""

    def __init__(self, known: tuple[Entry, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.makers: dict[str, str] = {}
        self._known = known
        self._calls: Counter[str] = Counter()
        self._made: dict[int, tuple[str, Tensor]] = {}
        self._uses: Counter[int] = Counter()
        self._taken: dict[str, Tensor] = {}
        self._odd: dict[str, str] = {}
        self._elsewhere: set[int] = set()  # outputs whose channels are not on axis 1, where batch norm has them
        self._counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation; count it for the outputs of layers that it takes."""
        if self._counting:
            self._uses.update({id(t) for t in tensors_in((args, kwargs or {}))} & self._made.keys())
        return func(*args, **(kwargs or {}))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch what runs meanwhile."""
        handles = []
        try:
            for entry in self._known:
                if isinstance(entry.module, BATCH_NORMS):
                    handles.append(entry.module.register_forward_pre_hook(self._entering(entry.path), with_kwargs=True))
                if isinstance(entry.module, BATCH_NORMS) and not plain(entry.module):
                    handles.append(entry.module.register_forward_hook(self._checking(entry.path)))
                handles.append(entry.module.register_forward_hook(self._leaving(entry.path)))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def returned(self, output: Any) -> None:
        """Count what the model itself returns as used."""
        self._uses.update({id(t) for t in tensors_in(output)} & self._made.keys())

    def reason(self, norm: str) -> str:
        """Return why what was seen does not allow to merge a batch norm, or an empty string."""
        maker, taken = self.makers.get(norm), self._taken.get(norm)
        if taken is None:
            return "the forward never calls it"
        if maker is None:
            return "what it takes is not the output of a layer"
        if self._calls[norm] > 1 or self._calls[maker] > 1:
            return f"it or {maker!r} runs several times: one merged layer cannot stand for all"
        if self._uses[id(taken)] > 1:
            return f"the output of {maker!r} is used elsewhere as well, or changed before"
        if id(taken) in self._elsewhere:
            return f"it normalizes another axis than that of the outputs of {maker!r}"
        return self._odd.get(norm, "")

    def _entering(self, path: str) -> Any:
        def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            first = next(tensors_in((args, kwargs)))
            self._taken[path] = first
            made = self._made.get(id(first))
            if made is not None:
                self.makers[path] = made[0]

        return enter

    def _leaving(self, path: str) -> Any:
        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            self._calls[path] += 1
            if isinstance(output, Tensor) and id(output) not in self._made:
                self._made[id(output)] = (path, output)
                spec = next(entry.spec for entry in self._known if entry.module is module)
                if spec is not None and output.dim() != spec.axes + 2:
                    self._elsewhere.add(id(output))

        return leave

    def _checking(self, path: str) -> Any:
        def check(norm: Any, _args: Any, output: Tensor) -> None:
            self._counting = False
            x = self._taken[path]
            value = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
            for name in AFTER:
                value = norm.get_submodule(name)(value)
            if not torch.allclose(value, output, rtol=1e-4, atol=1e-5, equal_nan=True):
                self._odd[path] = f"{type(norm).__name__} does more than to normalize, drop and activate"
            self._counting = True

        return check
