"""A broken law, and its message: which law, by whom, where, and what was seen instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LAWS = {
    1: "full rank is exact",
    2: "the error never grows with rank",
    3: "num_params is what is counted",
    4: "macs is half of torch's flop counter",
    5: "the layer equals the dense layer that holds to_dense()",
    6: "the error is within the bounds of the dropped singular values",
    7: "same seed, same bytes",
    8: "plans and checkpoints round-trip",
    9: "a rule returns 1 ≤ rank ≤ max_rank and never a layer that grows",
    10: "a budget is met within one rank step",
    11: "apply leaves its input untouched",
    12: "planning a factorized model goes further, and is idempotent at its fixed point",
    13: "exported output equals eager",
    14: "odd weights give a right answer or a clear error",
    15: "what is known of the inputs makes the outputs better, in each group by itself",
}


class LawBroken(AssertionError):  # noqa: N818 - it is no error of tenfold's, but the news that one was found
    """A law of tenfold that an entry does not obey."""


@contextmanager
def law(number: int, *where: object) -> Iterator[None]:
    """Name the law and the place in whatever goes wrong inside.

    Example:
        >>> with law(3, "my_format", "conv2d"):
        ...     expect(1 == 2, "counted 2 parameters, not 1")
        Traceback (most recent call last):
        tenfold.testing.laws.LawBroken: law 3 (num_params is what is counted), my_format, conv2d: counted 2 ...
    """
    head = ", ".join([f"law {number} ({LAWS[number]})", *(str(w) for w in where)])
    try:
        yield
    except LawBroken as error:
        msg = f"{head}: {error}"
        raise LawBroken(msg) from error
    except Exception as error:
        msg = f"{head}: raised {type(error).__name__}: {error}"
        raise LawBroken(msg) from error


def expect(kept: bool, seen: str) -> None:  # noqa: FBT001 - reads as a sentence
    """Raise LawBroken with what was seen unless the law was ``kept``."""
    if not kept:
        raise LawBroken(seen)


def expect_close(name: str, found: Tensor, wanted: Tensor, tol: float) -> None:
    """Raise LawBroken unless two tensors have one shape and differ by at most ``tol`` of the larger of them."""
    expect(found.shape == wanted.shape, f"{name} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    if not wanted.numel():
        return
    found, wanted = found.detach().double(), wanted.detach().double()
    expect(bool(torch.isfinite(found).all()), f"{name} is not finite")
    size = max(float(wanted.abs().max()), float(found.abs().max()))
    apart = float((found - wanted).abs().max())
    expect(apart <= tol * size, f"{name} is off by {apart:.3g} where its largest entry is {size:.3g}")
