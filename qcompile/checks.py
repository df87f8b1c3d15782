"""Checks of single values in a config. Errors name the key and the value."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from qcompile.errors import ConfigError


def hint(word: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: what it may have been meant to be, or all that there is."""
    if close := get_close_matches(str(word), sorted(known), n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}"


def names(key: str, value: Any) -> tuple[str, ...]:
    """One name or a collection of them, as a tuple."""
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Collection) or isinstance(values, Mapping):
        raise ConfigError(f"{key}={value!r} is not a list of names")
    for name in values:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{key} holds {name!r}, which is not a name")
    return tuple(sorted(values) if isinstance(values, (set, frozenset)) else values)


def flag(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} is neither True nor False")


def positive(key: str, value: Any, kinds: tuple[type, ...] = (int,)) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise ConfigError(f"{key}={value!r} is not a positive {' or '.join(kind.__name__ for kind in kinds)}")
