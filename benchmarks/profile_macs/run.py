"""Hold ``tenfold.profile`` against counts that share no code with it.

    python -m benchmarks.profile_macs.run [--models FILE] [--out FOLDER]

Three counts per network: the profile; torch's flop counter / 2 with the kernels switched off that it cannot see into
(the fused transformer layer, oneDNN's recurrent layers, fused attention), done here by other means than in the profile;
and the flop counter / 2 as it comes, to show what those kernels hide. Recurrent networks are counted by hand as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.zoo import Subject, build
from tenfold.profiling import profile

HERE = Path(__file__).parent
COLUMNS = ("layers", "other", "macs", "counter_half", "equal", "counter_half_as_it_comes", "by_hand")

HEAD = """\
# MACs of a profile against torch's flop counter

`python -m benchmarks.profile_macs.run` on {made}. Batch 1; 224 pixels unless a size is given.

| network | params | in layers | other | **profile** | counter / 2 | equal | counter / 2 as it comes | by hand |
|---|---:|---:|---:|---:|---:|:-:|---:|---:|
"""
FOOT = """\
*counter / 2*: half of `FlopCounterMode`'s total with three kinds of fused kernel switched off, in which it sees
nothing: the fast path of transformer layers (`torch.backends.mha.set_fastpath_enabled(False)`), oneDNN's LSTM
(`torch.backends.mkldnn.flags(enabled=False)`), and fused attention on the CPU (`sdpa_kernel(SDPBackend.MATH)`).
*As it comes*: the same counter with torch's own choice of kernels. *By hand*: closed form of the recurrent networks.
The profile switches off the fast path only, and has formulas for the other two kernels; what they add is listed as
`fused_macs` in the JSON file. """


def main() -> None:
    """Count every network of the YAML file and write JSON and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE / "models.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    rows = []
    environment: dict[str, Any] = {}
    for wanted in yaml.safe_load(options.models.read_text())["models"]:
        row, environment = compare(wanted)
        rows.append(row)
        print(f"{row['name']:45} {row['macs']:>15,} {'equal' if row['equal'] else 'DIFFERENT'}", flush=True)
    result = {"benchmark": "profile_macs", "rows": rows, "environment": environment}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "profile_macs.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "profile_macs.md").write_text(table(result))
    if not all(row["equal"] for row in rows):
        raise SystemExit(1)


def compare(wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return one row of the table and the environment that it was made in."""
    subject = build(**wanted)
    start = time.perf_counter()
    cost = profile(subject.model, subject.inputs)
    seconds = time.perf_counter() - start
    counted = flops(subject, plain=True)
    by_hand = recurrent_macs(subject)
    extra = ", ".join(f"{k}={v}" for k, v in wanted.items() if k != "name")
    row = {
        "name": subject.name + (f" ({extra})" if extra else ""),
        "input_shapes": [list(s) for s in cost.input_shapes],
        "params": cost.params,
        "params_equal": cost.params == sum(p.numel() for p in subject.model.parameters()),
        "layers": sum(layer.macs for layer in cost.layers),
        "other": cost.other_macs,
        "macs": cost.macs,
        "counter_half": counted // 2 if counted % 2 == 0 else counted / 2,
        "equal": 2 * cost.macs == counted and by_hand in (None, cost.macs),
        "counter_half_as_it_comes": flops(subject, plain=False) // 2,
        "by_hand": by_hand,
        "fused_macs": cost.fused_macs,
        "uncounted": cost.uncounted,
        "odd_notes": [layer.path for layer in cost.layers if "flop counter saw" in layer.note],
        "seconds": round(seconds, 3),
    }
    return row, json.loads(cost.environment.to_json())


def flops(subject: Subject, *, plain: bool) -> int:
    """Return what torch's flop counter finds, with or without the kernels that it cannot see into."""
    args, kwargs = ((), subject.inputs) if isinstance(subject.inputs, dict) else ((subject.inputs,), {})
    with torch.no_grad(), plain_kernels() if plain else nullcontext(), FlopCounterMode(display=False) as counter:
        subject.model(*args, **kwargs)
    return int(counter.get_total_flops())


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Keep torch from choosing fused kernels."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def recurrent_macs(subject: Subject) -> int | None:
    """Return the MACs of an LSTM or GRU by hand: gates x hidden x (input + hidden) per step, layer and direction."""
    model = subject.model
    if not isinstance(model, nn.LSTM | nn.GRU):
        return None
    gates = 4 if isinstance(model, nn.LSTM) else 3
    directions = 2 if model.bidirectional else 1
    hidden = model.hidden_size
    widths = [model.input_size] + [directions * hidden] * (model.num_layers - 1)
    batch, length, _ = subject.inputs.shape
    return int(batch * length) * sum(directions * gates * hidden * (width + hidden) for width in widths)


def table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    env = result["environment"]
    made = (
        f"{env['device_name'] or env['device']}, torch {env['torch']}, Python {env['python']}, {env['threads']} threads"
    )
    lines = [HEAD.format(made=made).rstrip()]
    for row in result["rows"]:
        cells = [f"{row[c]:,}" if isinstance(row[c], int | float) else "" for c in COLUMNS if c != "equal"]
        cells.insert(COLUMNS.index("equal"), "yes" if row["equal"] else "**no**")
        lines.append(f"| {row['name']} | {row['params']:,} | {' | '.join(cells)} |")
    missed = {op for row in result["rows"] for op in row["uncounted"]}
    lines += ["", FOOT + f"Operations left uncounted: {', '.join(sorted(missed)) or 'none'}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
