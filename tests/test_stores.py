"""stores."""

import copy

import pytest
import torch

from qcompile.algorithms import quantize
from qcompile.errors import FormatError
from qcompile.quant.activation import ActivationSpec
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor
from qcompile.stores import ActivationRounding, PackedWeight


def parts(spec: str, *rows: int) -> list[QTensor]:
    return [quantize(torch.randn(count, 64), QSpec.parse(spec)) for count in rows]


@pytest.mark.parametrize("spec", ["u4/g32/asym", "i8/row/sym", "u3/g64/asym_int", "nf4/g64/sym"])
def test_weights_side_by_side(spec: str) -> None:
    weights = parts(spec, 6, 2, 5)
    packed, start = PackedWeight(weights), 0
    for weight in weights:
        want = weight.dequantize(torch.float32)
        assert torch.equal(packed.dequantize(torch.float32, start, weight.rows), want)
        again = packed.tensor(start, weight.rows, weight.shape)
        assert torch.equal(again.dequantize(), want) and again.spec == weight.spec
        pieces = packed.pieces(start, weight.rows)
        assert pieces["data"].untyped_storage().data_ptr() == packed.data.untyped_storage().data_ptr()
        start += weight.rows


def test_scales_that_are_quantized_too() -> None:
    (weight,) = parts("u4/g32/asym/scale(u8/o2/asym)", 6)
    packed = PackedWeight([weight])
    assert torch.equal(packed.dequantize(torch.float32), weight.dequantize())
    assert {"data", "scale.data", "scale.scale", "scale.zero", "zero"} == packed.pieces(0, 6).keys()


def test_a_dtype_changes_no_number() -> None:
    packed = PackedWeight(parts("u4/g32/asym", 6))
    before = {name: piece.clone() for name, piece in packed.pieces(0, 6).items()}
    packed = copy.deepcopy(packed).half().to(torch.bfloat16)
    assert all(torch.equal(piece, before[name]) for name, piece in packed.pieces(0, 6).items())
    assert packed.state_dict() == {}


def test_a_static_rounding_needs_its_scale() -> None:
    with pytest.raises(FormatError, match="i8/tensor/static needs scale, got no scale"):
        ActivationRounding(ActivationSpec.parse("i8/tensor/static"))
    with pytest.raises(FormatError, match="i8/token/dynamic needs no scale, got scale"):
        ActivationRounding(ActivationSpec.parse("i8/token/dynamic"), torch.tensor(1.0))
    with pytest.raises(FormatError, match="u8/tensor/static needs scale and zero, got scale"):
        ActivationRounding(ActivationSpec.parse("u8/tensor/static"), torch.tensor(1.0))
