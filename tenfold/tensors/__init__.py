"""Pure functions of tensors, without formats, layers or models."""

from tenfold.tensors import kruskal
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
    truncated_svd,
    unfold,
)

__all__ = [
    "SVDMethod",
    "TruncatedSVD",
    "fold",
    "gram",
    "khatri_rao",
    "kruskal",
    "leading_eigenpairs",
    "leading_eigenvectors",
    "mode_product",
    "rel_error",
    "singular_values",
    "truncated_svd",
    "unfold",
]
