"""AMD Quark's own export. Tensors of a module with a weight of (out, in), by its scale's shape:

    int4, uint4   weight int32: by group (in, out/8), else (out, in/8); words interleaved by pack_method "reorder"
    int8, uint8   weight a byte each: by group (in, out), else (out, in)
    fp8           weight float8 (out, in)
    fp4, fp6      weight uint8: (out, in/2), the first code in the low half, or (out, in * 3/4), a continuous stream
    weight_scale  by group (in/group, out) for integers, (out, in/group) for floats; (out,) by row; () for all.
                  uint8: powers of two. Integers of releases before 1.0 have (out, in/group) too
    weight_zero_point   of integers, also where all are 0: (in/group, out), (out,) or (), packed like the weight

Signed integers are in two's complement. Also input_scale, input_zero_point, output_scale, one number each.
https://quark.docs.amd.com (quark/torch/utils/pack.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._bits import fields, stream
from qcompile.formats._scaled import FLOAT8, FLOATS, cache_scales, float8, pairs, scaled, shared_by
from qcompile.formats.awq import INTERLEAVED
from qcompile.formats.stored import Entry, Read, Rounding, Stored, finite
from qcompile.quant.element import Element
from qcompile.quant.granularity import Granularity, PerGroup
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

Config = dict[str, Any]

INTEGERS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
FLOAT_TAGS = {"fp4": "fp4_e2m1", "fp6_e2m3": "fp6_e2m3", "fp6_e3m2": "fp6_e3m2"}
BESIDE = ("weight_zero_point", "input_scale", "input_zero_point", "output_scale", "output_zero_point")


class Quark:
    name = "quark"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == self.name

    def weights(self, checkpoint: Checkpoint) -> Iterator[Entry]:
        config = checkpoint.quantization
        for name, info in checkpoint.tensors.items():
            module, _, kind = name.rpartition(".")
            scale = f"{module}.weight_scale"
            if kind != "weight" or (scale not in checkpoint.tensors and info.dtype in FLOATS):
                continue
            if info.dtype in FLOATS:
                raise CheckpointError(
                    f"{name} has scales and is {info.dtype}, not packed; export it with weight_format real_quantized"
                )
            checkpoint.need(scale)
            yield _weight(checkpoint, module, config)
        yield from cache_scales(checkpoint, _cached(config))


def _cached(config: Config) -> str | None:
    """The codes of a KV cache with static scales: what outputs of k_proj and v_proj are rounded to."""
    says = [_part(own, "output_tensors") for own in _part(config, "kv_cache_quant_config").values() if own]
    known = {"fp8_e4m3": "fp8_e4m3", "int8": "i8"}
    static = [
        known.get(str(own.get("dtype")))
        for own in says
        if own.get("qscheme") == "per_tensor" and not own.get("is_dynamic") and own.get("symmetric") is not False
    ]
    return static[0] if static and len(static) == len(says) and len(set(static)) == 1 else None


def _weight(checkpoint: Checkpoint, module: str, config: Config) -> Stored:
    own = _own(config, module)
    weight, scale = f"{module}.weight", f"{module}.weight_scale"
    if isinstance(own.get("weight"), list):
        raise CheckpointError(f"{weight} is quantized in {len(own['weight'])} stages, of which qcompile reads one")
    says = _part(own, "weight")
    info, tag = checkpoint.need(weight, 2), str(says.get("dtype"))
    element = FLOAT8.get(info.dtype) or FLOAT_TAGS.get(tag)
    also = [name for kind in BESIDE if (name := f"{module}.{kind}") in checkpoint.tensors]
    roundings = (_rounding(checkpoint, module, own, config, side) for side in ("input", "output"))
    if element is None:
        if tag not in INTEGERS:
            known = ", ".join((*INTEGERS, *FLOAT_TAGS, "fp8"))
            raise CheckpointError(f"{weight} is {info.dtype}, by the configuration {tag!r}; known: {known}")
        return _integers(checkpoint, module, says, "export" in config, _order(config), also, *roundings)
    rows, columns = info.shape
    codes = float8
    if info.dtype not in FLOAT8:
        checkpoint.need(weight, 2, torch.uint8)
        bits = Element.parse(element).bits
        if columns * 8 % bits:
            raise CheckpointError(f"{weight} is {info.shape}; {columns} bytes are no whole number of {bits} bits")
        columns = columns * 8 // bits
        codes = pairs if bits == 4 else _sixes
    granularity = shared_by(scale, checkpoint.need(scale).shape, rows, columns, says.get("block_size"))
    return scaled(
        checkpoint, weight, weight, scale, element, granularity, (rows, columns), codes, None, also, *roundings
    )


def _sixes(weight: Tensor, start: int, stop: int) -> Tensor:
    return stream(weight[start:stop], 6, weight.shape[1] * 8 // 6)


def _integers(
    checkpoint: Checkpoint,
    module: str,
    says: Config,
    transposed: bool,
    order: tuple[int, ...],
    also: list[str],
    *roundings: Rounding | None,
) -> Stored:
    weight, scale, zero = f"{module}.weight", f"{module}.weight_scale", f"{module}.weight_zero_point"
    bits, signed = INTEGERS[says["dtype"]], says["dtype"].startswith("int")
    words = {torch.int32} if bits == 4 else {torch.int8, torch.uint8}
    checkpoint.need(weight, 2, words)
    scales = checkpoint.need(scale, dtypes=FLOATS).shape
    grouped = len(scales) == 2
    rows, columns, granularity, transposed = _layout(checkpoint, module, bits, grouped, transposed)
    groups = granularity.scale_shape(rows, columns)
    kind = Zero.NONE
    if says.get("symmetric") is False:
        checkpoint.need(zero)
    if zero in checkpoint.tensors:
        checkpoint.need(zero, dtypes={*FLOATS, *words})
    if zero in checkpoint.tensors and not (signed and says.get("symmetric")):
        kind = Zero.FLOAT if checkpoint.need(zero).dtype in FLOATS else Zero.INT
        if kind is Zero.FLOAT and signed:
            raise CheckpointError(f"{zero} is {checkpoint.need(zero).dtype}; signed integers have integer zero points")
    spec = QSpec(Element.parse(f"{'i' if signed and kind is Zero.NONE else 'u'}{bits}"), granularity, kind)
    middle = 2 ** (bits - 1) if signed else 0

    def unpack(stored: Tensor) -> Tensor:
        """Codes along the last dimension; signed ones with half the range added."""
        found = fields(stored, 4, order) if bits == 4 else stored.contiguous().view(torch.uint8)
        return found ^ middle

    def read(tensor: Read) -> QTensor:
        stored = tensor(weight)

        def codes(start: int, stop: int) -> Tensor:
            if not grouped:
                return unpack(stored[start:stop])
            first, step = (start // 8, 8) if bits == 4 else (start, 1)
            part = unpack(stored[:, first : -(-stop // step)]).t()
            return part[start - first * step :][: stop - start]

        numbers = finite(scale, tensor(scale))
        numbers = (numbers.t() if grouped and transposed else numbers).reshape(groups).contiguous()
        point = _zeros(zero, tensor(zero), rows, groups, unpack) if zero in also else None
        if kind is Zero.NONE and point is not None and bool((point != middle).any()):
            raise CheckpointError(f"{zero} is not 0 everywhere; by the configuration {weight} is symmetric")
        return QTensor.from_rows(spec, (rows, columns), codes, numbers, None if kind is Zero.NONE else point)

    return Stored(weight, spec, (rows, columns), (weight, scale, *also), read, *roundings)


def _layout(
    checkpoint: Checkpoint, module: str, bits: int, grouped: bool, transposed: bool
) -> tuple[int, int, Granularity, bool]:
    """Outputs, inputs, who shares a scale, and whether groups come first in the shape of the scales."""
    weight, scale = f"{module}.weight", f"{module}.weight_scale"
    first, last = checkpoint.need(weight).shape
    scales, width = checkpoint.need(scale).shape, 8 if bits == 4 else 1
    if not grouped:
        return first, last * width, shared_by(scale, scales, first, last * width), False
    # Old releases left the scales as they were; where both ways fit, what the configuration knows decides.
    for way in (transposed, not transposed):
        groups, rows = scales if way else scales[::-1]
        if first and groups and first % groups == 0 and -(-rows // width) == last:
            return rows, first, PerGroup(first // groups), way
    raise CheckpointError(f"{scale} is {scales}; {weight} of {(first, last)}, by group, has {first} inputs")


def _zeros(name: str, stored: Tensor, rows: int, groups: tuple[int, int], unpack: Any) -> Tensor:
    found = finite(name, stored) if stored.is_floating_point() else unpack(stored if stored.dim() else stored[None])
    if groups == (1, 1) and found.numel():
        found = found.flatten()[:1].reshape(1, 1)
    elif found.dim() == 2:
        # Those of old releases, if floats, are (out, groups) like the scales.
        found = found.t() if found.shape[0] == groups[1] else found
        found = found[:rows]
    else:
        found = found[:rows, None]
    if found.shape != groups:
        raise CheckpointError(f"{name} is {tuple(stored.shape)}; {rows} outputs have {groups[1]} groups")
    return found.contiguous()


def _rounding(checkpoint: Checkpoint, module: str, own: Config, config: Config, side: str) -> Rounding | None:
    """How inputs or outputs are rounded."""
    says = own.get(f"{side}_tensors")
    caches = config.get("kv_cache_quant_config")
    if not says or (side == "output" and isinstance(caches, dict) and _first(caches, module) is not None):
        return None
    if isinstance(says, list):
        raise CheckpointError(f"{module}: {side}s are quantized in {len(says)} stages, of which qcompile knows one")
    if not isinstance(says, dict):
        raise CheckpointError(f"{module}: {side}_tensors is {str(says)[:80]}, not a mapping")
    tag, scheme, symmetric = str(says.get("dtype")), says.get("qscheme"), says.get("symmetric") is not False
    element = FLOAT_TAGS.get(tag, tag)
    if tag in INTEGERS:
        element = f"{'i' if symmetric and tag[0] == 'i' else 'u'}{INTEGERS[tag]}"
    # Floats of 8 bits are computed in the dtype of what is rounded, all others in float32.
    native = "/native" if tag.startswith("fp8") and scheme != "per_group" else ""
    if not says.get("is_dynamic"):
        scale, zero = f"{module}.{side}_scale", f"{module}.{side}_zero_point"
        checkpoint.need(scale)
        return Rounding(f"{element}/tensor/static{native}", scale, zero if zero in checkpoint.tensors else None)
    shares = {"per_tensor": "tensor", "per_channel": "token", "per_token": "token"}
    where = f"g{says.get('group_size')}" if scheme == "per_group" else shares.get(str(scheme))
    if where is None:
        raise CheckpointError(f"{module}: {side}s share scales {scheme!r}; known: {', '.join(shares)}, per_group")
    powers = says.get("scale_format") == "e8m0"
    option = "/scale(e8m0)" if powers else native if element.startswith("u") else f"/half{native}"
    return Rounding(f"{element}/{where}/dynamic{option}")


def _own(config: Config, module: str) -> Config:
    """What the configuration says of a module: by its name, then by its class, then of all."""
    found = _first(_part(config, "layer_quant_config"), module)
    return found or _part(_part(config, "layer_type_quant_config"), "Linear") or _part(config, "global_quant_config")


def _first(patterns: Config, module: str) -> Config | None:
    found = (own for pattern, own in patterns.items() if own and fnmatchcase(module, pattern))
    return next((own for own in found if isinstance(own, dict)), None)


def _part(config: Config, key: str) -> Config:
    part = config.get(key)
    return part if isinstance(part, dict) else {}


def _order(config: Config) -> tuple[int, ...]:
    method = _part(config, "export").get("pack_method", "reorder")
    if method not in ("reorder", "order"):
        raise CheckpointError(f"pack_method is {method!r}, neither reorder nor order")
    return INTERLEAVED if method == "reorder" else tuple(range(8))
