"""What was measured: for linears of some shapes and numbers of rows, a choice that is better than the formula's.

A table is a JSON file for one GPU. Those that are shipped lie in tables/; `qcompile tune` writes the user's own, which
comes first and holds for the versions that it was measured with. Whatever is wrong with a table, it is left aside with
a warning, and formulas choose.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from qcompile.errors import FormatError, SpecError, UnsupportedError
from qcompile.kernels._tuning import Device
from qcompile.kernels._ways import TILES, Choice, Product, by_formula, fits, product_of, tile_of
from qcompile.quant.spec import QSpec

log = logging.getLogger(__name__)

FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
# What goes with the weight or with the number of rows, also inside an entry's range, and is left to formulas.
OF_A_CALL = ("tokens", "warp_groups", "words", "late")


# (spec, outputs, inputs, first number of rows, last).
Span = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Entry:
    """The choice for `first` to `last` rows times a weight; its µs for the last, and the µs before it was made."""

    spec: str
    outputs: int
    inputs: int
    first: int
    last: int
    way: str
    tile: dict[str, int]
    us: float
    before: float

    @staticmethod
    def of(product: Product, first: int, choice: Choice, us: float, before: float) -> Entry:
        """An entry for rows from `first` to those of the product."""
        tile = {name: count for name, count in vars(choice.tile).items() if name not in OF_A_CALL}
        times = round(us, 2), round(before, 2)
        return Entry(product.spec, product.outputs, product.inputs, first, product.rows, choice.way, tile, *times)

    def __post_init__(self) -> None:
        where = f"{self.spec} {self.outputs}x{self.inputs} {self.first}-{self.last}"
        numbers = (self.outputs, self.inputs, self.first, self.last, *self.tile.values())
        if self.way not in TILES:
            raise FormatError(f"{where}: the way {self.way!r} is none of {', '.join(TILES)}")
        want = {field.name for field in fields(TILES[self.way])} - {*OF_A_CALL}
        if set(self.tile) != want:
            raise FormatError(
                f"{where}: a tile of {self.way} has {', '.join(sorted(want))}, not {', '.join(self.tile)}"
            )
        if any(type(number) is not int or not 0 < number < 1 << 31 for number in numbers) or self.first > self.last:
            raise FormatError(
                f"{where}: sizes, rows and tiles are positive numbers of 31 bits, the last row not before the first"
            )
        try:
            QSpec.parse(self.spec)
        except SpecError as error:
            raise FormatError(f"{where}: {error}") from error

    def overlaps(self, span: Span) -> bool:
        *weight, first, last = span
        return weight == [self.spec, self.outputs, self.inputs] and self.first <= last and first <= self.last

    def choice(self, product: Product, device: Device) -> Choice:
        return Choice(self.way, replace(tile_of(self.way, product, device), **self.tile))


@dataclass(frozen=True)
class Table:
    path: Path
    entries: tuple[Entry, ...]

    def find(self, product: Product) -> Entry | None:
        span = product.spec, product.outputs, product.inputs, product.rows, product.rows
        return next((entry for entry in self.entries if entry.overlaps(span)), None)


@functools.lru_cache(maxsize=1 << 14)
def choose(product: Product, device: torch.device) -> Choice:
    """The way and tile for a product: the same for as long as the process lives, or until a table is written."""
    return _chosen(product, Device.of(device), tables(device))


def untuned(product: Product, device: torch.device) -> Choice:
    """What is chosen without the user's table."""
    return _chosen(product, Device.of(device), [table for table in tables(device) if table.path.parent == SHIPPED])


def _chosen(product: Product, device: Device, tables: Iterable[Table]) -> Choice:
    for table in tables if product.dtype.itemsize == 2 else ():
        if (entry := table.find(product)) is not None:
            if fits(choice := entry.choice(product, device), product, device):
                return choice
    return by_formula(product, device)


