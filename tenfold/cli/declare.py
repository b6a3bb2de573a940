"""One option of the shell from one field of a record: its type, its flags, and its help."""

from __future__ import annotations

import inspect
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from tenfold.cli.values import Text, completion

_SHORT = {"task": "-t", "budget": "-b", "formats": "-f", "out": "-o", "quiet": "-q", "verbose": "-v", "jobs": "-j"}
_METAVARS = {int: "N", float: "X", Path: "FILE", list[Path]: "FILE"}


def option(name: str, info: FieldInfo, about: str, panel: str, *, both: bool = False) -> inspect.Parameter:
    """Return the parameter of a command that gives a field; None where it is not given, whatever the default is.

    Args:
        name: of the parameter, and of the option unless the field has an alias.
        info: the field; a text among its annotations is shown for the value.
        about: its help.
        panel: heading that it is shown under.
        both: whether what is false by default can be denied too, as a file may say otherwise.
    """
    kind, shown = type_of(info.annotation), info.alias or name
    flags = _flags(shown)
    if kind is bool and (both or info.default is not False):
        flags = (f"{flags[0]}/--no-{flags[0][2:]}",)
    metavar = next((mark for mark in info.metadata if isinstance(mark, str)), _METAVARS.get(kind, shown.upper()))
    declared = typer.Option(
        *flags,
        metavar=None if kind is bool or get_origin(kind) is Literal else metavar,
        help=about,
        rich_help_panel=panel,
        show_default=False if info.is_required() or info.default in (None, False, True, ()) else str(info.default),
        autocompletion=completion(shown),
    )
    if info.is_required():
        return keyword(name, Annotated[kind, declared])
    return keyword(name, Annotated[kind | None, declared], None)


def text_option(name: str, text: Text, panel: str) -> inspect.Parameter:
    """Return the parameter of a command for an option that is written as text."""
    declared = typer.Option(
        *_flags(name),
        metavar=text.metavar,
        help=text.help,
        rich_help_panel=panel,
        show_default=False,
        autocompletion=completion(name),
    )
    return keyword(name, Annotated[text.kind | None, declared], None)


def argument(parameter: inspect.Parameter, hint: Any, about: str) -> inspect.Parameter:
    """Return the parameter of a command for an argument without a name."""
    metavar = parameter.name.upper() + ("..." if get_origin(hint) is list else "")
    shown = None if get_origin(type_of(hint)) is Literal else metavar
    declared = typer.Argument(metavar=shown, help=about, show_default=False)
    return keyword(parameter.name, Annotated[hint, declared], parameter.default)


def keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """Return a keyword parameter."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def type_of(annotation: Any) -> Any:
    """Return the type of an option for a field of this type; its bounds are left to the record.

    Example:
        >>> [type_of(kind) for kind in (Annotated[int, "N"] | None, tuple[str, ...], bool | Literal["auto"])]
        [<class 'int'>, list[str], <class 'str'>]
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(parts[0])
    if origin in (Union, types.UnionType):
        several = [part for part in parts if part is not type(None)]
        return type_of(several[0]) if len(several) == 1 else str
    return list[parts[0]] if origin in (tuple, list) else annotation  # type: ignore[valid-type]


def documented(doc: str, section: str) -> dict[str, str]:
    r"""Return what a section such as ``Attributes`` or ``Args`` of a docstring says, by name.

    Example:
        >>> documented("Area.\n\nAttributes:\n    width: of the ``thing``,\n        in metres.", "Attributes")
        {'width': 'Of the `thing`, in metres.'}
    """
    entries = inspect.cleandoc(doc).partition(f"\n{section}:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", entries, flags=re.MULTILINE)
    texts = {name: " ".join(text.split()).replace("``", "`") for name, text in found}
    return {name: text[:1].upper() + text[1:] for name, text in texts.items()}


def _flags(name: str) -> tuple[str, ...]:
    flag = f"--{name.replace('_', '-')}"
    return (flag, _SHORT[name]) if name in _SHORT else (flag,)
