"""A format of one's own in one file: linear layers as sums of Kronecker products.

    python examples/kronecker.py

Nothing else has to be edited: the registry finds the format, the SVD that ships with tenfold finds its factors, rank
rules, plans and checkpoints use it, and the laws of ``tenfold.testing`` test it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Self

import torch
from torch import Tensor, nn

import tenfold
from tenfold.formats import FORMATS, MatrixFormat, Rank, Structure
from tenfold.records import ContractSpec, LayerSpec


@FORMATS.register("kronecker")
@dataclass(frozen=True, eq=False)
class Kronecker(MatrixFormat):
    """A sum of Kronecker products: W ≈ Σ_r A_r ⊗ B_r, run as two einsums.

    Van Loan & Pitsianis 1993: with the blocks of W as the rows of a matrix (out1·in1, out2·in2), each A_r ⊗ B_r is the
    outer product vec(A_r) vec(B_r)ᵀ. The best sum of R products is thus a truncated SVD.
    Parameters R·(out1·in1 + out2·in2), where out = out1·out2 and in = in1·in2 are the most balanced divisors.
    """

    a: Tensor  # (1, out1, in1, R)
    b: Tensor  # (1, R, out2, in2)

    @classmethod
    def sizes(cls, spec: LayerSpec) -> tuple[int, int, int, int]:
        """Return (out1, out2, in1, in2), the blocks about as many as each of them has entries."""
        out1, out2 = _balanced(spec.out_channels)
        in2, in1 = _balanced(spec.in_channels)
        return out1, out2, in1, in2

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason unless the layer is linear and its sizes have divisors."""
        if spec.kind != "linear":
            return "kronecker serves linear layers only"
        return super().unsupported_reason(spec)

    @classmethod
    def matrix_shape(cls, spec: LayerSpec) -> tuple[int, int]:
        """Return (out1·in1, out2·in2): the number of blocks and the size of a block."""
        out1, out2, in1, in2 = cls.sizes(spec)
        return out1 * in1, out2 * in2

    @classmethod
    def unfold(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return the rearranged weight (1, out1·in1, out2·in2): one row for each block."""
        out1, out2, in1, in2 = cls.sizes(spec)
        return weight.reshape(-1, out1, out2, in1, in2).transpose(2, 3).reshape(-1, out1 * in1, out2 * in2)

    @classmethod
    def from_matrices(cls, left: Tensor, right: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return A and B from the vectors of all A_r and B_r."""
        out1, out2, in1, in2 = cls.sizes(spec)
        rank = left.shape[-1]
        return {"a": left.reshape(-1, out1, in1, rank), "b": right.reshape(-1, rank, out2, in2)}

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return the vectors of all A_r as columns, and those of all B_r as rows."""
        return self.a.flatten(1, 2), self.b.flatten(2)

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return two einsums: all B_r along the inner half of the features, then all A_r along the outer one."""
        out1, out2, in1, in2 = cls.sizes(spec)
        r = rank["rank"]
        return (
            ContractSpec(modes=(in1, in2), equation="...xy,roy->...rxo", weight_shape=(r, out2, in2)),
            ContractSpec(
                modes=(r, in1, out2), equation="...rxo,pxr->...po", weight_shape=(out1, in1, r), bias=spec.bias
            ),
        )

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the weights of the two einsums."""
        del rank
        b, a = chain
        return cls(spec, a=a[None], b=b[None])

    def chain(self) -> tuple[Tensor, ...]:
        """Return the weights of the two einsums."""
        return self.b[0], self.a[0]

    @property
    def rank(self) -> Rank:
        """The number of products R."""
        return {"rank": self.b.shape[1]}

    def to_grouped(self) -> Tensor:
        """Return Σ_r A_r ⊗ B_r."""
        products = [torch.kron(a, b) for a, b in zip(self.a[0].unbind(-1), self.b[0], strict=True)]
        return torch.stack(products).sum(0, keepdim=True)


def _balanced(n: int) -> tuple[int, int]:
    """Return n as the product of two divisors, the smaller first, as near to each other as there are."""
    small = next(d for d in range(isqrt(n), 0, -1) if n % d == 0)
    return small, n // small


def kronecker_like(inner: int, out: int) -> nn.Linear:
    """Return a layer whose weight is nearly a sum of four Kronecker products, as a trained one's may be."""
    layer = nn.Linear(inner, out)
    spec, rank = LayerSpec(kind="linear", in_channels=inner, out_channels=out), {"rank": 4}
    factors = [torch.randn(stage.weight_shape) for stage in Kronecker.structure(spec, rank)]
    with torch.no_grad():
        made = Kronecker.from_stages(spec, rank, factors).to_dense()
        layer.weight.copy_(made / made.norm(dim=1, keepdim=True) + 0.002 * torch.randn_like(made))
    return layer


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        kronecker_like(144, 256), nn.ReLU(), kronecker_like(256, 256), nn.ReLU(), nn.Linear(256, 10)
    ).eval()
    x = torch.randn(64, 144)
    cost = tenfold.profile(model, x)
    recipe = tenfold.Recipe(rule={"name": "energy", "rel_error": 0.1}, keep="4")
    print(f"{'format':<12}{'params':>10}{'MACs':>14}{'output error':>15}")
    print(f"{'dense':<12}{cost.params:>10,}{cost.macs:>14,}{0:>15.1%}")
    for format in ("low_rank", "kronecker"):
        plan = tenfold.plan(model, cost, recipe.replace(formats=format))
        small = tenfold.apply(model, plan)
        with torch.no_grad():
            error = float((small(x) - model(x)).norm() / model(x).norm())
        after = tenfold.profile(small, x)
        assert after.cost == plan.after
        print(f"{format:<12}{after.params:>10,}{after.macs:>14,}{error:>15.1%}")
    for layer in plan.layers:
        print(f"{layer.path}: {layer.action} {layer.rank or ''} {layer.reason}")


if __name__ == "__main__":
    main()
