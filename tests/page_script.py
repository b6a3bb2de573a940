"""A page of the documentation as a script: its Python and its commands, line for line, in order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

from tests.conftest import supply_torchvision_ops

# As for all tests: beside a torchvision of another build than torch, transformers does not import without them. What
# readers meet in that case, and what to do, is on docs/faq.md.
_torchvision_ops = supply_torchvision_ops()

BLOCK = re.compile(
    r"(?P<skip><!--\s*no-run.*?-->\s*\n)?^```(?P<kind>python|bash)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
# `tenfold` is that of the interpreter at work, whichever is on the path; what pages install is there already.
COMMANDS = 'tenfold() { "$PYTHON" -m tests.page_script "$@"; }\npip() { :; }\n'
DIGITS = "TENFOLD_TRAINED_DIGITS"  # names trained weights of the task ``digits``


def supply_trained_digits() -> None:
    """Have the task ``digits`` read its trained weights from the file that the environment names, if it names one."""
    if DIGITS in os.environ:
        from tenfold.tasks.digits import Digits

        Digits.pretrained = lambda task: task.dense(os.environ[DIGITS])  # type: ignore[method-assign]


supply_trained_digits()


def as_script(text: str) -> str:
    """Return a page as a Python script with the same line numbers: commands are given to bash, prose is left out."""
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
    """Run commands of a page; the first that fails ends the script.

    What is nothing but calls of ``tenfold`` runs in this process, which has imported what each of them needs.
    """
    calls = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    if all(call[:1] == ["tenfold"] for call in calls) and not set(code) & set("*?|><$;&`~"):
        from tenfold.cli import main

        for call in calls:
            if ended := main(call[1:]):
                raise SystemExit(ended)
        return
    own = os.environ | {"PYTHON": sys.executable}
    subprocess.run(["bash", "-euo", "pipefail", "-c", COMMANDS + code], check=True, env=own)  # noqa: S607


if __name__ == "__main__":
    from tenfold.cli import command

    command()
