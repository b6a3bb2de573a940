"""Read YAML and JSON as what records are made of, within bounds; and seal JSON so that a changed bit is noticed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

_DEEPEST = 60  # levels; a record has a handful
_DIGITS = 19  # of an integer: what 64 bits hold
_SEAL = re.compile(r'\{\s*"digest": "([0-9a-f]{32})",')
CHANGED = "was changed after it was written: its contents do not match its digest"


def parse(text: str) -> Any:
    r"""Return what a text says in JSON, which is read a hundred times faster as such, or else in YAML.

    Values are those of JSON: dates stay text. What a file of records never has is refused: a key twice, an integer of
    more than 64 bits, great depth, aliases that multiply the text.

    Raises:
        ValueError: the text is not YAML, or has any of these; the message is one line.

    Example:
        >>> parse("{rank: 3, since: 2024-01-01}")
        {'rank': 3, 'since': '2024-01-01'}
        >>> parse("a: 1\na: 2")
        Traceback (most recent call last):
        ValueError: line 2: the key 'a' is there twice
    """
    if text.lstrip().startswith("{"):
        try:
            return parse_json(text)
        except json.JSONDecodeError:
            pass  # YAML with braces
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except LookupError as error:  # such as !!bool with what is none
        msg = "a value is not what its tag says"
        raise ValueError(msg) from error


def parse_json(text: str | bytes) -> Any:
    """Return what a text says in JSON, within the bounds of ``parse``.

    Raises:
        ValueError: it is not JSON or out of bounds; a ``json.JSONDecodeError`` for what may still be YAML.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    _check_depth(value)
    return value


def seal(text: str) -> str:
    """Return a JSON object with the digest of its text as the first entry, for files that no hand edits.

    Example:
        >>> print(seal('{"rank": 3}').replace(chr(10), ""))
        { "digest": "22b135bc4e5c984adb3faa4de9baa1f1","rank": 3}
    """
    return f'{{\n "digest": "{_digest(text[1:])}",{text[1:]}'


def unseal(text: str) -> tuple[str, bool]:
    """Return a JSON object without its digest, and whether it is the text that was sealed; one without a digest is."""
    found = _SEAL.match(text)
    if found is None:
        return text, True
    rest = text[found.end() :]
    return "{" + rest, _digest(rest) == found[1]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


class _Loader(yaml.SafeLoader):
    """Reads the types of JSON from YAML, within bounds."""

    depth = 0

    def get_single_node(self) -> yaml.Node | None:
        length = len(self.buffer)
        node = super().get_single_node()
        if node is not None and _size(node, {}) > 10_000 + length:
            msg = "its aliases multiply it: write out what they stand for"
            raise ValueError(msg)
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError(_too_deep())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                msg = f"line {key.start_mark.line + 1}: the key {key.value!r} is there twice"
                raise ValueError(msg)
            seen.add(key.value)
            if key.tag != f"{_TAG}merge":
                key.tag = f"{_TAG}str"  # as in JSON, so that the layer 0 can be named without quotes
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return _bounded(super().construct_yaml_int(node)) if len(node.value) <= 2 * _DIGITS else _integer(node.value)


_TAG = "tag:yaml.org,2002:"
_JSON = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _JSON
} | {f"{_TAG}int": _Loader.construct_yaml_int}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in own if tag in _JSON]
    for first, own in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many nodes there are once aliases are written out."""
    if id(node) not in known:
        known[id(node)] = 10**9  # while it is being counted: a node within itself
        inside: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.CollectionNode):
            inside = (each for entry in node.value for each in (entry if isinstance(entry, tuple) else (entry,)))
        known[id(node)] = 1 + sum(_size(each, known) for each in inside)
    return known[id(node)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        msg = f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice"
        raise ValueError(msg)
    return found


def _integer(text: str) -> int:
    if len(text.lstrip("-+")) > _DIGITS:
        msg = f"an integer of {len(text)} digits is larger than 64 bits"
        raise ValueError(msg)
    return _bounded(int(text))


def _bounded(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        msg = f"the integer {value} is larger than 64 bits"
        raise ValueError(msg)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [each for one in level for each in _inside(one)]
        if not level:
            return
    raise ValueError(_too_deep())


def _inside(value: Any) -> Iterator[Any]:
    each = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (one for one in each if isinstance(one, dict | list))


def _too_deep() -> str:
    return f"it is nested more than {_DEEPEST} levels deep"
