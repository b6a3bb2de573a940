"""The files of the package, parsed once."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tenfold"
_NOTHING = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class File:
    """One Python file of the package."""

    path: Path
    text: str = field(repr=False)

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the parsed file, walked once: every account asks for them."""
        return list(ast.walk(self.tree))

    @property
    def name(self) -> str:
        """The path below the package."""
        return self.path.relative_to(PACKAGE).as_posix()

    @property
    def room(self) -> str:
        """The top-level folder, or the stem of a file that is a room of its own."""
        return self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")

    @property
    def lines(self) -> int:
        """All lines."""
        return len(self.text.splitlines())

    @property
    def code_lines(self) -> int:
        """Lines without docstrings, blank lines, imports, and comments that have a line of their own."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        code = {n for t in tokens if t.type not in _NOTHING for n in range(t.start[0], t.end[0] + 1)}
        imports = (node for node in self.nodes if isinstance(node, ast.Import | ast.ImportFrom))
        return len(code.difference(*map(_span, [*imports, *self._docstrings])))

    @property
    def blank_docstring_lines(self) -> int:
        """Blank lines inside docstrings."""
        lines = self.text.splitlines()
        return sum(not lines[n - 1].strip() for node in self._docstrings for n in _span(node))

    @cached_property
    def _docstrings(self) -> list[ast.stmt]:
        return [node for node in self.nodes if isinstance(node, ast.Expr) and _is_text(node.value)]

    @cached_property
    def functions(self) -> list[tuple[str, Function, ast.ClassDef | None]]:
        """All functions and methods with their dotted names and the class around them."""
        return list(_functions(self.tree, "", None))

    def where(self, node: ast.AST) -> str:
        """Return file and line of a node."""
        return f"{self.name}:{getattr(node, 'lineno', 1)}"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _functions(
    node: ast.AST, prefix: str, owner: ast.ClassDef | None
) -> Iterator[tuple[str, Function, ast.ClassDef | None]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{prefix}{child.name}", child, owner
            yield from _functions(child, f"{prefix}{child.name}.", None)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.", child)
        else:
            yield from _functions(child, prefix, owner)


def package_files() -> list[File]:
    """Return all Python files of the package."""
    return [File(path, path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]
