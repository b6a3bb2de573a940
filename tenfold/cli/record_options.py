"""Options made from the fields of records: a command takes records, and the shell sees their fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from tenfold.cli.declare import argument, documented, keyword, option, text_option
from tenfold.cli.terminal import Misuse, Options, Terminal
from tenfold.cli.values import TEXTS
from tenfold.errors import TenfoldError
from tenfold.files import read_text
from tenfold.records import Record


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
    """An option: the field that it gives, or the field of a record in a field, and how its value is read."""

    field: tuple[str, ...]
    declared: inspect.Parameter
    read: Callable[[Any], Any] | None = None

    @property
    def flag(self) -> str:
        return f"--{self.declared.name.replace('_', '-')}"


@dataclass(frozen=True)
class _Group:
    """A record to be made from options, and from the file that the option ``file`` names, if there is one."""

    kind: type[Record]
    options: tuple[_Option, ...]
    file: str = ""

    def build(self, values: Mapping[str, Any]) -> Record:
        """Return the record with what was given, in a file or by options, set; the rest has its default.

        Raises:
            Misuse: a value that the command line does not allow.
            TenfoldError: a value that a library record does not allow.
        """
        given: dict[str, Any] = {}
        if self.file and values[self.file] is not None:
            given = _read(self.kind, values[self.file], self.file).model_dump(exclude_unset=True)
        for each in self.options:
            value = values[each.declared.name]
            if value is None or value == []:
                continue
            inside = given
            for name in each.field[:-1]:
                inside = inside.setdefault(name, {})
            value = value if each.read is None else each.read(value)
            inside[each.field[-1]] = _over(inside.get(each.field[-1]), value) if isinstance(value, dict) else value
        try:
            return self.kind.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            flags = [each.flag for each in self.options if each.field == first["loc"][: len(each.field)]]
            where = flags[0] if flags else ".".join(map(str, first["loc"])) or self.kind.__name__
            msg = f"{where}: {first['msg'].removeprefix('Value error, ')}"
            raise (Misuse if issubclass(self.kind, Options) else TenfoldError)(msg) from error


def _read(kind: type[Record], file: Path, name: str) -> Record:
    return kind.from_text(read_text(file, f"--{name}"), source=str(file))


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
        ['ctx', 'width', 'as_json', 'quiet', 'verbose', 'debug', 'height']
    """
    hints, doc = get_type_hints(run, include_extras=True), documented(run.__doc__ or "", "Args")
    groups: dict[str, _Group] = {}
    declared: dict[str, inspect.Parameter] = {"ctx": keyword("ctx", typer.Context)}
    arguments: list[str] = []
    own: dict[str, Any] = {}
    for name, parameter in inspect.signature(run).parameters.items():
        if (group := _group(name, hints[name])) is not None:
            groups[name] = group
            if group.file:
                about = f"Read the {name} from a YAML file; single options change its fields."
                file = FieldInfo(annotation=Path | None, default=None)
                declared[name] = option(name, file, about, name.capitalize())
            for each in group.options:  # records share options of one name, such as the seed
                declared.setdefault(each.declared.name, each.declared)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            arguments.append(name)
            declared[name] = argument(parameter, hints[name], doc.get(name, ""))
        else:
            own[name] = (hints[name], ... if parameter.default is parameter.empty else parameter.default)
    plain, shown = _plain(own, doc), groups.pop("terminal")
    declared |= {each.declared.name: each.declared for each in plain.options}

    def command(ctx: typer.Context, **values: object) -> None:
        terminal = cast("Terminal", shown.build(values)).model_copy(update={"command": ctx.obj})
        with terminal.session():
            records: dict[str, Any] = {name: group.build(values) for name, group in groups.items()}
            single = dict(plain.build(values))
            run(*(values[name] for name in arguments), **records, **single, terminal=terminal)

    vars(command)["__signature__"] = inspect.Signature(list(declared.values()), return_annotation=None)
    command.__annotations__ = {name: parameter.annotation for name, parameter in declared.items()}
    return command


def help_of(run: Callable[..., None]) -> str:
    """Return the documentation of a command without that of its parameters."""
    return inspect.cleandoc(run.__doc__ or "").partition("\n\nArgs:\n")[0]


def _group(name: str, hint: Any) -> _Group | None:
    """Return the group of a parameter; None for one that is no record."""
    kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if not isinstance(kind, type) or not issubclass(kind, Record):
        return None
    fields = next((mark for mark in marks if isinstance(mark, Fields)), Fields())
    panel = fields.panel or inspect.cleandoc(kind.__doc__ or "").partition("\n")[0].rstrip(".")
    chosen = [
        n for n in fields.only or kind.model_fields if n not in fields.without and not kind.model_fields[n].exclude
    ]
    return _Group(kind, tuple(_options_of(kind, chosen, panel, both=fields.file)), name if fields.file else "")


def _plain(own: Mapping[str, Any], doc: Mapping[str, str]) -> _Group:
    """Return the group of the parameters that are no records."""
    kind: type[Record] = create_model("Own", __base__=Options, **own)
    infos = kind.model_fields.items()
    return _Group(
        kind, tuple(_Option((name,), option(name, info, doc.get(name, ""), "Options")) for name, info in infos)
    )


def _options_of(
    kind: type[Record], names: Sequence[str], panel: str, parents: tuple[str, ...] = (), *, both: bool = False
) -> Iterator[_Option]:
    """Yield the options of some fields; those of a record within are named after both."""
    doc: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        doc |= documented(base.__doc__ or "", "Attributes")
    for name in names:
        info, path = kind.model_fields[name], (*parents, name)
        if name in TEXTS:
            for flag, text in TEXTS[name].items():
                yield _Option(path, text_option(flag, text, panel), text.read)
        elif isinstance(info.annotation, type) and issubclass(info.annotation, Record):
            yield from _options_of(info.annotation, list(info.annotation.model_fields), panel, path, both=both)
        else:
            shown = info.alias or name
            declared = option("_".join(path), info, doc.get(shown, ""), panel, both=both)
            yield _Option((*parents, shown), declared)
