import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.element import ELEMENTS
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

NESTED = "u4/g64/asym/scale(u8/o4/asym)/zero(u8/tensor/asym)"


def make(text: str, shape: tuple[int, ...] = (8, 128), dtype: torch.dtype = torch.float32) -> QTensor:
    """Random codes, scales and zero points."""
    spec = QSpec.parse(text)
    codes = torch.randint(0, spec.element.levels, shape, dtype=torch.uint8)
    groups = spec.scale_shape(codes[..., 0].numel(), shape[-1])

    def side(nested: QSpec | None) -> Tensor | QTensor:
        return make(str(nested), groups, dtype) if nested else torch.rand(groups).to(dtype) + 1

    zeros = {
        "sym": lambda: None,
        "asym": lambda: side(spec.zero_spec),
        "shift": lambda: side(spec.zero_spec),
        "asym_int": lambda: torch.randint(0, spec.element.levels, groups, dtype=torch.uint8),
    }
    return QTensor.from_codes(spec, codes, side(spec.scale_spec), zeros[spec.zero.value]())


def elements(side: Tensor | QTensor | None, spec: QSpec, rows: int, columns: int) -> Tensor:
    """Scales or zero points, one for each element, in float64, by the definition of the granularity."""
    side = side.dequantize() if isinstance(side, QTensor) else side
    assert side is not None
    flat, tag = side.double().flatten(), str(spec.granularity)
    n = torch.arange(rows * columns)
    if tag[0] == "b":
        height, width = map(int, tag[1:].split("x"))
        return flat[n // columns // height * -(-columns // width) + n % columns // width].reshape(rows, columns)
    size = int(tag[1:]) if tag[0] in "go" else 1
    group = {"t": n * 0, "r": n // columns, "g": n // size, "o": n % (n.numel() // size)}[tag[0]]
    return flat[group].reshape(rows, columns)


INTEGERS = [tag for tag, element in ELEMENTS.items() if not element.is_float]


@pytest.mark.parametrize("element", INTEGERS)
@pytest.mark.parametrize("granularity", ["tensor", "row", "g16", "g192", "o4", "b5x32"])
def test_dequantize_is_code_minus_zero_times_scale(element: str, granularity: str) -> None:
    for zero in {"u": ["sym", "asym", "asym_int"], "i": ["sym"], "t": ["sym", "asym", "asym_int"]}[element[0]]:
        q = make(f"{element}/{granularity}/{zero}", (12, 80))
        shift = q.spec.offset if q.zero is None else elements(q.zero, q.spec, 12, 80)
        want = (q.codes().double() - shift) * elements(q.scale, q.spec, 12, 80)
        torch.testing.assert_close(q.dequantize(torch.float64), want, rtol=0, atol=0)
        torch.testing.assert_close(q.dequantize().double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("granularity", ["row", "g16"])
def test_dequantize_adds_a_shift_after_scaling(granularity: str) -> None:
    q = make(f"u4/{granularity}/shift", (12, 80))
    want = q.codes().double() * elements(q.scale, q.spec, 12, 80) + elements(q.zero, q.spec, 12, 80)
    torch.testing.assert_close(q.dequantize(torch.float64), want, rtol=0, atol=0)


@pytest.mark.parametrize("element", [tag for tag in ELEMENTS if tag not in INTEGERS])
def test_dequantize_of_floats_is_number_times_scale(element: str) -> None:
    q = make(f"{element}/g16/sym", (12, 80))
    want = q.spec.element.decode(q.codes(), torch.float64) * elements(q.scale, q.spec, 12, 80)
    torch.testing.assert_close(q.dequantize(torch.float64), want, rtol=0, atol=0, equal_nan=True)


def test_nested_scales_and_zeros() -> None:
    q = make(NESTED)
    want = (q.codes().double() - elements(q.zero, q.spec, 8, 128)) * elements(q.scale, q.spec, 8, 128)
    torch.testing.assert_close(q.dequantize().double(), want, rtol=1e-6, atol=1e-5)
    assert {name: part.shape[-1] for name, part in q.parts().items()} == {"data": 64, "scale": 2, "zero": 2}


def test_a_float64_scale_makes_a_product_a_quotient() -> None:
    codes = torch.arange(127, dtype=torch.uint8).reshape(1, -1)
    for divisor in torch.rand(200).mul(1000):
        scale = 1 / divisor.double().reshape(1, 1)
        q = QTensor.from_codes(QSpec.parse("fp8_e4m3/tensor/sym"), codes, scale, None)
        assert torch.equal(q.dequantize(), codes.view(torch.float8_e4m3fn).float() / divisor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once(dtype: torch.dtype) -> None:
    q = make("u4/g64/asym", dtype=dtype)
    assert torch.equal(q.dequantize(dtype), q.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 4, 5), (2, 3, 4, 64)])
def test_leading_dimensions_are_rows(shape: tuple[int, ...]) -> None:
    q = make("u3/row/asym", shape)
    assert (q.rows, q.columns) == (q.data.shape[0], shape[-1])
    assert q.codes().shape == q.dequantize().shape == shape
    assert torch.equal(QTensor.from_codes(q.spec, q.codes(), q.scale, q.zero).data, q.data)


@pytest.mark.parametrize("text", ["u3/g64/asym", "u4/g64/asym_int", "i5/row/sym", "ternary/o4/asym", NESTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nbytes_is_what_the_spec_foretells(text: str, dtype: torch.dtype) -> None:
    q = make(text, (8, 192), dtype)
    assert q.nbytes == q.spec.nbytes(8, 192, dtype.itemsize)


def test_parts_and_to() -> None:
    assert list(make("i4/g64/sym").parts()) == ["data", "scale"]
    q = make(NESTED)
    assert list(q.parts()) == ["data", "scale", "zero"]
    moved = q.to("meta")
    assert isinstance(moved.scale, QTensor)
    assert moved.data.is_meta
    assert moved.scale.data.is_meta
    assert (moved.spec, moved.shape) == (q.spec, q.shape)


ASYM, INT, SYM = "u4/g64/asym", "u4/g64/asym_int", "i4/g64/sym"


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (ASYM, {"shape": (8, 64)}, "u4/g64/asym of shape (8, 64) needs data (8, 32), got (8, 64)"),
        (ASYM, {"shape": (4, 128)}, "u4/g64/asym of shape (4, 128) needs data (4, 64), got (8, 64)"),
        (ASYM, {"shape": ()}, "u4/g64/asym of shape (): a quantized weight has at least one dimension"),
        (ASYM, {"data": torch.zeros(8, 64)}, "data is torch.float32, packed codes are torch.uint8"),
        (ASYM, {"scale": torch.zeros(8, 1)}, "u4/g64/asym of shape (8, 128) needs scale (8, 2), got (8, 1)"),
        (ASYM, {"scale": torch.zeros(16)}, "needs scale (8, 2), got (16,)"),
        (ASYM, {"scale": torch.zeros(8, 2, dtype=torch.int32)}, "scale is torch.int32, not a floating dtype"),
        (ASYM, {"zero": torch.zeros(2, 8)}, "needs zero (8, 2), got (2, 8)"),
        (ASYM, {"zero": torch.zeros(8, 2, dtype=torch.uint8)}, "zero is torch.uint8, not a floating dtype"),
        (ASYM, {"zero": None}, "zero is missing"),
        (INT, {"zero": torch.zeros(8, 2)}, "zero is torch.float32, integer zero points are torch.uint8"),
        (INT, {"zero": make("u8/tensor/asym", (8, 2))}, "zero is quantized, integer zero points are torch.uint8"),
        (SYM, {"zero": torch.zeros(8, 2)}, "i4/g64/sym of shape (8, 128): zero is not expected"),
        (ASYM, {"scale": make("u8/row/asym", (8, 2))}, "scale is quantized as u8/row/asym, not as None"),
        (ASYM, {"zero": make("u8/row/asym", (8, 2))}, "zero is quantized as u8/row/asym, not as None"),
        (NESTED, {"scale": make("u8/row/asym", (8, 2))}, "scale is quantized as u8/row/asym, not as u8/o4/asym"),
        (NESTED, {"zero": torch.zeros(8, 2)}, "zero is torch.float32, not quantized as u8/tensor/asym"),
    ],
)
def test_disagreement_names_both_sides(text: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        replace(make(text), **change)


def test_stored_columns_go_back_to_their_places() -> None:
    q, order = make("u4/g32/asym_int", (6, 96)), torch.randperm(96)
    permuted = replace(q, order=order)
    assert torch.equal(permuted.dequantize()[:, order], q.dequantize())
    assert torch.equal(permuted.codes(), q.codes())
    assert permuted.nbytes == q.nbytes + order.nbytes


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(95), "needs order (96,), got (95,)"),
        (torch.arange(96, dtype=torch.int32), "order is torch.int32, not torch.int64"),
        (torch.zeros(96, dtype=torch.long), "order is no permutation of its 96 columns"),
        (torch.arange(96) + 1, "order is no permutation of its 96 columns"),
    ],
)
def test_order_is_a_permutation(order: Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        replace(make("u4/g32/asym_int", (6, 96)), order=order)


@pytest.mark.parametrize("spec", ["u3/g32/asym", "i8/row/sym"])
def test_codes_given_in_slices_of_rows(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.quant.tensor.SLICE", 96 * 4)
    q, seen = make(spec, (10, 96)), []

    def codes(start: int, stop: int) -> Tensor:
        seen.append((start, stop))
        return q.codes()[start:stop]

    assert torch.equal(QTensor.from_rows(q.spec, (10, 96), codes, q.scale, q.zero).data, q.data)
    assert seen == [(0, 4), (4, 8), (8, 10)]
