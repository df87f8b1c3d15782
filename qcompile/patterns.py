"""Patterns of module names in a config. Config's docstring says what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

TAG = "tag:"


def matches(pattern: str, module: str) -> bool:
    if pattern.startswith(TAG):
        parts = [part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric()]
        return ".".join(parts) == pattern.removeprefix(TAG)
    return fnmatchcase(f".{module}.", f"*.{pattern}.*")


def first(patterns: Iterable[str], module: str) -> str | None:
    """The first of the patterns that matches."""
    return next((pattern for pattern in patterns if matches(pattern, module)), None)


def names_in_full(pattern: str, module: str) -> bool:
    """Whether a matching pattern names this very module, not one above it or many at once."""
    return pattern.startswith(TAG) or f".{module}".endswith(f".{pattern}")
