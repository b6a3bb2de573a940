"""Notebooks, run without a kernel: their cells in one namespace, with what each shows.

    python -m tests.notebook FILE --write

Writes what the cells show into the file.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

Outputs = list[dict[str, Any]]


def cells(file: Path) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    return [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run(file: Path) -> list[Outputs]:
    """Return what each code cell shows, as notebooks store it: printed text, and the value of a last expression."""
    space: dict[str, Any] = {"__name__": "__main__"}
    return [_run(cell, number, space) for number, cell in enumerate(cells(file), 1)]


def _run(cell: dict[str, Any], number: int, space: dict[str, Any]) -> Outputs:
    body, name = ast.parse("".join(cell["source"])).body, f"cell {number}"
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    value: Any = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), name, "exec"), space)  # noqa: S102 - cells of this repository
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), space)  # noqa: S307 - the same
    shown: Outputs = []
    if text := printed.getvalue():
        shown.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        shown.append({"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}})
    return shown


def write(file: Path) -> None:
    """Write into a notebook what its cells show."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, shown) in enumerate(zip(code, run(file), strict=True), 1):
        cell |= {"outputs": shown, "execution_count": number}
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[2:] != ["--write"]:
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]))
