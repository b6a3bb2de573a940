"""The layer that stands where a dense one stood: a chain of plain torch layers with the face of the original."""

# Annotations are not postponed here: torch.jit.script reads those of methods that it leaves out as they are.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tenfold.errors import WeightError
from tenfold.formats import FORMATS, Factorization, Rank
from tenfold.layers.lazy_weight import LazyWeight
from tenfold.layers.onednn import StageChoice
from tenfold.layers.sublayers import build, empty_weight, held
from tenfold.records import LayerSpec, SubLayerSpec
from tenfold.tensors.kruskal import Stability


@dataclass(frozen=True)
class FitSummary:
    """How well the factors of a layer met its weight: ‖W − Ŵ‖/‖W‖, sweeps used, and what the algorithm said.

    ``stability`` tells how far the terms cancel, of formats whose factors can diverge. ``algorithm`` has the name and
    the settings of what found the factors. ``alone`` says why a layer was fitted on its own where others were in order.
    """

    rel_error: float
    n_iter: int = 1
    converged: bool = True
    note: str = ""
    stability: Stability | None = None
    algorithm: Mapping[str, Any] | None = None
    alone: str = ""


class FactorizedLayer(nn.Module):
    """A factorized linear, convolution or embedding layer that still answers for the dense one.

    Runs its ``stages`` one after the other. ``weight`` multiplies the factors out when it is computed with
    (differentiable, but as slow as it sounds) and not when it is asked for its dtype or shape; writing to it is an
    error. ``bias`` is that of the last stage, and the hyper-parameters of the dense layer (``in_features``,
    ``kernel_size``, ``stride`` ...) are there under torch's own names, so that code that reads them, like
    ``nn.MultiheadAttention``, goes on working.

    Attributes:
        spec: geometry of the dense layer.
        format: name of the format.
        rank: ranks by name.
        fit: how the factors were found; None for a layer that was loaded.
    """

    __jit_unused_properties__: ClassVar = ["weight", "bias"]  # of torch.jit.script

    def __init__(self, spec: LayerSpec, format: str, rank: Rank, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.spec = spec
        self.format = format
        self.rank = dict(rank)
        self.stages = nn.ModuleList(stages)
        self.fit: FitSummary | None = None
        self._choice = StageChoice()
        for name, value in _face(spec).items():
            setattr(self, name, value)

    @classmethod
    def of(
        cls, value: Factorization, bias: Tensor | None = None, *, requires_grad: tuple[bool, bool] = (True, True)
    ) -> Self:
        """Return the layer that runs a factorization.

        Args:
            value: the factors, in the dtype and on the device that the layer is to have.
            bias: shape (out_channels,), present exactly when the spec has one.
            requires_grad: of the weights and of the bias.
        """
        stages = []
        for stage in value.stages():
            own_weight = stage.weight.detach().clone(memory_format=torch.contiguous_format)
            own = (
                nn.Parameter(bias.detach().clone(), requires_grad[1]) if stage.spec.bias and bias is not None else None
            )
            stages.append(build(stage.spec, held(own_weight, requires_grad=requires_grad[0]), own))
        return cls(value.spec, value.name(), value.rank, stages)

    @classmethod
    def empty(
        cls, spec: LayerSpec, format: str, rank: Rank, like: Tensor, *, requires_grad: tuple[bool, bool] = (True, True)
    ) -> Self:
        """Return a layer with the right structure, uninitialised, in the dtype and on the device of ``like``.

        ``requires_grad`` is that of the weights and of the bias.
        """
        kind = FORMATS.get(format)
        rank = kind.check_rank(spec, rank)
        stages = []
        for stage in kind.structure(spec, rank):
            weight = held(empty_weight(stage, like), requires_grad=requires_grad[0])
            bias = nn.Parameter(like.new_empty(stage.out_channels), requires_grad[1]) if stage.bias else None
            stages.append(build(stage, weight, bias))
        return cls(spec, format, rank, stages)

    def factorization(self) -> Factorization:
        """Return the factors that the layer holds now; gradients flow through them."""
        weights: list[Tensor] = [stage.weight for stage in self.stages]  # type: ignore[misc]
        return FORMATS.get(self.format).from_stages(self.spec, self.rank, weights)

    @property
    def weight(self) -> Tensor:
        """The dense weight in torch's own layout, multiplied out whenever somebody computes with what is returned."""
        if torch.compiler.is_compiling():
            return self.factorization().to_dense()  # what nobody uses, the compiler leaves out
        factors: list[Any] = [stage.weight for stage in self.stages if isinstance(stage.weight, nn.Parameter)]
        weight = LazyWeight.of(self.spec.weight_shape, factors[0], lambda: self.factorization().to_dense())
        # Marks that all factors have are those of the product: transformers tells by one what it need not initialise.
        first, *others = (vars(factor) for factor in factors)
        for name, mark in first.items():
            if all(name in other and other[name] is mark for other in others):
                setattr(weight, name, mark)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, which sits on the last stage."""
        return getattr(self.stages[-1], "bias", None)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002 - torch's own name
        """Return what the dense layer would return; ``output_size`` as in ``nn.ConvTranspose2d``."""
        if output_size is not None:
            return self._sized(input, output_size)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._choice.run(self.stages, input)
        x = input
        for stage in self.stages:
            x = stage(x)
        return x

    @torch.jit.unused
    def _sized(self, x: Tensor, output_size: list[int]) -> Tensor:
        """Return what a transposed convolution returns in this size."""
        for stage in self.stages:
            x = stage(x, _target_size(stage, x, output_size)) if getattr(stage, "transposed", False) else stage(x)
        return x

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a weight or bias of its own, which nothing would compute with (pruning, ``layer.weight = ...``)."""
        if name.startswith(("weight", "bias")):
            msg = (
                f"a factorized layer takes no {name!r}: its parameters are those of its stages. Change these, or the "
                "dense layer of densify(model)"
            )
            raise WeightError(msg)
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Tell of the weight of a dense layer what it is, instead of calling it unexpected."""
        errors: list[str] = rest[-1]
        if f"{prefix}weight" in state_dict:
            errors.append(
                f"{prefix}weight is of a dense layer, and {self.format} factors stand here: load it into the dense "
                "model and compress that."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Return format, ranks and the dense layer replaced."""
        ranks = ", ".join(f"{k}={v}" for k, v in self.rank.items())
        return f"{self.format}({ranks}) for {self.spec}"


def stage_specs(layer: FactorizedLayer) -> tuple[SubLayerSpec, ...]:
    """Return the geometry of the stages of a factorized layer, in the order in which they run."""
    return FORMATS.get(layer.format).structure(layer.spec, layer.rank)


def _target_size(stage: Any, x: Tensor, output_size: list[int]) -> list[int]:
    """Return the part of a transposed convolution's output size that this stage makes; it passes other axes through."""
    axes = len(stage.kernel_size)
    wanted, here = list(output_size)[-axes:], list(x.shape)[-axes:]
    acts = [k > 1 or s > 1 for k, s in zip(stage.kernel_size, stage.stride, strict=True)]
    return [w if a else h for w, h, a in zip(wanted, here, acts, strict=True)]


def _face(spec: LayerSpec) -> dict[str, Any]:
    """Return the public hyper-parameters of the dense layer under torch's names."""
    match spec.kind:
        case "linear":
            return {"in_features": spec.in_channels, "out_features": spec.out_channels}
        case "embedding":
            return {
                "num_embeddings": spec.in_channels,
                "embedding_dim": spec.out_channels,
                "padding_idx": spec.padding_idx,
                "max_norm": None,
                "norm_type": 2.0,
                "scale_grad_by_freq": False,
                "sparse": spec.sparse,
            }
        case _:
            return {
                "in_channels": spec.in_channels,
                "out_channels": spec.out_channels,
                "kernel_size": spec.kernel,
                "stride": spec.stride,
                "padding": spec.padding,
                "output_padding": spec.output_padding,
                "dilation": spec.dilation,
                "groups": spec.groups,
                "padding_mode": spec.padding_mode,
                "transposed": spec.kind == "conv_transpose",
            }
