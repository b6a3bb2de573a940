"""A page of the documentation as a script: its Python and its commands, line for line, in order."""

from __future__ import annotations

import re
import shlex

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
