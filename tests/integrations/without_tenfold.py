"""A process without tenfold that opens compressed folders and compares outputs: FOLDER NAME=AUTO_CLASS ..."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class _Absent:
    """Python finds no tenfold."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "tenfold":
            msg = "there is no tenfold here"
            raise ModuleNotFoundError(msg)


def conftest() -> ModuleType:
    """Return the conftest, which lets torchvision be imported; it knows no tenfold either."""
    spec = importlib.util.spec_from_file_location("conftest", Path(__file__).parents[1] / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    sys.meta_path.insert(0, _Absent())
    held = conftest()
    import transformers

    folder = Path(sys.argv[1])
    for name, auto in (word.split("=") for word in sys.argv[2:]):
        inputs, wanted = torch.load(folder / f"{name}.pt")
        opened = getattr(transformers, auto).from_pretrained(folder / name, trust_remote_code=True)
        base = transformers.AutoModel.from_pretrained(folder / name, trust_remote_code=True)
        opened.save_pretrained(folder / f"{name}-again")
        again = getattr(transformers, auto).from_pretrained(folder / f"{name}-again", trust_remote_code=True)
        with torch.no_grad():
            found = [opened(**inputs)[0], again(**inputs)[0]]
            part = getattr(opened, opened.base_model_prefix, None)  # the encoder in a classifier
            alike = part is None or torch.equal(base(**inputs)[0], part(**inputs)[0])
        equal = alike and all(torch.equal(f, wanted) for f in found)
        print(name, "equal" if equal else "different")  # noqa: T201 - what the test reads
    assert not any(loaded.startswith("tenfold") for loaded in sys.modules)
    del held


if __name__ == "__main__":
    main()
