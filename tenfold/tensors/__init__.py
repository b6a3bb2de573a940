"""Pure functions of tensors, without formats, layers or models."""

from tenfold.tensors import kruskal, rings, trains
from tenfold.tensors.algebra import (
    SVDMethod,
    TruncatedSVD,
    fold,
    gram,
    khatri_rao,
    leading_eigenpairs,
    leading_eigenvectors,
    mode_product,
    rel_error,
    singular_values,
    symmetrize_,
    truncated_svd,
    unfold,
)
from tenfold.tensors.arithmetic import normal_tensors, plain_arithmetic, squarable, untransformed
from tenfold.tensors.digests import digest, version_of
from tenfold.tensors.modes import Modes, mode_factors
from tenfold.tensors.skeleton import dominant_rows

__all__ = [
    "Modes",
    "SVDMethod",
    "TruncatedSVD",
    "digest",
    "dominant_rows",
    "fold",
    "gram",
    "khatri_rao",
    "kruskal",
    "leading_eigenpairs",
    "leading_eigenvectors",
    "mode_factors",
    "mode_product",
    "normal_tensors",
    "plain_arithmetic",
    "rel_error",
    "rings",
    "singular_values",
    "squarable",
    "symmetrize_",
    "trains",
    "truncated_svd",
    "unfold",
    "untransformed",
    "version_of",
]
