"""How torchao rounds what a weight is multiplied by, as each of its classes says it."""

from __future__ import annotations

import math
from typing import Any

import torch

from qcompile.errors import CheckpointError
from qcompile.formats._torchao_weight import Weight, named
from qcompile.formats.stored import Rounding

FLOAT8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


def of_int8(weight: Weight) -> Rounding | None:
    if (rule := _rule(weight)) is None:
        return None
    if rule.get("reduce_range"):
        raise CheckpointError(
            f"{weight.path} asks for activations of reduced range, 7 bits, which are not rounded here"
        )
    mapping = named(rule.get("mapping_type")) or "SYMMETRIC"
    if mapping not in ("SYMMETRIC", "ASYMMETRIC"):
        raise CheckpointError(f"{weight.path}: unknown mapping_type {mapping!r} of activations")
    element = "i8" if mapping == "SYMMETRIC" else "u8"
    if weight.has("act_quant_scale"):
        zero = weight.name("act_quant_zero_point") if weight.has("act_quant_zero_point") else None
        return Rounding(f"{element}/tensor/static", weight.name("act_quant_scale"), zero)
    return Rounding(f"{element}/{_sharing(weight, rule)}/dynamic" + ("/half" if element == "i8" else ""))


def of_intx(weight: Weight) -> Rounding | None:
    rule = weight.attribute("activation_quantization")
    if rule not in (None, "int8_asym_per_token", "INT8_ASYM_PER_TOKEN"):
        raise CheckpointError(f"{weight.path}: unknown activation_quantization {rule!r}; known: int8_asym_per_token")
    return Rounding("u8/token/dynamic") if rule else None


def of_float8(weight: Weight) -> Rounding | None:
    if (rule := _rule(weight)) is None:
        return None
    said = named(rule.get("float8_dtype")) or "float8_e4m3fn"
    elements = {str(dtype).removeprefix("torch."): element for dtype, element in FLOAT8.items()}
    if str(said) not in elements:
        raise CheckpointError(f"{weight.path}: unknown float8_dtype {said!r} of activations; known: {list(elements)}")
    text = f"{elements[said]}/{_sharing(weight, rule)}/dynamic"
    for option, key in (("max", "hp_value_ub"), ("min", "hp_value_lb")):
        if (bound := rule.get(key)) is not None:
            if type(bound) not in (int, float) or not 0 <= bound < math.inf:
                raise CheckpointError(f"{weight.path}: {key} is {bound!r}, not a magnitude")
            text += f"/{option}({float(bound)})"
    return Rounding(text)


def of_int4(weight: Weight) -> Rounding | None:
    rule = weight.attribute("activation_dtype")
    if rule not in (None, "bfloat16", "float8_e4m3fn"):
        raise CheckpointError(f"{weight.path}: unknown activation_dtype {rule!r}; known: bfloat16, float8_e4m3fn")
    # float8 activations are rounded by row.
    return Rounding("fp8_e4m3/token/dynamic") if rule == "float8_e4m3fn" else None


def _rule(weight: Weight) -> dict[str, Any] | None:
    """The attributes of act_quant_kwargs; None where activations stay as they are."""
    value = weight.data.get("act_quant_kwargs")
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("_data"), dict):
        raise CheckpointError(f"{weight.path}: act_quant_kwargs is {str(value)[:80]}, not a description")
    return value["_data"]


def _sharing(weight: Weight, rule: dict[str, Any]) -> str:
    said = rule.get("granularity")
    kind = said.get("_type") if isinstance(said, dict) else None
    if kind not in ("PerRow", "PerTensor"):
        raise CheckpointError(f"{weight.path}: activations by {str(said)[:80]}; known: PerRow, PerTensor")
    return "token" if kind == "PerRow" else "tensor"
