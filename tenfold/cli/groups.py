"""Options in groups: a command takes a few frozen dataclasses, the shell sees their fields as options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def flattened(function: Callable[..., None]) -> Callable[..., None]:
    """Return the function with every dataclass among its parameters replaced by the fields of that dataclass.

    The fields carry their option as ``Annotated[type, typer.Option(...)]``. Two groups of one command must not share a
    field name.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Size:
        ...     width: int = 3
        >>> def area(size: Size, height: int) -> None: ...
        >>> inspect.signature(flattened(area))
        <Signature (*, width: int = 3, height: int) -> None>
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            fields = dataclasses.fields(kind)
            groups[name] = (kind, [f.name for f in fields])
            own = get_type_hints(kind, include_extras=True)
            parameters += [_parameter(f.name, own[f.name], _default(f)) for f in fields]
        else:
            parameters.append(_parameter(name, kind, parameter.default))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        made = {name: kind(**{f: values.pop(f) for f in fields}) for name, (kind, fields) in groups.items()}
        function(**made, **values)

    vars(command)["__signature__"] = inspect.Signature(parameters, return_annotation=None)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    del vars(command)["__wrapped__"]  # typer would follow it to the dataclasses
    return command


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return inspect.Parameter.empty if field.default_factory is dataclasses.MISSING else field.default_factory()
