"""Flags of a command from the dataclasses of what it can run: each name once, with its help and its defaults."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
from tyro.conf import arg

SHORT = 80  # characters: longer lists of whose flag it is are left out


def about(config: type) -> dict[str, str]:
    """{field: what the docstrings of a dataclass and of those it extends say of it}."""
    out: dict[str, str] = {}
    for base in reversed(config.__mro__):
        for entry in docstring_parser.parse(base.__doc__ or "").params:
            for name in entry.arg_name.split(","):
                out[name.strip()] = " ".join((entry.description or "").split())
    return out


def union(
    name: str, doc: str, kinds: Mapping[str, type], common: type, parts: Mapping[str, type] | None = None
) -> type:
    """A dataclass with the fields of all sources, each None (a switch: False) as long as it is not given.

    The help of a field says what holds without it, for each source that has it where they differ.

    Args:
      name: of the dataclass.
      doc: its docstring: what the command does.
      kinds: {kind of thing to work on: frozen dataclass}; the first that has a field gives its help.
      common: a dataclass with defaults whose fields come as they are.
      parts: {whose they are: frozen dataclass} of settings that some of these have.
    """
    sources = {**kinds, **(parts or {})}
    owners: dict[str, dict[str, type]] = {}
    for who, config in sources.items():
        for field in dataclasses.fields(config):
            owners.setdefault(field.name, {})[who] = config
    fields: list[Any] = []
    for field, by in owners.items():
        hints = [get_type_hints(config)[field] for config in by.values()]
        text = next((about(config)[field] for config in by.values() if field in about(config)), "")
        said = _defaults(field, by, kinds)
        shown = arg(help=text, metavar=_metavar(_joined(hints)), help_behavior_hint=lambda _, said=said: said)
        if _joined(hints) is bool:
            if any(f.default for config in by.values() for f in dataclasses.fields(config) if f.name == field):
                raise ValueError(f"{field} is a switch that is on by default: turn it round, a flag can only switch on")
            fields.append((field, Annotated[bool, arg(help=text)], dataclasses.field(default=False)))
        else:
            fields.append((field, Annotated[_joined(hints) | None, shown], dataclasses.field(default=None)))
    hints, texts = get_type_hints(common, include_extras=True), about(common)
    for field in dataclasses.fields(common):
        fields.append((field.name, Annotated[hints[field.name], arg(help=texts.get(field.name, ""))],
                       dataclasses.field(default=field.default)))  # fmt: skip
    made = dataclasses.make_dataclass(name, fields, frozen=True)
    made.__doc__ = doc
    return made


def given(flags: Any, common: type) -> dict[str, Any]:
    """{name: value} of the flags that were given, without those of `common`."""
    left_out = {f.name for f in dataclasses.fields(common)}
    return {
        f.name: value
        for f in dataclasses.fields(flags)
        if f.name not in left_out and (value := getattr(flags, f.name)) is not None and value is not False
    }


def _joined(hints: list[Any]) -> Any:
    """One type for all: Literals joined, None left out."""
    plain = [h for hint in hints for h in _without_none(hint)]
    if all(get_origin(h) is Literal for h in plain):
        return Literal[tuple(dict.fromkeys(v for h in plain for v in get_args(h)))]  # pyright: ignore
    return plain[0]


def _without_none(hint: Any) -> list[Any]:
    if get_origin(hint) in (typing.Union, type(int | None)):
        return [h for h in get_args(hint) if h is not type(None)]
    return [hint]


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if get_origin(hint) is tuple:
        first, *rest = get_args(hint)
        return f"{_metavar(first)} ..." if rest == [...] else " ".join(map(_metavar, get_args(hint)))
    return {str: "STR", int: "INT", float: "FLOAT", bool: "BOOL"}.get(hint, "VALUE")


def _listed(sources: Iterable[str]) -> str:
    """Names that stand in several lists, as one."""
    *front, last = [name for source in sources for name in source.split(", ")]
    return f"{', '.join(front)} and {last}" if front else last


def _defaults(field: str, by: Mapping[str, type], kinds: Mapping[str, type]) -> str:
    """What the help says of a flag that is not given."""
    said: dict[str, list[str]] = {}
    for who, config in by.items():
        default = next(f for f in dataclasses.fields(config) if f.name == field).default
        text = (
            "required" if default is dataclasses.MISSING else "optional" if default is None else f"default: {default}"
        )
        said.setdefault(text, []).append(who)
    mine = _listed(by)
    only = f"; {mine} only" if not kinds.keys() <= by.keys() and len(mine) < SHORT else ""
    if len(said) == 1:
        return f"({next(iter(said))}{only})"
    (first, _), *rest = said.items()
    others = "; ".join(f"{_listed(who)}: {text.removeprefix('default: ')}" for text, who in rest)
    return f"({first}; {others})"
