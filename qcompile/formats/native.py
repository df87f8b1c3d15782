"""qcompile's own format; writers/native.py writes it, and its docstring has the layout."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from qcompile.errors import CheckpointError, SpecError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._scaled import cache_scales
from qcompile.formats.stored import Entry, Read, Rounding, Stored, finite
from qcompile.quant.codebook import CodebookTensor
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

VERSION = 1


class Native:
    name = "qcompile"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == "qcompile"

    def weights(self, checkpoint: Checkpoint) -> Iterator[Entry]:
        said = checkpoint.quantization
        if said.get("version") != VERSION:
            raise CheckpointError(f"quantization_config: version {said.get('version')!r}; this reads {VERSION}")
        inputs, outputs = _mapping(said, "inputs"), _mapping(said, "outputs")
        for path, entry in _mapping(said, "weights").items():
            spec, shape = _entry(path, entry)
            if isinstance(spec, str):
                yield _codebooks(checkpoint, path, spec, shape)
                continue
            module = path.rpartition(".")[0]
            sides = (_rounding(checkpoint, module, "input", inputs), _rounding(checkpoint, module, "output", outputs))
            order = f"{path}.order" if f"{path}.order" in checkpoint.tensors else None
            static = (name for side in sides if side for name in (side.scale, side.zero))
            names = [name for name in (*_names(path, spec), order, *static) if name]
            for name in names:
                checkpoint.need(name)
            yield Stored(path, spec, shape, tuple(names), _reader(path, spec, shape, order), *sides)
        yield from cache_scales(checkpoint, said.get("kv_cache"))


def _mapping(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(found := said.get(key, {}), dict):
        raise CheckpointError(f"quantization_config: {key} is a {type(found).__name__}, not a mapping")
    return found


def _codebooks(checkpoint: Checkpoint, path: str, spec: str, shape: tuple[int, ...]) -> Stored:
    """A weight of tiles: its pieces are named as CodebookTensor.parts() has them."""
    known = re.compile(re.escape(path) + r"\.((?:data|book)\d{0,2}|outlier_codes|outlier_book|scale|shift|order)")
    names = {found[1]: name for name in checkpoint.tensors if (found := known.fullmatch(name))}
    if len(shape) != 2:
        raise CheckpointError(f"{path}: {spec} of shape {shape} is not a matrix")

    def read(tensor: Read) -> CodebookTensor:
        pieces = {piece: tensor(name) for piece, name in names.items()}
        for piece, numbers in pieces.items():
            if numbers.is_floating_point():
                finite(names[piece], numbers)
        made = CodebookTensor.from_parts((shape[0], shape[1]), pieces)
        if made.spec != spec:
            raise CheckpointError(f"{path} is {made.spec} by its tensors, {spec} by the configuration")
        return made

    return Stored(path, spec, shape, tuple(names.values()), read)


def _entry(path: str, entry: Any) -> tuple[QSpec | str, tuple[int, ...]]:
    where = f"quantization_config: weights[{path!r}]"
    if not isinstance(entry, dict) or set(entry) != {"spec", "shape"} or not isinstance(entry["spec"], str):
        raise CheckpointError(f"{where} is {str(entry)[:80]}, not a spec and a shape")
    shape = entry["shape"]
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(n) is int and n > 0 for n in shape):
        raise CheckpointError(f"{where}: shape {str(shape)[:80]} is not one of a weight")
    if entry["spec"].startswith("codebook/"):
        return entry["spec"], tuple(shape)
    try:
        spec = QSpec.parse(entry["spec"])
        spec.scale_shape(math.prod(shape[:-1]), shape[-1])
    except SpecError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return spec, tuple(shape)


def _names(path: str, spec: QSpec) -> Iterator[str]:
    """The tensors of a weight, without its order."""
    yield f"{path}.data"
    for key, nested, there in (("scale", spec.scale_spec, True), ("zero", spec.zero_spec, spec.zero is not Zero.NONE)):
        if nested:
            yield from _names(f"{path}.{key}", nested)
        elif there:
            yield f"{path}.{key}"


def _reader(path: str, spec: QSpec, shape: tuple[int, ...], order: str | None):
    def read(tensor: Read) -> QTensor:
        return _read(tensor, path, spec, shape, None if order is None else tensor(order))

    return read


def _read(tensor: Read, path: str, spec: QSpec, shape: tuple[int, ...], order: Tensor | None) -> QTensor:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    groups = spec.scale_shape(rows, shape[-1])
    sides: list[Tensor | QTensor | None] = []
    for key, nested, there in (("scale", spec.scale_spec, True), ("zero", spec.zero_spec, spec.zero is not Zero.NONE)):
        if nested:
            sides.append(_read(tensor, f"{path}.{key}", nested, groups, None))
        else:
            sides.append(finite(f"{path}.{key}", tensor(f"{path}.{key}")) if there else None)
    scale, zero = sides
    assert scale is not None
    return QTensor(spec, shape, tensor(f"{path}.data"), scale, zero, order)


def _rounding(checkpoint: Checkpoint, module: str, side: str, said: Mapping[str, Any]) -> Rounding | None:
    if (spec := said.get(module)) is None:
        return None
    if not isinstance(spec, str):
        raise CheckpointError(f"quantization_config: {side}s[{module!r}] is {spec!r}, not an activation spec")
    scale, zero = (f"{module}.{side}_rounding.{key}" for key in ("scale", "zero"))
    return Rounding(spec, *(name if name in checkpoint.tensors else None for name in (scale, zero)))
