"""compressed-tensors' configuration: which scheme a module has, and how its inputs and outputs are rounded."""

from __future__ import annotations

import re
from typing import Any

import torch

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.stored import Rounding

Scheme = dict[str, Any]

_FLOAT8 = {"num_bits": 8, "type": "float", "dynamic": True}
_FLOAT4 = {"num_bits": 4, "type": "float", "dynamic": True}
# Inputs of the schemes that have a name; W4A8 and its like speak for themselves.
PRESETS: dict[str, Scheme | None] = {
    "UNQUANTIZED": None,
    "W4AFP8": {**_FLOAT8, "strategy": "token"},
    "FP8": {**_FLOAT8, "strategy": "tensor", "dynamic": False},
    "FP8_DYNAMIC": {**_FLOAT8, "strategy": "token"},
    "FP8_BLOCK": {**_FLOAT8, "strategy": "group", "group_size": 128},
    "NVFP4": {**_FLOAT4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    "NVFP4A16": None,
    "MXFP4": {**_FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "MXFP4A16": None,
    "MXFP8": {**_FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "MXFP8A16": None,
}


def schemes(config: Scheme) -> dict[str, Scheme]:
    """The scheme of each target."""
    groups, found = config.get("config_groups") or {}, {}
    for name, group in groups.items() if isinstance(groups, dict) else ():
        # {"W4A16": ["Linear"]} is the scheme of that name, {"group_0": {"targets": ["Linear"], …}} states one.
        own = _preset(str(name).upper()) if isinstance(group, list) else group
        targets = group if isinstance(group, list) else own.get("targets") if isinstance(own, dict) else None
        for target in targets if isinstance(targets, list) else ():
            found[str(target)] = own
    return found


def _preset(name: str) -> Scheme:
    widths = re.fullmatch(r"W([2-8])A(4|8|16)(_ASYM)?", "W8A8" if name == "INT8" else name)
    if widths is None and name not in PRESETS:
        raise CheckpointError(f"config_groups: unknown scheme {name!r}; known: W4A16, W8A8, …, {', '.join(PRESETS)}")
    if widths is None:
        block = [128, 128] if name == "FP8_BLOCK" else None
        bits = 4 if name == "W4AFP8" else None
        return {"weights": {"num_bits": bits, "block_structure": block}, "input_activations": PRESETS[name]}
    inputs = {"num_bits": int(widths[2]), "type": "int", "strategy": "token", "dynamic": True}
    return {"weights": {"num_bits": int(widths[1])}, "input_activations": None if widths[2] == "16" else inputs}


def scheme(schemes: dict[str, Scheme], module: str) -> Scheme:
    """The scheme of a module; empty if the configuration has none."""
    if module in schemes:
        return schemes[module]
    for target in sorted(schemes):
        try:
            if target.startswith("re:") and re.match(target[3:], module):
                return schemes[target]
        except re.error as error:
            raise CheckpointError(f"config_groups: {target!r} is no regular expression: {error}") from error
    classes = [scheme for target, scheme in schemes.items() if not target.startswith("re:") and "." not in target]
    return schemes.get("Linear") or (classes[0] if len(classes) == 1 else {})


def rounding(checkpoint: Checkpoint, module: str, scheme: Scheme, side: str) -> Rounding | None:
    """How inputs or outputs are rounded. The library computes in the dtype of what it rounds, or of the scale."""
    args = part(scheme, f"{side}_activations")
    if not args:
        return None
    bits, size, symmetric = args.get("num_bits", 8), args.get("group_size"), args.get("symmetric", True)
    element = f"{'i' if symmetric else 'u'}{bits}"
    if args.get("type") == "float":
        element = {4: "fp4_e2m1", 8: "fp8_e4m3"}.get(bits if type(bits) is int else 0, f"fp{bits}")
    strategy = args.get("strategy") or ("group" if size else "tensor")
    if strategy == "tensor_group":
        divisor = f"{module}.{side}_global_scale"
        checkpoint.need(divisor, dtypes=torch.float32)
        return Rounding(f"{element}/g{size}/dynamic/scale(fp8_e4m3)", divisor)
    if not args.get("dynamic"):
        if strategy != "tensor":
            raise CheckpointError(f"{module}: {side}s by {strategy} have static scales, which only a tensor can have")
        scale, zero = f"{module}.{side}_scale", f"{module}.{side}_zero_point"
        native = "/native" if checkpoint.need(scale).dtype.itemsize == 2 else ""
        return Rounding(f"{element}/tensor/static{native}", scale, zero if zero in checkpoint.tensors else None)
    if strategy not in ("tensor", "token", "group"):
        raise CheckpointError(
            f"{module}: {side}s share scales by {strategy}; known: tensor, token, group, tensor_group"
        )
    powers = size == 32 and (element == "fp4_e2m1" or "uint8" in str(args.get("scale_dtype")))
    option = "/scale(e8m0)" if powers else "/half/native" if symmetric else "/native"
    return Rounding(f"{element}/{f'g{size}' if strategy == 'group' else strategy}/dynamic{option}")


def part(scheme: Scheme, key: str) -> Scheme:
    part = scheme.get(key)
    return part if isinstance(part, dict) else {}
