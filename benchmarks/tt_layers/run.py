"""Count the parameters of TT layers as in the sources, and time them against tensorly-torch and dense layers.

    python -m benchmarks.tt_layers.run [--config FILE] [--out FOLDER] [--threads N] [--clock processor] [--compile]

tensorly-torch is needed by nothing else: pip install --no-deps tensorly-torch==0.5.0. Every round times every layer
once, forward and forward with backward, one after the other; ratios are medians of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tenfold.layers import TTGRU, TTLSTM, TTEmbedding, TTLinear
from tenfold.profiling.environment import environment

HERE = Path(__file__).parent
Row = dict[str, Any]

HEAD = """\
# Layers that are tensor trains

`python -m benchmarks.tt_layers.run --threads {threads} --clock {clock}{compile}` on {device}, torch {torch},
tensorly-torch 0.5.0, Python {python}, {threads} threads, float32, milliseconds of the {clock}. {rounds} rounds in
turns; load of the machine (1 min) between {low:.1f} and {high:.1f}, this benchmark included.

## Parameters, as in the sources

| layer | modes | parameters | times fewer | source |
|---|---|---:|---:|---:|
"""
TIMES = """
## {title}

| modes | ids | pass | tenfold ms | tensorly-torch ms | dense ms | × tensorly-torch (10–90 %) | × dense |
|---|---|---|---:|---:|---:|---:|---:|
"""


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "layers.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: on a busy machine")
    parser.add_argument("--compile", action="store_true", help="lookups of tenfold under torch.compile")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text()) | {"clock": options.clock, "compile": options.compile}
    torch.set_num_threads(options.threads)
    torch.manual_seed(config["seed"])
    loads = [os.getloadavg()[0]]
    result: Row = {"benchmark": "tt_layers", "config": config, "counts": counts(config)}
    for name, measured in (("embedding", embeddings), ("linear", linears)):
        result[name] = measured(config)
        loads.append(os.getloadavg()[0])
    result |= {"load": loads, "environment": json.loads(environment(torch.device("cpu")).to_json())}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tt_layers.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "tt_layers.md").write_text(table(result))
    print(table(result))


def counts(config: Row) -> list[Row]:
    """Return the parameters of the sources' layers."""
    rows = []
    for name, words, columns, rank, row_modes, col_modes, printed in config["counts"]:
        layer = TTEmbedding(words, columns, rank, row_modes=row_modes, col_modes=col_modes)
        params = sum(p.numel() for p in layer.parameters())
        modes = f"{_times(row_modes)} by {_times(col_modes)}"
        rows.append(_count(f"embedding, {name}", modes, params, words * columns, f"{printed}×"))
    own = config["recurrent"]
    kinds: list[tuple[Any, int]] = [(TTGRU, 3232), (TTLSTM, 3360)]
    for kind, printed in kinds:
        net = kind(
            own["inputs"],
            own["hidden"],
            ranks=own["ranks"],
            in_modes=own["in_modes"],
            hidden_modes=own["hidden_modes"],
        )
        params = sum(core.numel() for core in net.cells[0].ih.cores)
        modes = f"{_times(own['in_modes'])} to {_times(own['hidden_modes'])}"
        dense = net.gates * own["inputs"] * own["hidden"]
        rows.append(_count(f"{kind.__name__}, inputs, UCF11", modes, params, dense, f"{printed:,} parameters"))
    return rows


def _count(layer: str, modes: str, params: int, dense: int, source: str) -> Row:
    return {"layer": layer, "modes": modes, "params": params, "ratio": dense / params, "source": source}


def embeddings(config: Row) -> list[Row]:
    """Return the times of lookups."""
    own = config["embedding"]
    words, columns = own["rows"], own["columns"]
    generator = torch.Generator().manual_seed(config["seed"])
    weights = {"distinct": torch.ones(words), "words": 1 / torch.arange(1.0, words + 1)}
    dense = nn.Embedding(words, columns)
    rows = []
    for row_modes, col_modes in own["modes"]:
        from tltorch import FactorizedEmbedding

        other = FactorizedEmbedding(
            words,
            columns,
            rank=own["rank"],
            auto_tensorize=False,
            tensorized_num_embeddings=tuple(row_modes),
            tensorized_embedding_dim=tuple(col_modes),
        )
        other.reset_parameters()
        layer = TTEmbedding(words, columns, own["rank"], row_modes=row_modes, col_modes=col_modes)
        for name in own["ids_are"]:
            ids = torch.multinomial(weights[name], own["ids"], replacement=name == "words", generator=generator)
            ours = torch.compile(layer) if config["compile"] else layer
            layers = {"tenfold": ours, "tensorly": other, "dense": dense}
            about = {"modes": f"{_times(row_modes)} by {_times(col_modes)}", "ids": name, "distinct": len(ids.unique())}
            rows += timed(layers, ids, config, about)
    return rows


