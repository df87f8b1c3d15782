"""quantize_rows and dequantize_rows: how far a row is off, and what happens at the ends."""

import math

import pytest
import torch

from qcompile.ops.row_codes import CODES, SCALE, dequantize_rows, quantize_rows, quantize_rows_by

each_code = pytest.mark.parametrize("dtype", CODES.values(), ids=CODES)
each_float = pytest.mark.parametrize("floats", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


@each_code
@each_float
def test_opcheck(dtype, floats):
    x = torch.randn(2, 3, 5, 16).to(floats)
    codes, scale = quantize_rows(x, dtype)
    assert codes.dtype == dtype and codes.shape == x.shape and scale.dtype == SCALE and scale.shape == x.shape[:-1]
    torch.library.opcheck(quantize_rows.overload, (x, dtype))
    torch.library.opcheck(dequantize_rows.overload, (codes, scale, floats))


@each_code
@each_float
def test_rows_of_all_sizes(dtype, floats):
    """Off by half a step of the row, or of the number; the largest lands on the last code."""
    x = (torch.randn(12, 64).double() * 10.0 ** torch.arange(-2, 4).repeat(2)[:, None]).to(floats)
    codes, scale = quantize_rows(x, dtype)
    y = dequantize_rows(codes, scale, torch.float64)
    x, step = x.double(), scale.double()[:, None]
    bound = step / 2 if dtype == torch.int8 else torch.maximum(x.abs() * 2.0**-4, step * 2.0**-10)
    # The largest lies beyond the last number where the scale was rounded down.
    assert ((x - y).abs() <= bound * (1 + 2**-9) + x.abs() * 2**-11).all()
    largest = codes.abs().amax(-1) if dtype == torch.int8 else codes.view(torch.float8_e4m3fn).double().abs().amax(-1)
    assert (largest == (127 if dtype == torch.int8 else 448)).all()


@each_code
@each_float
def test_by_scales_that_are_given(dtype, floats):
    """The nearest codes: all numbers that have a code get it, and what lies beyond them the last one."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = every[dequantize_rows(every[:, None], torch.ones(256), torch.float64)[:, 0].isfinite()]
    scale = torch.tensor([0.25, 4.0])
    numbers = dequantize_rows(every.expand(2, -1).contiguous(), scale, floats)
    assert torch.equal(quantize_rows_by(numbers, scale, dtype), every.expand(2, -1))
    torch.library.opcheck(quantize_rows_by.overload, (numbers, scale, dtype))
    beyond = torch.tensor([[-1e4, 1e4, -math.inf, math.inf]]).to(floats)
    last = dequantize_rows(quantize_rows_by(beyond, scale[:1], dtype), torch.ones(1), torch.float64)
    assert last.tolist() == [[-128, 127] * 2 if dtype == torch.int8 else [-448, 448] * 2]


def test_what_is_no_number_shows_in_fp8():
    assert dequantize_rows(
        quantize_rows_by(torch.tensor([[math.nan]]), torch.ones(1), torch.uint8), torch.ones(1), torch.float32
    ).isnan()


@each_code
def test_rounded_once(dtype):
    codes, scale = quantize_rows(torch.randn(3, 64), dtype)
    exact = dequantize_rows(codes, scale, torch.float64)
    for floats in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize_rows(codes, scale, floats), exact.to(floats))


@each_code
def test_ends(dtype):
    x = torch.zeros(5, 8)
    x[1, 3] = 1e-7
    x[2, 3], x[3, 3], x[4, 3] = math.nan, math.inf, -math.inf
    y = dequantize_rows(*quantize_rows(x, dtype), torch.float32)
    assert (y[0] == 0).all() and (y[1] - x[1]).abs().max() <= 1e-7
    assert y[2:, 3].isnan().all(), "what is no number has to show"


@each_code
def test_symbolic_sizes(symbolic, dtype):
    symbolic(
        lambda x: dequantize_rows(*quantize_rows(x, dtype), torch.float32), (torch.randn(3, 8),), (torch.randn(6, 8),)
    )
