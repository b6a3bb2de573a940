"""What is looked for in the syntax trees; each function returns the places that it found."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from benchmarks.house.source import PACKAGE, ROOT, File, Function

ORCHESTRATION = {"planning", "pipeline", "iterative", "training", "explorer", "integrations", "cli"}
MODES = {"TorchFunctionMode", "TorchDispatchMode"}
COMMANDS = "cli/commands/"


def widest_verbs(files: Sequence[File]) -> list[tuple[int, str]]:
    """Return the number of arguments of every public function and constructor, the most first.

    Public is what some ``__all__`` of the package names.
    """
    public = {name for file in files for name in _exported(file.tree)}
    public |= {name for stub in PACKAGE.rglob("*.pyi") for name in _exported(ast.parse(stub.read_text("utf-8")))}
    found = []
    for file in files:
        for name, function, owner in file.functions:
            if name in public or (owner is not None and owner.name in public and name == f"{owner.name}.__init__"):
                found.append((_arguments(function, method=owner is not None), f"{name.removesuffix('.__init__')}"))
    return sorted(found, reverse=True)


def _exported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            yield from (c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant))


def _arguments(function: Function, *, method: bool) -> int:
    """Return the number of named arguments, without ``self``, and one for each of ``*args`` and ``**kwargs``."""
    a = function.args
    return len(a.posonlyargs + a.args + a.kwonlyargs) - method + (a.vararg is not None) + (a.kwarg is not None)


def commented(files: Sequence[File], pattern: str) -> list[str]:
    """Return the lines that a regular expression is found in."""
    return [
        f"{file.name}:{number}"
        for file in files
        for number, line in enumerate(file.text.splitlines(), start=1)
        if re.search(pattern, line)
    ]


def max_args() -> int:
    """Return how many arguments ruff allows."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return int(settings["tool"]["ruff"]["lint"]["pylint"]["max-args"])


def passed_through(files: Sequence[File]) -> list[str]:
    """Return the functions of orchestration that hand an untyped ``**x: Any`` on, spread out or as a mapping.

    Wrappers of any call, which take ``*args`` too or are a decorator's result, are none.
    """
    found = []
    for file in files:
        if file.room not in ORCHESTRATION:
            continue
        wrappers = {id(f) for _, f, _ in file.functions if any("wraps(" in ast.unparse(d) for d in f.decorator_list)}
        for name, function, _ in file.functions:
            kwarg = function.args.kwarg
            untyped = kwarg is not None and kwarg.annotation is not None and ast.unparse(kwarg.annotation) == "Any"
            untyped = untyped and kwarg.arg != "unknown"  # transformers wants its configurations to take any keyword
            if not untyped or function.args.vararg is not None or id(function) in wrappers:
                continue
            if _handed_on(function, kwarg.arg):
                found.append(f"{file.name}:{function.lineno} {name}(**{kwarg.arg})")
    return found


def _handed_on(function: Function, name: str) -> bool:
    """Whether a mapping is used for more than to look one thing up, or to construct ``cls(...)``."""
    looked_up = {
        id(node.value)
        for node in ast.walk(function)
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr == "get")
    }
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "cls":
            looked_up |= {id(node) for node in ast.walk(call)}
    names = (node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name)
    return any(id(node) not in looked_up for node in names)


def smuggled(files: Sequence[File]) -> list[str]:
    """Return where a cache travels with the arguments: ``_cache`` of another object, ``memory`` in orchestration."""
    found = []
    for file in files:
        decides = file.room in ORCHESTRATION | {"allocation"}
        for node in file.nodes:
            if isinstance(node, ast.Attribute) and node.attr == "_cache":
                hit = not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
            elif isinstance(node, ast.keyword | ast.arg):
                hit = node.arg == "_cache" or (decides and node.arg == "memory")
            else:
                hit = decides and isinstance(node, ast.Constant) and node.value == "memory"
            if hit:
                found.append(file.where(node))
    return found


def data_flow_modes(files: Sequence[File]) -> list[str]:
    """Return the classes that see every call of torch, without those that only count work."""
    return [
        f"{file.name}:{node.lineno} {node.name}"
        for file in files
        for node in file.nodes
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).rpartition(".")[2] in MODES for base in node.bases)
        and file.path.stem != "counting"
    ]


def concrete_formats(files: Sequence[File]) -> list[str]:
    """Return where code outside formats/ asks which format it has: by ``isinstance``, ``is``, ``==``, ``in`` a table.

    The question ``serves``/``supports`` of an algorithm, or the ``formats`` that it declares, is what such a comparison
    is for.
    """
    formats = {
        node.name
        for file in files
        if file.room == "formats"
        for node in file.nodes
        if isinstance(node, ast.ClassDef) and any("FORMATS.register" in ast.unparse(d) for d in node.decorator_list)
    }
    found = []
    for file in files:
        if file.room == "formats":
            continue
        allowed = {
            id(node)
            for name, function, _ in file.functions
            if name.rpartition(".")[2] in {"serves", "supports"}
            for node in ast.walk(function)
        }
        allowed |= {id(node.value) for node in file.nodes if isinstance(node, ast.Assign) and _declares(node)}
        hits = [node for node in file.nodes if id(node) not in allowed and _asks(node, formats)]
        found += [file.where(node) for node in hits]
    return found


def _declares(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "formats" for target in node.targets)


def _asks(node: ast.AST, formats: set[str]) -> bool:
    if isinstance(node, ast.Compare):
        return bool(_named(node) & formats) or "FORMATS.get(" in ast.unparse(node)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in {"isinstance", "issubclass"}:
        return bool(_named(node.args[1]) & formats)
    if isinstance(node, ast.Dict):
        return any(key is not None and _named(key) & formats for key in node.keys)
    if isinstance(node, ast.Tuple | ast.Set | ast.List):  # a table to look a format up in
        return len(node.elts) > 1 and all(isinstance(e, ast.Name) and e.id in formats for e in node.elts)
    return False


def _named(node: ast.AST) -> set[str]:
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def stems_in_two_rooms(files: Sequence[File]) -> list[str]:
    """Return the file names that two rooms have, without ``base``, ``__init__``, ``__main__`` and commands' own."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for file in files:
        if not file.name.startswith(COMMANDS) and file.path.stem not in {"base", "__init__", "__main__"}:
            rooms[file.path.stem].add(file.room)
    return [f"{stem} ({', '.join(sorted(found))})" for stem, found in sorted(rooms.items()) if len(found) > 1]
