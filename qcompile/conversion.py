"""Names in checkpoints that are not the model's: what transformers' loader renames and joins is done here, packed.

Transformers keeps the experts of a layer as one parameter, (experts, 2 * intermediate, hidden) for gate and up, while
checkpoints store each expert's linears. Rows of packed weights lie side by side as they are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.stored import Dense, Entry, Ignored, Joined, Read, Stored
from qcompile.quant.granularity import PerBlock, PerGroup, PerRow, PerTensor
from qcompile.quant.tensor import QTensor


def convert(model: nn.Module, checkpoint: Checkpoint, entries: Sequence[Entry], places: Collection[str]) -> list[Entry]:
    """`entries` under the names that the model has (`places`), and entries for tensors whose names it does not have.

    Raises CheckpointError for a conversion that packed weights cannot go through.
    """
    read = {name for entry in entries for name in _tensors(entry)}
    plain = [Dense(name, name) for name in checkpoint.tensors if name not in read and name not in places]
    transforms, prefix = _transforms(model), f"{getattr(model, 'base_model_prefix', '')}."
    done: list[Entry] = []
    joined: dict[str, list[tuple[int, tuple[Any, ...], Entry]]] = defaultdict(list)
    operations: dict[str, list[str]] = {}
    for entry in (*entries, *plain):
        if isinstance(entry, Ignored) or entry.path in places:
            done.append(entry)
            continue
        path = entry.path
        for transform in transforms:
            renamed, pattern = transform.rename_source_key(path)
            if pattern is not None and hasattr(transform, "operations"):
                renamed = _placed(renamed, places, prefix)
                rank = (transform.source_patterns.index(pattern), _natural(path))
                joined[renamed].append((rank[0], rank[1], entry))
                operations[renamed] = [type(operation).__name__ for operation in transform.operations]
                break
            path = renamed
        else:
            path = _placed(path, places, prefix)
            if path in places or not isinstance(entry, Dense) or entry.path != entry.tensor:
                done.append(replace(entry, path=path))  # what it does not have stays, to be reported by its own name
    for path, parts in joined.items():
        done.append(_join(path, parts, operations[path]))
    return done


def _transforms(model: nn.Module) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return get_model_conversion_mapping(model) if hasattr(model, "base_model_prefix") else []  # type: ignore[arg-type]


def _placed(path: str, places: Collection[str], prefix: str) -> str:
    """A checkpoint of the base model has its names without the prefix that the whole model puts before them."""
    candidates = (path, prefix + path, path.removeprefix(prefix))
    return next((candidate for candidate in candidates if candidate in places), path)


def _natural(path: str) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path))


def _tensors(entry: Entry) -> tuple[str, ...]:
    return (entry.tensor,) if isinstance(entry, Dense) else entry.tensors


def _join(path: str, parts: list[tuple[int, tuple[Any, ...], Entry]], operations: list[str]) -> Entry:
    """One entry for the linears of all experts: for each expert gate and up, or down alone."""
    if operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        raise CheckpointError(f"{path} is made by {', '.join(operations)}, which is not known for packed weights")
    kinds: dict[int, list[Entry]] = defaultdict(list)
    for kind, _, entry in sorted(parts, key=lambda part: part[:2]):
        kinds[kind].append(entry)
    counts = {len(entries) for entries in kinds.values()}
    if len(counts) > 1:
        raise CheckpointError(f"{path}: {' and '.join(str(count) for count in sorted(counts))} experts of each kind")
    experts = list(zip(*(kinds[kind] for kind in sorted(kinds)), strict=True))
    flat = [entry for expert in experts for entry in expert]
    names = tuple(name for entry in flat for name in _tensors(entry))
    if all(isinstance(entry, Stored) for entry in flat):
        return _stacked(path, [entry for entry in flat if isinstance(entry, Stored)], len(experts), names)
    dense = [entry for entry in flat if isinstance(entry, Dense)]
    if len(dense) < len(flat):
        raise CheckpointError(f"{path}: some of its experts are quantized and others are not")

    def read(tensor: Read) -> Tensor:
        rows = torch.cat([entry.value(tensor(entry.tensor)) for entry in dense])
        return rows.reshape(len(experts), -1, rows.shape[-1])

    return Joined(path, names, read)


def _stacked(path: str, weights: Sequence[Stored], experts: int, names: tuple[str, ...]) -> Stored:
    specs, widths = {str(weight.spec) for weight in weights}, {weight.shape[-1] for weight in weights}
    if len(specs) > 1 or len(widths) > 1:
        raise CheckpointError(f"{path}: its experts are {', '.join(sorted(specs))}; one parameter has one spec")
    spec = weights[0].spec
    if isinstance(spec, str):
        raise CheckpointError(f"{path}: its experts have codebooks of their own ({spec}); one parameter has one")
    by_row = replace(spec, granularity=PerRow()) if isinstance(spec.granularity, PerTensor) else spec
    flat = replace(by_row, scale_spec=None, zero_spec=None)
    if any(weight.input or weight.output for weight in weights):
        raise CheckpointError(f"{path}: rounded activations of experts are not known; quantize_inputs=False loads it")
    rows = sum(weight.shape[0] for weight in weights)
    shape = (experts, rows // experts, weights[0].shape[-1])

    def read(tensor: Read) -> QTensor:
        parts = [_rows_alone(path, weight.read(tensor)) for weight in weights]
        zeros = [part.zero for part in parts if isinstance(part.zero, Tensor)]
        scales = [part.scale for part in parts if isinstance(part.scale, Tensor)]
        data = torch.cat([part.data for part in parts])
        return QTensor(flat, shape, data, torch.cat(scales), torch.cat(zeros) if zeros else None)

    return Stored(path, flat, shape, names, read)


def _rows_alone(path: str, part: Any) -> QTensor:
    """The same numbers with scales that rows carry with them."""
    granularity = part.spec.granularity
    whole_blocks = isinstance(granularity, PerBlock) and part.rows % granularity.height == 0
    whole_groups = isinstance(granularity, PerGroup) and part.columns % granularity.size == 0
    if part.order is not None or not (whole_blocks or whole_groups or isinstance(granularity, PerTensor | PerRow)):
        why = "an order of columns" if part.order is not None else f"scales of {granularity} over {part.shape}"
        raise CheckpointError(f"{path}: an expert has {why} of its own")

    def side(numbers: Tensor | QTensor) -> Tensor:
        plain = numbers.dequantize() if isinstance(numbers, QTensor) else numbers
        return plain.expand(part.rows, -1).contiguous() if isinstance(granularity, PerTensor) else plain

    by_row = PerRow() if isinstance(granularity, PerTensor) else granularity
    spec = replace(part.spec, granularity=by_row, scale_spec=None, zero_spec=None)
    zero = None if part.zero is None else side(part.zero)
    return QTensor(spec, part.shape, part.data, side(part.scale), zero)
