"""How near each format comes to trained kernels with the multiplications of a share of the dense layer.

    python -m benchmarks.equal_macs.run --weights FOLDER [--config FILE] [--out FOLDER]

FOLDER holds the weights of a trained network in the file that the configuration names. Each format takes the rank of
most multiplications within the share: equal on both sides for Tucker-2, of its family for the train, on the line of one
closing bond or number of blocks for rings and blocks. Its default algorithm at its defaults finds the factors, from the
weight alone, in float64. *Terms* are √Σ‖term‖²/‖W‖ of what is summed (blocks, slices of the closing bond, rank-one
terms): 1 where they are orthogonal, more where they cancel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tenfold.decompositions import decompose
from tenfold.formats import FORMATS, Factorization, Rank
from tenfold.profiling import environment
from tenfold.records import LayerSpec

HERE = Path(__file__).parent
Row = dict[str, Any]


def main() -> None:
    """Fit all kernels of the YAML file in all formats; write JSON and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "equal_macs.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    state = load_file(options.weights / config["kernels"]["file"])
    rows = []
    for name in config["kernels"]["layers"]:
        weight = state[f"{name}.weight"].double()
        for share in config["shares"]:
            for case in config["formats"]:
                row = fitted(weight, share, config["size"], **case)
                if row is not None:
                    rows.append({"layer": name, "share": share, **row})
                    print(json.dumps(rows[-1]), flush=True)
    result = {"benchmark": "equal_macs", "config": config, "rows": rows}
    result["environment"] = json.loads(environment(torch.device("cpu")).to_json())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "equal_macs.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "equal_macs.md").write_text(table(result))
    print(table(result))


def fitted(weight: Tensor, share: float, size: int, format: str, first: int | None = None) -> Row | None:
    """Return what the format comes to at the rank of most multiplications within the share; None where none is."""
    out, inner, *kernel = weight.shape
    padding = tuple(k // 2 for k in kernel)
    spec = LayerSpec(kind="conv", in_channels=inner, out_channels=out, kernel=tuple(kernel), padding=padding)
    kind, shape = FORMATS.get(format), (1, inner, size, size)
    dense = spec.macs(shape)
    ranks = [rank for rank in line(kind, spec, first) if kind.macs(spec, rank, shape) <= share * dense]
    if not ranks:
        return None
    rank = max(ranks, key=lambda r: kind.macs(spec, r, shape))
    fit = decompose(weight, format, rank, spec=spec)
    return {
        "format": format,
        "rank": rank,
        "params": kind.num_params(spec, rank) / spec.num_params,
        "macs": kind.macs(spec, rank, shape) / dense,
        "rel_error": fit.rel_error,
        "sweeps": fit.n_iter,
        "terms": spread(fit.value, weight),
    }


def line(kind: type[Factorization], spec: LayerSpec, first: int | None) -> Iterator[Rank]:
    """Iterate over the ranks among which to choose."""
    most = kind.max_rank(spec)
    if first is None and kind.name() != "tucker2":
        yield from kind.rank_family(spec)
        return
    names = kind.rank_names[-2:]
    for r in range(1, max(most.values()) + 1):
        sides = {name: min(r, most[name]) for name in names}
        yield sides if first is None else {kind.rank_names[0]: first, **sides}


def spread(value: Factorization, weight: Tensor) -> float | None:
    """Return √Σ‖term‖²/‖W‖ of formats that are sums of terms."""
    if value.name() == "block_term":
        terms = torch.einsum("gcoa,gcabx,gcib->gcoxi", value.out_factor, value.core.flatten(4), value.in_factor)  # type: ignore[attr-defined]
    elif value.name() == "tensor_ring":
        outer, middle, inner = value.cores  # type: ignore[attr-defined]
        terms = torch.einsum("gaob,gbkc,gcia->gaoki", outer, middle, inner)
    elif value.terms() is not None:
        terms = torch.einsum("gor,gir,gkr->groik", *value.terms())  # type: ignore[misc]
    else:
        return None
    return float(torch.linalg.vector_norm(terms) / torch.linalg.vector_norm(weight))


def table(result: Row) -> str:
    """Return one table of errors, a row for each format, and one of what else there is to know."""
    config, rows = result["config"], result["rows"]
    cases = [(name, share) for name in config["kernels"]["layers"] for share in config["shares"]]
    seen = result["environment"]
    head = (
        f"`python -m benchmarks.equal_macs.run --weights FOLDER` on {seen['device']}, torch {seen['torch']}. Relative "
        "errors ‖W − Ŵ‖/‖W‖ of kernels of a trained ResNet-56 with at most so many of the dense layer's "
        "multiplications; the parameters are shares too, the most at 0.35; *terms* is the largest √Σ‖term‖²/‖W‖."
    )
    lines = [
        "# Formats at equal multiplications",
        "",
        head,
        "",
        "| format | " + " | ".join(f"{name} {share}" for name, share in cases) + " | params | terms |",
        "| --- |" + " ---: |" * (len(cases) + 2),
    ]
    for case in config["formats"]:
        own = [r for r in rows if r["format"] == case["format"] and _first(r) == case.get("first")]
        errors = {(r["layer"], r["share"]): f"{r['rel_error']:.3f}" for r in own}
        params = max(r["params"] for r in own if r["share"] == 0.35)
        terms = [r["terms"] for r in own if r["terms"] is not None]
        name = case["format"] + (f" {case['first']}" if "first" in case else "")
        most = f"{max(terms):.2f}" if terms else ""
        lines.append(f"| {name} | " + " | ".join(errors.get(at, "") for at in cases) + f" | {params:.3f} | {most} |")
    return "\n".join(lines) + "\n"


def _first(row: Row) -> int | None:
    names = FORMATS.get(row["format"]).rank_names
    return row["rank"][names[0]] if row["format"] in ("tensor_ring", "block_term") else None


if __name__ == "__main__":
    main()
