"""A page of the documentation as a script: its Python and its commands, line for line, in order.

python -m tests.page_script DIGITS.safetensors PAGE ...
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

STARTS = "page"  # begins the line that is printed before a page
BLOCK = re.compile(
    r"(?P<skip><!--\s*no-run.*?-->\s*\n)?^```(?P<kind>python|bash)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def as_script(text: str) -> str:
    """Return a page as a Python script with the same line numbers: commands go to ``shell``, prose is left out."""
    kept = [""] * (text.count("\n") + 1)
    kept[0] = "from tests.page_script import shell as _shell"
    for block in BLOCK.finditer(text):
        if block["skip"]:
            continue
        first, code = text.count("\n", 0, block.start("code")), block["code"].splitlines()
        if block["kind"] == "bash":  # the fences become the call
            kept[first - 1], kept[first + len(code)] = '_shell(r"""', '""")'
        kept[first : first + len(code)] = code
    return "\n".join(kept)


def shell(code: str) -> None:
    """Run the commands of a page in this process; the first that fails ends the script. What they install is there."""
    from tenfold.cli import main

    for line in code.replace("\\\n", " ").splitlines():
        match shlex.split(line, comments=True):
            case [] | ["pip", *_]:
                pass
            case ["tenfold", *args] if not set(line) & set("*?|><$;&`~"):
                if ended := main(args):
                    raise SystemExit(ended)
            case _:
                msg = f"not run without a shell: {line}"
                raise ValueError(msg)


def without_numbers(line: str) -> str:
    """Return a line of output such that other figures, and columns as wide as they make them, are no difference."""
    return re.sub(r"[+−±-]?[\d.,:]+(e-\d+)?", "0", re.sub(r"[─━\s]+", " ", line)).strip()


def run_pages(weights: Path, pages: list[Path]) -> None:
    """Run pages one after the other, each in a folder of its name, and print a line with the name before each.

    The network of the task ``digits`` has the weights of a file: without them every page would train it once more.
    """
    from tenfold.tasks.digits import Digits
    from tests.conftest import supply_torchvision_ops

    supply_torchvision_ops()
    Digits.pretrained = lambda task: task.dense(weights)  # type: ignore[method-assign]
    for page in pages:
        sys.stdout.write(f"{STARTS} {page.stem}\n")
        folder = Path(page.stem).absolute()
        folder.mkdir()
        os.chdir(folder)
        exec(compile(as_script(page.read_text(encoding="utf-8")), str(page), "exec"), {"__name__": "__main__"})  # noqa: S102
        os.chdir(folder.parent)


if __name__ == "__main__":
    run_pages(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
