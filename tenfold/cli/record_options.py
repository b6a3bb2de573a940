"""Options made from the fields of records: a command takes records, and the shell sees their fields."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from tenfold.cli.terminal import Options, Terminal
from tenfold.cli.values import TEXTS, Text, completion
from tenfold.errors import TenfoldError
from tenfold.records import Record

_SHORT = {"task": "-t", "budget": "-b", "formats": "-f", "out": "-o", "quiet": "-q", "jobs": "-j"}


@dataclass(frozen=True)
class Fields:
    """How a record among the parameters of a command becomes options, as in ``Annotated[Recipe, Fields("Recipe")]``.

    Attributes:
        panel: heading in the help; the first line of the record's documentation if empty.
        only: fields that are options; all if empty.
        without: fields that are none.
        file: an option of the name of the parameter reads the record from a file, and single options change it.
    """

    panel: str = ""
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    file: bool = False


@dataclass(frozen=True)
class _Option:
    """One option: the place of its value in the record, and how it is declared."""

    path: tuple[str, ...]
    declared: inspect.Parameter
    text: Text | None = None


@dataclass(frozen=True)
class _Group:
    """A record to be made from options."""

    kind: type[Record]
    options: tuple[_Option, ...]
    file: str = ""

    def build(self, values: Mapping[str, Any]) -> Record:
        """Return the record with what was given, in a file or by options, set; the rest has its default.

        Raises:
            TenfoldError: a value that is not allowed.
        """
        given: dict[str, Any] = {}
        if self.file and values[self.file] is not None:
            given = _read(self.kind, values[self.file], self.file).model_dump(exclude_unset=True)
        for option in self.options:
            value = values[option.declared.name]
            if value is None or value == []:
                continue
            value = value if option.text is None else option.text.read(value)
            *parents, last = option.path
            inside = given
            for name in parents:
                inside = inside.setdefault(name, {})
            inside[last] = _over(inside.get(last), value) if isinstance(value, dict) else value
        try:
            return self.kind.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = self._name(tuple(map(str, first["loc"])))
            msg = f"{name or self.kind.__name__}: {first['msg'].removeprefix('Value error, ')}"
            raise TenfoldError(msg) from error

    def _name(self, place: tuple[str, ...]) -> str:
        """Return the option whose value is at a place, or the place itself."""
        found = [o.declared.name for o in self.options if o.path == place[: len(o.path)]]
        return f"--{found[0].replace('_', '-')}" if found else ".".join(place)


def _read(kind: type[Record], file: Path, option: str) -> Record:
    try:
        return kind.from_text(file.read_text(encoding="utf-8"), source=str(file))
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read --{option} {file}: {getattr(error, 'strerror', None) or error}"
        raise TenfoldError(msg) from error


def _over(base: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with some entries changed; settings of another rule than before do not stay."""
    if not isinstance(base, dict) or ("name" in base and given.get("name", base["name"]) != base["name"]):
        return given
    return {**base, **given}


