"""What is in a checkpoint: how each parameter is stored. Headers are read, and the few tensors that formats go by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qcompile import formats, models
from qcompile.errors import LoadError
from qcompile.explain import size, without_numbers
from qcompile.files.checkpoint import Checkpoint, open_checkpoint
from qcompile.formats import CacheCodes, Dense, Ignored, Stored


@dataclass(frozen=True)
class Row:
    """One parameter: its spec, or the dtype that it is stored in, how activations are rounded, and its bytes."""

    path: str
    shape: tuple[int, ...]
    stored: str
    quantized: bool
    inputs: str
    outputs: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint: the name of its method, None for a float one, its files with their bytes, and its parameters."""

    place: str
    method: str | None
    files: Mapping[str, int]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        total, quantized = sum(self.files.values()), [row for row in self.rows if row.quantized]
        counts: Counter[tuple[str, ...]] = Counter()
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            counts[without_numbers(row.path), shape, row.stored, row.inputs, row.outputs, size(row.nbytes)] += 1
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        headers = ["parameter", "shape", "stored as", "inputs rounded", "outputs rounded", "bytes", "times"]
        kept = [column for column in range(6) if any(key[column] for key in counts)]
        table = [[*(key[column] for column in kept), times] for key, times in counts.items()]
        return (
            f"checkpoint  {self.place}   {self.method or 'float'}   {size(total)} in {files}\n"
            f"weights     {len(quantized)} of {len(self.rows)} parameters quantized, {_bits(quantized)}\n\n"
            + tabulate(table, headers=[*(headers[column] for column in kept), "times"], disable_numparse=True)
        )


def inspect_checkpoint(name: str) -> Inspection:
    """What the checkpoint in a folder or a .gguf file holds. Raises LoadError where there is none, CheckpointError for
    files that are not what they should be."""
    path = _path(name)
    checkpoint = open_checkpoint(path)
    method = formats.find(checkpoint)
    checkpoint.shapes = _Shapes(path)
    rows, taken = [], set()
    for entry in method.weights(checkpoint) if method else ():
        taken.update(entry.tensors if isinstance(entry, Stored | Ignored | CacheCodes) else ())
        if isinstance(entry, Stored):
            nbytes = sum(checkpoint.tensors[tensor].nbytes for tensor in entry.tensors)
            inputs, outputs = (side.spec if side else "" for side in (entry.input, entry.output))
            rows.append(Row(entry.path, tuple(entry.shape), str(entry.spec), True, inputs, outputs, nbytes))
        elif isinstance(entry, Dense):
            taken.add(entry.tensor)
            rows.append(_dense(checkpoint, entry.path, entry.tensor))
    rows += [_dense(checkpoint, tensor, tensor) for tensor in checkpoint.tensors if tensor not in taken]
    files = {file.path.name: file.path.stat().st_size for file in checkpoint.files}
    return Inspection(str(path), method.name if method else None, files, tuple(rows))


def _path(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        return path  # tensors tell without a configuration
    source = models.find(name)
    if not source.local:
        raise LoadError(f"{name} is no folder and no .gguf file here; download it first: hf download {name}")
    return Path(source.place) / source.gguf if source.gguf else Path(source.place)


def _dense(checkpoint: Checkpoint, path: str, tensor: str) -> Row:
    info = checkpoint.tensors[tensor]
    return Row(path, info.shape, str(info.dtype).removeprefix("torch."), False, "", "", info.nbytes)


def _bits(rows: list[Row]) -> str:
    numbers = 0
    for row in rows:
        count = 1
        for side in row.shape:
            count *= side
        numbers += count
    return f"{8 * sum(row.nbytes for row in rows) / numbers:.2f} bits a weight" if numbers else "all are floats"


class _Shapes(Mapping[str, tuple[int, ...]]):
    """The shapes of the model's parameters, from its configuration, for the formats that ask."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, tuple[int, ...]] | None = None

    def _read(self) -> dict[str, tuple[int, ...]]:
        if self.known is None:
            self.known = {}
            if (self.path / "config.json").is_file():
                model = models.empty(models.find(str(self.path)), "stored")
                self.known = {path: tuple(tensor.shape) for path, tensor in model.state_dict().items()}
        return self.known

    def __getitem__(self, path: str) -> tuple[int, ...]:
        return self._read()[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())
