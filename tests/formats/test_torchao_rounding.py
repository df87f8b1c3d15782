"""What torchao's classes say of activations, read and refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from qcompile.errors import CheckpointError
from qcompile.formats._torchao_rounding import of_float8, of_int4, of_int8, of_intx
from qcompile.formats._torchao_weight import Weight
from qcompile.formats.stored import Rounding
from qcompile.quant.activation import ActivationSpec

OF = {"Int8Tensor": of_int8, "IntxUnpackedToInt8Tensor": of_intx, "Float8Tensor": of_float8, "Int4Tensor": of_int4}
ROW, TENSOR = ({"_type": kind, "_data": {}} for kind in ("PerRow", "PerTensor"))


def of(kind: str, data: dict[str, Any], tensors: tuple[str, ...] = ()) -> Rounding | None:
    checkpoint: Any = SimpleNamespace(tensors=dict.fromkeys(f"m._weight_{name}" for name in tensors))
    return OF[kind](Weight(checkpoint, "m.weight", kind, data))


def by(**rule: Any) -> dict[str, Any]:
    return {"act_quant_kwargs": {"_data": rule}}


@pytest.mark.parametrize(
    ("kind", "data", "text"),
    [
        ("Int8Tensor", {}, None),
        ("Int8Tensor", {"act_quant_kwargs": None}, None),
        ("Int8Tensor", by(granularity=ROW), "i8/token/dynamic/half"),
        ("Int8Tensor", by(granularity=TENSOR, mapping_type={"_data": "SYMMETRIC"}), "i8/tensor/dynamic/half"),
        ("Int8Tensor", by(granularity=ROW, mapping_type={"_data": "ASYMMETRIC"}), "u8/token/dynamic"),
        ("IntxUnpackedToInt8Tensor", {}, None),
        ("IntxUnpackedToInt8Tensor", {"activation_quantization": "int8_asym_per_token"}, "u8/token/dynamic"),
        ("Float8Tensor", {}, None),
        ("Float8Tensor", by(granularity=TENSOR), "fp8_e4m3/tensor/dynamic"),
        ("Float8Tensor", by(granularity=ROW, hp_value_ub=1200), "fp8_e4m3/token/dynamic/max(1200.0)"),
        ("Float8Tensor", by(granularity=ROW, hp_value_lb=0.5), "fp8_e4m3/token/dynamic/min(0.5)"),
        ("Float8Tensor", by(granularity=ROW, float8_dtype={"_data": "float8_e5m2"}), "fp8_e5m2/token/dynamic"),
        ("Int4Tensor", {"activation_dtype": {"_data": "bfloat16"}}, None),
        ("Int4Tensor", {"activation_dtype": {"_data": "float8_e4m3fn"}}, "fp8_e4m3/token/dynamic"),
    ],
)
def test_rounding(kind: str, data: dict[str, Any], text: str | None) -> None:
    rounding = of(kind, data)
    assert (rounding and rounding.spec) == text
    assert text is None or str(ActivationSpec.parse(text)) == text


def test_static_numbers_are_tensors_beside_the_weight() -> None:
    scale, zero = "m._weight_act_quant_scale", "m._weight_act_quant_zero_point"
    symmetric, asymmetric = by(granularity=ROW), by(granularity=ROW, mapping_type={"_data": "ASYMMETRIC"})
    assert of("Int8Tensor", symmetric, ("act_quant_scale",)) == Rounding("i8/tensor/static", scale)
    both = ("act_quant_scale", "act_quant_zero_point")
    assert of("Int8Tensor", asymmetric, both) == Rounding("u8/tensor/static", scale, zero)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("Int8Tensor", {"act_quant_kwargs": "x"}, "act_quant_kwargs is x, not a description"),
        ("Int8Tensor", by(granularity={"_type": "PerX"}), "activations by .*PerX.*; known: PerRow, PerTensor"),
        ("Int8Tensor", by(granularity=ROW, reduce_range=True), "reduced range, 7 bits"),
        ("Int8Tensor", by(granularity=ROW, mapping_type={"_data": "X"}), "unknown mapping_type 'X'"),
        ("IntxUnpackedToInt8Tensor", {"activation_quantization": "x"}, "unknown activation_quantization 'x'"),
        ("Float8Tensor", by(granularity=ROW, float8_dtype="x"), "unknown float8_dtype 'x'"),
        ("Float8Tensor", by(granularity=ROW, hp_value_lb=-1), "hp_value_lb is -1, not a magnitude"),
        ("Int4Tensor", {"activation_dtype": "x"}, "unknown activation_dtype 'x'"),
    ],
)
def test_errors(kind: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"m.weight.*{message}"):
        of(kind, data)