def as_command(run: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose records are made from options: parameters and documentation of ``run`` are its own.

    Positional-only parameters are arguments, records are groups of options, and any other parameter is an option that
    ``Args`` documents. All is checked before ``run`` begins, which happens within the session of its ``Terminal``.

    Example:
        >>> class Size(Options):
        ...     width: int = 3
        >>> def area(size: Size, terminal: Terminal, height: int = 2) -> None: ...
        >>> list(inspect.signature(as_command(area)).parameters)
        ['width', 'as_json', 'quiet', 'debug', 'height']
    """
    hints = get_type_hints(run, include_extras=True)
    doc = documented(run.__doc__ or "", "Args")
    groups: dict[str, _Group] = {}
    declared: dict[str, inspect.Parameter] = {}
    own: dict[str, Any] = {}
    for name, parameter in inspect.signature(run).parameters.items():
        hint = hints[name]
        kind, fields = _group_of(hint)
        if kind is not None:
            groups[name] = _group(name, kind, fields)
            if fields.file:
                declared[name] = _file_option(name, fields)
            declared |= {o.declared.name: o.declared for o in groups[name].options if o.declared.name not in declared}
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            declared[name] = _argument(parameter, hint, doc.get(name, ""))
        elif hint is typer.Context:
            declared[name] = _keyword(name, hint)
        else:
            own[name] = (hint, ... if parameter.default is parameter.empty else parameter.default)
    plain = _plain(own, doc)
    declared |= {option.declared.name: option.declared for option in plain.options}

    def command(**values: Any) -> None:
        terminal = cast("Terminal", groups["terminal"].build(values))
        with terminal.session():
            records = {name: group.build(values) for name, group in groups.items()}
            extra = dict(plain.build(values))
            rest = {name: value for name, value in values.items() if name in hints and name not in {*groups, *own}}
            positional = [
                rest.pop(n) for n, p in inspect.signature(run).parameters.items() if p.kind is p.POSITIONAL_ONLY
            ]
            run(*positional, **{**records, **extra, **rest, "terminal": terminal})

    vars(command)["__signature__"] = inspect.Signature(list(declared.values()), return_annotation=None)
    command.__annotations__ = {name: parameter.annotation for name, parameter in declared.items()}
    return command


def help_of(run: Callable[..., None]) -> str:
    """Return the documentation of a command without that of its parameters."""
    return inspect.cleandoc(run.__doc__ or "").partition("\n\nArgs:\n")[0]


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


def _group_of(hint: Any) -> tuple[type[Record] | None, Fields]:
    """Return the record that a parameter is, and which of its fields are options; None where it is none."""
    kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    fields = next((mark for mark in marks if isinstance(mark, Fields)), Fields())
    return (kind if isinstance(kind, type) and issubclass(kind, Record) else None), fields


def _group(name: str, kind: type[Record], fields: Fields) -> _Group:
    panel = fields.panel or inspect.cleandoc(kind.__doc__ or "").partition("\n")[0].rstrip(".")
    chosen = [n for n in fields.only or kind.model_fields if n not in fields.without]
    options = tuple(_options_of(kind, (), chosen, panel, both=fields.file))
    return _Group(kind, options, name if fields.file else "")


def _plain(own: Mapping[str, Any], doc: Mapping[str, str]) -> _Group:
    """Return the group of the parameters that are no records."""
    kind: type[Record] = create_model("Options", __base__=Options, **own)
    options = (_option((name,), info, doc.get(name, ""), "Options") for name, info in kind.model_fields.items())
    return _Group(kind, tuple(options))


def _options_of(
    kind: type[Record], parents: tuple[str, ...], names: Sequence[str], panel: str, *, both: bool
) -> Iterator[_Option]:
    """Yield the options of some fields; those of a record within are named after both."""
    doc: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        doc |= documented(base.__doc__ or "", "Attributes")
    for name in names:
        info = kind.model_fields[name]
        path = (*parents, name)
        if name in TEXTS and not parents:
            for option, text in TEXTS[name].items():
                yield _text_option(option, path, text, text.help or doc.get(name, ""), panel)
        elif isinstance(info.annotation, type) and issubclass(info.annotation, Record):
            yield from _options_of(info.annotation, path, list(info.annotation.model_fields), panel, both=both)
        else:
            yield _option(path, info, doc.get(info.alias or name, ""), panel, both=both)


def _text_option(name: str, path: tuple[str, ...], text: Text, about: str, panel: str) -> _Option:
    option = typer.Option(
        *_flags(name),
        metavar=text.metavar,
        help=about,
        rich_help_panel=panel,
        show_default=False,
        autocompletion=completion(name),
    )
    return _Option(path, _keyword(name, Annotated[text.kind | None, option], None), text)


def _option(path: tuple[str, ...], info: FieldInfo, about: str, panel: str, *, both: bool = False) -> _Option:
    name = "_".join(path)
    kind, bounds = _shape(info.annotation)
    bounds |= _bounds(info.metadata, kind)
    shown = info.alias or name
    default = info.default
    flags = _flags(shown)
    if kind is bool:
        flag = shown.replace("_", "-")
        flags = (f"--{flag}/--no-{flag}",) if both or default is not False else (f"--{flag}", *flags[1:])
    display = str(default) if default not in (None, False, True, ()) and not info.is_required() else False
    if kind is not bool and get_origin(kind) is not Literal:
        bounds["metavar"] = next((mark for mark in info.metadata if isinstance(mark, str)), _metavar(kind, shown))
    option = typer.Option(
        *flags,
        help=about,
        rich_help_panel=panel,
        show_default=display,
        autocompletion=completion(shown),
        **bounds,
    )
    if info.is_required():
        return _Option(path, _keyword(name, Annotated[kind, option]))
    return _Option((*path[:-1], info.alias or path[-1]), _keyword(name, Annotated[kind | None, option], None))


def _file_option(name: str, fields: Fields) -> inspect.Parameter:
    text = f"Read the {name} from a YAML file; single options change its fields."
    option = typer.Option(f"--{name}", metavar="FILE", help=text, rich_help_panel=fields.panel, show_default=False)
    return _keyword(name, Annotated[Path | None, option], None)


def _argument(parameter: inspect.Parameter, hint: Any, about: str) -> inspect.Parameter:
    many = get_origin(hint) is list
    metavar = f"{parameter.name.upper()}..." if many else parameter.name.upper()
    argument = typer.Argument(metavar=metavar, help=about, show_default=False)
    if get_origin(_shape(hint)[0]) is Literal:
        argument = typer.Argument(help=about, show_default=False)
    return _keyword(parameter.name, Annotated[hint, argument], parameter.default)


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(name: str) -> tuple[str, ...]:
    flag = f"--{name.replace('_', '-')}"
    return (flag, _SHORT[name]) if name in _SHORT else (flag,)


def _shape(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """Return the type of an option for a field of this type, and its bounds."""
    if get_origin(annotation) is Annotated:
        kind, *marks = get_args(annotation)
        inner, bounds = _shape(kind)
        return inner, bounds | _bounds(marks, inner)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return _shape(parts[0]) if len(parts) == 1 else (str, {})
    if get_origin(annotation) in (tuple, list):
        return list[get_args(annotation)[0]], {}  # type: ignore[misc]
    return annotation, {}


def _bounds(marks: Sequence[Any], kind: Any) -> dict[str, Any]:
    """Return the least and the largest value that a field takes, as far as an option can say so."""
    found = {}
    for mark in marks:
        for name, limit in (("ge", "min"), ("le", "max")):
            if getattr(mark, name, None) is not None:
                found[limit] = getattr(mark, name)
        if kind is int and getattr(mark, "gt", None) is not None:
            found["min"] = mark.gt + 1
    return found


def _metavar(kind: Any, name: str) -> str:
    return {int: "N", float: "X", Path: "FILE", list[Path]: "FILE"}.get(kind, name.upper())