def linears(config: Row) -> list[Row]:
    """Return the times of linear layers."""
    own = config["linear"]
    size = own["features"]
    dense = nn.Linear(size, size)
    x = torch.randn(own["batch"], size, requires_grad=True)
    rows = []
    for modes in own["modes"]:
        from tltorch import FactorizedLinear

        other = FactorizedLinear(tuple(modes), tuple(modes), rank=own["rank"], factorization="blocktt")
        layer = TTLinear(size, size, own["rank"], in_modes=modes, out_modes=modes)
        macs = layer.macs(own["batch"]) / (own["batch"] * size**2)
        about = {"modes": _times(modes), "ids": "", "macs": macs}
        rows += timed({"tenfold": layer, "tensorly": other, "dense": dense}, x, config, about)
    return rows


def timed(layers: dict[str, nn.Module], x: Tensor, config: Row, about: Row) -> list[Row]:
    """Return the milliseconds of all layers, round by round, forward and with backward."""
    rows, rounds = [], config["rounds"]
    clock = time.process_time if config["clock"] == "processor" else time.perf_counter
    with torch.no_grad():
        shape = next(iter(layers.values()))(x).shape
    weighting = torch.randn(shape)
    passes: dict[str, Callable[[nn.Module], object]] = {
        "forward": lambda layer: _forward(layer, x),
        "and backward": lambda layer: layer(x).backward(weighting),
    }
    for name, once in passes.items():
        for layer in layers.values():
            once(layer)
        times: dict[str, list[float]] = {way: [] for way in layers}
        for _ in range(rounds):
            for way, layer in layers.items():
                layer.zero_grad()
                start = clock()
                once(layer)
                times[way].append((clock() - start) * 1e3)
        rows.append(about | {"pass": name, "ms": times})
        print({k: v for k, v in rows[-1].items() if k != "ms"}, {k: statistics.median(v) for k, v in times.items()})
    return rows


@torch.no_grad()
def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out


def table(result: Row) -> str:
    """Return the Markdown page."""
    env = result["environment"]
    page = HEAD.format(
        device=env["device"],
        torch=env["torch"],
        python=env["python"],
        threads=env["threads"],
        rounds=result["config"]["rounds"],
        clock=result["config"]["clock"],
        compile=" --compile" if result["config"]["compile"] else "",
        low=min(result["load"]),
        high=max(result["load"]),
    )
    for row in result["counts"]:
        page += f"| {row['layer']} | {row['modes']} | {row['params']:,} | {row['ratio']:.1f} | {row['source']} |\n"
    own, linear = result["config"]["embedding"], result["config"]["linear"]
    titles = {
        "embedding": f"Lookup of {own['ids']:,} ids in {own['rows']:,}×{own['columns']}, rank {own['rank']}",
        "linear": f"Linear {linear['features']}→{linear['features']}, rank {linear['rank']}, batch {linear['batch']}",
    }
    for name, title in titles.items():
        page += TIMES.format(title=title)
        for row in result[name]:
            page += _line(row)
    return page + FOOT


FOOT = """
*× tensorly-torch*, *× dense*: how many times faster, medians of the ratios of the rounds. *distinct*: drawn evenly and
without repetition; *words*: drawn as words are, the k-th most frequent with a weight of 1/k; in brackets how many ids
are different ones. *of their time*: over the time that as many multiply-accumulates take in the dense layer. On a busy
machine only the time of the processor means something.
"""


def _line(row: Row) -> str:
    ms = row["ms"]
    against = statistics.median(t / own for t, own in zip(ms["dense"], ms["tenfold"], strict=True))
    cells = [row["modes"], f"{row['ids']} ({row['distinct']:,})" if row["ids"] else _macs(row["macs"], against)]
    cells += [row["pass"], *(f"{statistics.median(ms[way]):.2f}" for way in ("tenfold", "tensorly", "dense"))]
    ratios = sorted(t / own for t, own in zip(ms["tensorly"], ms["tenfold"], strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    cells += [f"{statistics.median(ratios):.1f} ({low:.1f}–{high:.1f})"]
    cells += [f"{against:.2f}"]
    return f"| {' | '.join(cells)} |\n"


def _macs(share: float, faster: float) -> str:
    return f"{share:.2f} of the MACs, in {1 / (faster * share):.2f} of their time"


def _times(modes: list[int]) -> str:
    return "×".join(map(str, modes))


if __name__ == "__main__":
    main()
