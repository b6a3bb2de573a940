"""Losses: cross-entropy, the default, and a penalty on the sensitivity of CP layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import TuningError
from tenfold.layers import FactorizedLayer
from tenfold.tensors import kruskal
from tenfold.tracing.inputs import call_model
from tenfold.training.loop import Loss


def logits_of(output: Any) -> Tensor:
    """Return a model's output, or the ``logits`` of it, in float32."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.float()


def cross_entropy(smoothing: float = 0.0) -> Loss:
    """Return cross-entropy with label smoothing, in float32, of (model, inputs, labels).

    Example:
        >>> import torch
        >>> loss = cross_entropy()(nn.Identity(), torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> round(loss.item(), 4)
        1.3863
    """

    def loss(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(logits_of(call_model(model, inputs)), targets, label_smoothing=smoothing)

    return loss


class SensitivityPenalty:
    """A loss for ``finetune``: another loss plus the sensitivity of CP layers to noise in their factors.

    loss + weight · Σ over layers of Σ_m n_m Σ_r Π_{k≠m} ‖u_r⁽ᵏ⁾‖², the sensitivity of Phan et al. 2020
    (arXiv 2008.05441). It keeps terms from growing while they cancel, and balances the factors of a term, without
    lowering the rank as weight decay of the factors would. Layers in formats without such terms are left out.

    Args:
        loss: of model, inputs and targets; cross-entropy if None.
        weight: of the penalty, at least 0. Sensitivities are of the order of 100 ‖W‖² after ``cp_epc``.

    Raises:
        TuningError: a weight below 0.

    Example:
        >>> from tenfold.decompositions import decompose
        >>> from tenfold.records import LayerSpec
        >>> spec = LayerSpec(kind="conv", in_channels=4, out_channels=4, kernel=(3, 3))
        >>> fit = decompose(torch.ones(4, 4, 3, 3), "cp3", {"rank": 1}, spec=spec)
        >>> layer = FactorizedLayer.of(fit.value, None)
        >>> loss = SensitivityPenalty(lambda model, inputs, targets: torch.zeros(()), weight=1.0)
        >>> round(float(loss(layer, None, None)))  # 3 · (4·4·9)^{1/3} · 12^{4/3}
        432
    """

    def __init__(self, loss: Loss | None = None, *, weight: float = 1e-6) -> None:
        if not weight >= 0:
            msg = f"weight={weight} must be at least 0: it multiplies the sensitivity of all layers"
            raise TuningError(msg)
        self.loss, self.weight = loss or cross_entropy(), weight

    def __call__(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        """Return the loss on a batch, with the penalty."""
        loss = self.loss(model, inputs, targets)
        return loss + self.weight * total_sensitivity(model).to(loss)


def total_sensitivity(model: nn.Module) -> Tensor:
    """Return the total sensitivity of layers that are sums of rank-one tensors, differentiable; 0 without such layers.

    Example:
        >>> total_sensitivity(nn.Linear(3, 3)).item()
        0.0
    """
    terms = (m.factorization().terms() for m in model.modules() if isinstance(m, FactorizedLayer))
    found = [kruskal.sensitivity([f.float() for f in own]).sum() for own in terms if own is not None]
    return torch.stack(found).sum() if found else torch.zeros(())
