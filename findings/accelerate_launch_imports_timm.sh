#!/usr/bin/env bash
# The command `accelerate` imports timm, and so torchvision, before it looks at its arguments: only `estimate-memory` uses
# them. Where timm is installed beside a torchvision that does not fit torch, `accelerate launch` of any script ends with an
# error of torchvision's operators. `python -m accelerate.commands.launch`, with the same arguments, imports neither.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 accelerate==1.15.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps timm==1.0.31 torchvision==0.28.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import subprocess
import sys

import accelerate
import torch

print("torch", torch.__version__, "accelerate", accelerate.__version__, "timm 1.0.31, torchvision 0.28.0")


def run(module: str) -> tuple[bool, bool]:
    """Return whether importing the command imports timm and torchvision."""
    # What fails while it is imported is no longer among the modules: the finder is asked instead.
    code = (
        "import sys\nseen = set()\nclass Seen:\n    def find_spec(self, name, path=None, target=None):\n"
        "        seen.add(name.partition('.')[0])\nsys.meta_path.insert(0, Seen())\n"
        f"try:\n    import {module}\nexcept BaseException as e:\n    print('ended with', type(e).__name__ + ':', str(e)[:60])\n"
        "print('timm' in seen, 'torchvision' in seen)"
    )
    lines = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True).stdout.split("\n")
    print(module, "->", "; ".join(line for line in lines if line))
    first, second = lines[-2].split()
    return first == "True", second == "True"


assert run("accelerate.commands.accelerate_cli") == (True, True)
assert run("accelerate.commands.launch") == (False, False)
PY
