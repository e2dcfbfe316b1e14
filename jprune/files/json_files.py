"""JSON files that somebody else may have written: parsed with limits, their entries asked for by type and range.

    config = read_json("model/config.json")                     # a damaged file is a ValueError that names it
    with said_of("model/config.json"):                          # what is wrong with an entry names the file too
        fields = Fields(config)
        depth = fields.integer("num_hidden_layers", least=1)
        eps = fields.number("rms_norm_eps", 1e-6, above=0)

Python's `json` alone lets through what no reader here wants: a key that is there twice, nesting that exhausts the stack,
NaN and infinity, `true` for 1.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

LARGEST = 2**28  # bytes of a file
DEEPEST = 64  # levels of lists and objects in one another
MOST = 2**31 - 1  # of an integer, where nothing else is said
AGAIN = "download or copy it again"
T = TypeVar("T")


class _Required:
    """The default of an entry that has to be there."""


REQUIRED: Any = _Required()


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
      ValueError: it is no JSON in UTF-8, names a key of an object twice, or nests deeper than DEEPEST.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        data = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"lists or objects are nested more than {DEEPEST} deep") from None
    level = [data]
    for _ in range(DEEPEST + 1):
        level = [x for holder in level for x in _inside(holder)]
        if not level:
            return data
    raise ValueError(f"lists or objects are nested more than {DEEPEST} deep")


def read_json(path: str | os.PathLike[str], remedy: str = AGAIN) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      ValueError: there is no such file, it is larger than LARGEST, or `parse_json` refuses it; the file is named, and
        `remedy` says what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: {remedy}")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, JSON files of at most {LARGEST:,} are read: {remedy}")
    try:
        data = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): {remedy}")
    return data


@contextlib.contextmanager
def said_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name in front of a ValueError that is raised inside and does not have it."""
    try:
        yield
    except ValueError as error:
        if os.fspath(path) in str(error) or type(error) is not ValueError:
            raise
        raise ValueError(f"{os.fspath(path)}: {error}") from error


class Fields(Mapping[str, Any]):
    """The entries of a JSON object, each asked for by its type and range.

    The methods take the key and, unless the entry has to be there, the default. `null` is read as the default where that
    is None, and refused elsewhere. Whatever is refused is a ValueError with the entry's name and value, and what it must
    be.

        >>> Fields({"layers": 2}).integer("layers", least=1)
        2
        >>> Fields({"eps": float("nan")}).number("eps", above=0)
        Traceback (most recent call last):
        ValueError: eps is NaN: it must be a number above 0
    """

    def __init__(self, data: Any, name: str = "") -> None:
        """`name`: of the object itself, such as "vision_config"; put in front of its entries' names."""
        self.name = name
        if not isinstance(data, Mapping) or not all(isinstance(k, str) for k in data):
            raise ValueError(f"{name or 'the file'} is {_shown(data)}: it must be an object")
        self._data = data

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def integer(self, key: str, default: Any = REQUIRED, *, least: int = 0, most: int = MOST) -> Any:
        """A whole number from `least` to `most`."""
        return self._get(key, default, _range(least, most), lambda x: is_integer(x, least, most))

    def number(
        self, key: str, default: Any = REQUIRED, *, above: float | None = None, least: float | None = None,
        below: float | None = None, most: float | None = None,
    ) -> Any:  # fmt: skip
        """A finite number, as float."""
        rules = [
            ("above", above, operator.gt), ("at least", least, operator.ge),
            ("below", below, operator.lt), ("at most", most, operator.le),
        ]  # fmt: skip
        limits = [(f"{word} {x:g}", x, fits) for word, x, fits in rules if x is not None]
        found = self._get(key, default, " ".join(["a number", " and ".join(said for said, *_ in limits)]).rstrip(),
                          lambda x: is_number(x) and all(fits(x, limit) for _, limit, fits in limits))  # fmt: skip
        return found if found is None else float(found)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """True or false; `null` is false, as for the programs that write it."""
        return bool(self._get(key, default, "true or false", lambda x: x is None or isinstance(x, bool)))

    def text(self, key: str, default: Any = REQUIRED, *, among: Sequence[str] | None = None) -> Any:
        """A string, one of `among` if that is given."""
        return self._get(key, default, *_string(among))

    def fields(self, key: str, default: Any = REQUIRED) -> Fields:
        """An object; without a default that is needed, `default={}` makes an absent or null one empty."""
        value = self._data.get(key)
        if value is None and default is not REQUIRED:
            value = default
        if value is None:
            raise ValueError(f"{self._called(key)} is missing: it must be an object")
        return Fields(value, self._called(key))

    def numbers(self, key: str, default: Any = REQUIRED, *, count: int | None = None) -> Any:
        """A list of finite numbers, as floats."""
        found = self._list(key, default, count, "a number", is_number)
        return found if found is None else tuple(float(x) for x in found)

    def integers(
        self, key: str, default: Any = REQUIRED, *, count: int | None = None, least: int = 0, most: int = MOST
    ) -> Any:
        """A list of whole numbers from `least` to `most`."""
        return self._list(key, default, count, _range(least, most), lambda x: is_integer(x, least, most))

    def texts(self, key: str, default: Any = REQUIRED, *, among: Sequence[str] | None = None) -> Any:
        """A list of strings, each one of `among` if that is given."""
        return self._list(key, default, None, *_string(among))

    def _list(self, key: str, default: Any, count: int | None, rule: str, fits: Callable[[Any], bool]) -> Any:
        many = "a list" if count is None else f"a list of {count}"
        found = self._get(key, default, f"{many}, each {rule}",
                          lambda x: isinstance(x, list | tuple) and count in (None, len(x)))  # fmt: skip
        for i, x in enumerate(found or ()):
            if not fits(x):
                raise ValueError(f"{self._called(key)}[{i}] is {_shown(x)}: it must be {rule}")
        return found if found is None else tuple(found)

    def _get(self, key: str, default: Any, rule: str, fits: Callable[[Any], bool]) -> Any:
        if key not in self._data:
            if default is REQUIRED:
                raise ValueError(f"{self._called(key)} is missing: it must be {rule}")
            return default
        value = self._data[key]
        if value is None and default is None:
            return None
        if not fits(value):
            raise ValueError(f"{self._called(key)} is {_shown(value)}: it must be {rule}")
        return value

    def _called(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def is_integer(x: Any, least: int = 0, most: int = MOST) -> bool:
    """Whether a value from JSON is a whole number (and not `true`) in that range."""
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def is_number(x: Any) -> bool:
    """Whether a value from JSON is a finite number (and not `true`)."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def _range(least: int, most: int) -> str:
    return f"a whole number, at least {least}" if most == MOST else f"a whole number from {least} to {most}"


def _string(among: Sequence[str] | None) -> tuple[str, Callable[[Any], bool]]:
    if among is None:
        return "a string", lambda x: isinstance(x, str)
    return f"one of {', '.join(among)}", lambda x: isinstance(x, str) and x in among


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"it has the key {twice!r} twice")
    return out


def _inside(x: Any) -> Sequence[Any]:
    return list(x.values()) if isinstance(x, dict) else x if isinstance(x, list) else ()


def _shown(value: Any) -> str:
    """A value as JSON has it, shortened."""
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, TypeError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
