"""Cache keys for sensitivity measurements."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tenfold import tensors
from tenfold.decompositions import Moments
from tenfold.planning.measuring import Bench
from tenfold.planning.substituting import digest
from tenfold.records import SensitivityKey
from tenfold.tracing.inputs import batch_size_of, digest_batches


def conditions_of(
    bench: Bench, formats: Mapping[str, Sequence[str]], about: Mapping[str, str | int | float | None]
) -> SensitivityKey:
    """Return all that measurements on a bench depend on; goes through the batches once.

    Args:
        bench: where layers are replaced.
        formats: in which each layer may be, by path.
        about: what the scores depend on besides.
    """
    return SensitivityKey(
        model=digest(bench.model),
        samples=_samples(bench.batches),
        data="" if bench.batches is None else digest_batches(bench.batches),
        seed=bench.seed,
        batchnorm=bench.batchnorm,
        moments=_digest_moments(bench.moments),
        algorithms=_algorithms(bench, formats),
        about=dict(about),
    )


def _samples(batches: Iterable[Any] | None) -> int:
    """Return how many calibration samples there are."""
    if batches is None:
        return 0
    known = getattr(batches, "samples", None)
    return int(known) if known is not None else sum(batch_size_of(batch) or 0 for batch in batches)


def _digest_moments(moments: Mapping[str, Moments]) -> str:
    """Return what tells moments by path from all others; an empty text for none."""
    each = [f"{path} {moments[path].digest()}" for path in sorted(moments)]
    return tensors.digest({}, "\n".join(each)) if each else ""


def _algorithms(bench: Bench, formats: Mapping[str, Sequence[str]]) -> dict[str, tuple[dict[str, Any], ...]]:
    """Return all algorithms in use, by format, as they are read from JSON."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path, own in formats.items():
        for format in own:
            settings = json.loads(json.dumps(bench.algorithm(path, format).to_dict()))
            known = found.setdefault(format, [])
            known += [settings] if settings not in known else []
    return {format: tuple(sorted(known, key=str)) for format, known in found.items()}
