"""The files of packages whose code nobody reads: a version alone does not say that somebody edited them."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

# What was changed later may not be what this process runs.
STARTED = time.time()
_SUFFIXES = (".py", ".so", ".pyd", ".h", ".cpp")


@functools.cache
def installed(packages: Sequence[str]) -> str:
    """A digest of the places, sizes and times of these packages' files; a package that is not there has none.

    Raises RuntimeError where one was changed after this process began.
    """
    digest = hashlib.sha256()
    for package in packages:
        for folder in _folders(package):
            for path, found in sorted(_files(folder)):
                if found.st_mtime > STARTED:
                    raise RuntimeError(f"code that was changed after this process began: {path}")
                digest.update(
                    f"{package}/{os.path.relpath(path, folder)} {found.st_size} {found.st_mtime_ns}\n".encode()
                )
    return digest.hexdigest()


def _folders(package: str) -> list[str]:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return []
    return list(spec.submodule_search_locations or ()) if spec else []


def _files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():  # also behind a link
                yield from _files(entry.path)
            elif entry.name.endswith(_SUFFIXES):
                yield entry.path, entry.stat()