@functools.cache
def tables(device: torch.device) -> tuple[Table, ...]:
    """The tables for a GPU, the user's own first."""
    if device.type != "cuda":
        return ()
    found = []
    for path, key in ((user_path(device), versions(device)), (shipped_path(device), {"gpu": gpu(device)})):
        try:
            if path is not None and path.exists():
                found.append(_usable(read(path, key), Device.of(device)))
        except (FormatError, OSError) as error:
            log.warning("qcompile: the tuned choices of %s are not used: %s", path, error)
    return tuple(found)


def _usable(table: Table, device: Device) -> Table:
    """Its entries that this GPU can run; a table that was edited may have others."""
    products = [product_of(entry.spec, entry.last, entry.outputs, entry.inputs) for entry in table.entries]
    runs = [fits(entry.choice(product, device), product, device) for entry, product in zip(table.entries, products)]
    if not all(runs):
        log.warning("qcompile: %d choices of %s do not run here and are not used", runs.count(False), table.path)
    return Table(table.path, tuple(entry for entry, fine in zip(table.entries, runs) if fine))


def forget() -> None:
    """Read tables anew at the next choice."""
    tables.cache_clear()
    choose.cache_clear()


# Where they lie


def gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def versions(device: torch.device) -> dict[str, str]:
    """What times depend on."""
    return {"gpu": gpu(device), "torch": torch.__version__, "triton": _version("triton"), "kernels": _code()}


def shipped_path(device: torch.device) -> Path:
    return SHIPPED / f"{_slug(gpu(device))}.json"


def user_path(device: torch.device) -> Path | None:
    """The user's table for a GPU and these versions, there or not; None where QCOMPILE_CACHE is 0."""
    said = os.environ.get("QCOMPILE_CACHE")
    if said == "0":
        return None
    root = Path(said) if said else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qcompile"
    key = hashlib.sha256(json.dumps(versions(device)).encode()).hexdigest()[:12]
    try:
        return root.expanduser() / "tuned" / f"{_slug(gpu(device))}-{key}.json"
    except RuntimeError:  # there is no home
        return None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _code() -> str:
    """Of the kernels' files, whatever they are of: a table is made anew in minutes."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


# Files


def read(path: Path, key: dict[str, str]) -> Table:
    """The table in a file. Raises FormatError if it is not one, or was not measured with what `key` says."""
    try:
        data = json.loads(path.read_bytes())
        head = {name: data[name] for name in ("format", *key)}
        entries = tuple(Entry(**row) for row in data["entries"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"it is no table of choices ({type(error).__name__}: {error})") from error
    for name, want in {"format": FORMAT, **key}.items():
        if head[name] != want:
            raise FormatError(f"it is for {name} {head[name]}, here is {want}")
    return Table(path, entries)


def keep(entries: Sequence[Entry], measured: Collection[Span], device: torch.device) -> Path:
    """Put entries into the user's table, in the place of all those of what was `measured` again. The choices of this
    process are made anew. Raises UnsupportedError where there is no folder to write to."""
    path = user_path(device)
    if path is None:
        raise UnsupportedError("QCOMPILE_CACHE is 0: there is no folder to keep tuned choices in")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            kept = [old for old in _there(path, device) if not any(map(old.overlaps, measured))]
            _write(path, sorted([*kept, *entries], key=lambda entry: list(vars(entry).values())[:4]), device)
    except OSError as error:
        raise UnsupportedError(f"{path}: tuned choices cannot be kept there: {error}") from error
    forget()
    return path


def _there(path: Path, device: torch.device) -> tuple[Entry, ...]:
    try:
        return read(path, versions(device)).entries if path.exists() else ()
    except FormatError as error:
        log.warning("qcompile: %s is written anew: %s", path, error)
        return ()


def _write(path: Path, entries: Sequence[Entry], device: torch.device) -> None:
    head = json.dumps({"format": FORMAT, **versions(device)}, indent=1)[:-2]
    rows = ",\n".join(f"  {json.dumps(vars(entry))}" for entry in entries)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:  # a file is there whole or not at all
        file = Path(aside) / path.name
        file.write_text(f'{head},\n "entries": [\n{rows}\n ]\n}}\n', encoding="utf-8")
        os.replace(file, path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process is in here with the same path."""
    import fcntl

    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
