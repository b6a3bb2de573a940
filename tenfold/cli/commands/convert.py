"""tenfold convert: weights of torch.save as safetensors."""

from __future__ import annotations

from pathlib import Path

from tenfold.cli.terminal import Terminal

ORDER = 58


def run(source: Path, out: Path, /, terminal: Terminal, *, key: str | None = None, overwrite: bool = False) -> None:
    """Write the weights in a file of torch.save (.pth, .pt, .bin) as safetensors, without running its code.

    tenfold convert resnet50.pth resnet50.safetensors

    A state dict that is nested under one of the usual names, such as state_dict or model, is found; the prefixes that
    DataParallel and torch.compile put before names are taken off; what is no tensor is left out and named.

    With --json, one object: `out`, `tensors` (how many), `parameters` (numbers in all of them), `key` (where they
    were), `dropped`.

    Args:
        source: the file to read.
        out: the .safetensors file to write.
        terminal: what to show.
        key: where in the file the state dict is, such as ema or checkpoint.model; by default where it usually is.
        overwrite: write over a file that is there.
    """
    from tenfold.checkpoint.state_dicts import read_state_dict, write_state_dict
    from tenfold.errors import FileError
    from tenfold.files import check_writable

    if out.exists() and not overwrite:
        msg = f"{out} exists: choose another file, or say --overwrite"
        raise FileError(msg)
    check_writable(out)
    terminal.step("read")
    found = read_state_dict(source, key=key)
    write_state_dict(found.tensors, out)
    numbers = sum(t.numel() for t in found.tensors.values())
    where = f", from its {found.key}" if found.key else ""
    terminal.say(f"Written to {out}: {len(found.tensors)} tensors, {numbers:,} numbers{where}")
    if found.dropped:
        terminal.say(f"Left out, as it is no tensor of the state dict: {', '.join(found.dropped)}")
    terminal.result(
        {
            "out": str(out),
            "tensors": len(found.tensors),
            "parameters": numbers,
            "key": found.key,
            "dropped": list(found.dropped),
        }
    )
