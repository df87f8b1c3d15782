"""What was worked out for a model before, on disk: another process need not work it out again.

An entry is found by the fingerprint of all that it depends on (fingerprint.py). Entries lie beside Inductor's caches,
in a folder that nobody else may write to, as they are unpickled. One that is damaged is dropped with a line in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qcompile import _torch
from qcompile.fingerprint import fingerprint

log = logging.getLogger(__name__)

# Programs of one fingerprint differ in the sizes that they fixed; so many of them are kept, the newest.
MOST = 16


def folder() -> Path | None:
    """Where entries lie: QCOMPILE_CACHE, or beside Inductor's caches; None where that is 0 or those are off."""
    said, root = os.environ.get("QCOMPILE_CACHE"), _torch.cache_root()
    if root is None or said == "0":
        return None
    return Path(said).expanduser() if said else Path(root) / "qcompile"


class Shelf:
    """The entries of one kind, `what`, for models and the like that are as these `roots` are. `why_not` says why none
    is kept, where that is the roots' doing."""

    def __init__(self, what: str, *roots: Any, off: bool = False):
        self.place: Path | None = None
        self.why_not: str | None = None
        if off or (root := folder()) is None:
            return
        try:
            name = f"{what}-{fingerprint(what, *roots)[:40]}"
        except Exception as error:  # Unknown, too deep, or what somebody's attributes raise: never a reason to fail
            self.why_not = f"the model has {str(error) or type(error).__name__}"
            log.info("qcompile: %s is not kept on disk: %s", what, self.why_not)
            return
        if _is_private(root):
            self.place = root / name

    def entries(self) -> Iterator[Any]:
        """All that are there."""
        if self.place is None or not self.place.is_dir():
            return
        for file in sorted(self.place.glob("*.bin")):
            try:
                data = file.read_bytes()
                if hashlib.sha256(data[32:]).digest() != data[:32]:
                    raise ValueError("its checksum is wrong")
                entry = _torch.loads(data[32:])
            except Exception as error:  # whatever is wrong with it, it can be made again
                log.warning("qcompile: dropped %s from the cache on disk: %s", file, error)
                with contextlib.suppress(OSError):
                    file.unlink()
                continue
            log.info("qcompile: read %s", file)
            yield entry

    def recall(self, make: Callable[[], Any]) -> Any:
        """The first entry; what `make` returns, and that is kept, if there is none."""
        for entry in self.entries():
            return entry
        made = make()
        self.keep(made)
        return made

    def as_read(self, entry: Any) -> Any:
        """`entry` as another process will read it: what is keyed by its parts has the same keys there. Itself where it
        is not kept."""
        if self.place is None:
            return entry
        try:
            return _torch.loads(_torch.dumps(entry))
        except Exception:  # keep() says why
            return entry

    def keep(self, entry: Any) -> None:
        """Write one more, unless that does not work here."""
        if self.place is None:
            return
        try:
            data = _torch.dumps(entry)
            digest = hashlib.sha256(data).digest()
            self.place.mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.place) as aside:  # a file is there whole or not at all
                file = Path(aside) / f"{digest.hex()[:16]}.bin"
                file.write_bytes(digest + data)
                os.replace(file, self.place / file.name)
            for old in sorted(self.place.glob("*.bin"), key=lambda file: file.stat().st_mtime_ns)[:-MOST]:
                old.unlink(missing_ok=True)
        except Exception as error:  # pickle raises what it likes, and so do disks
            log.info("qcompile: %s is not kept on disk: %s", self.place.name, error)


def _is_private(root: Path) -> bool:
    """Make the folder if need be; whether only this user can write to it."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        log.info("qcompile: no cache on disk: %s", error)
        return False
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        log.warning("qcompile: %s is not used as a cache: others may write to it", root)
        return False
    return True
