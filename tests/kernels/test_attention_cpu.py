"""attention_cpu against the op's meaning."""

import itertools
import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import attention_cpu
from qcompile.ops.attention import attention
from qcompile.ops.row_codes import CODES, dequantize_rows, quantize_rows

# Where there is a compiler, sources that do not compile are no reason to skip.
if not any(map(shutil.which, ("g++", "clang++"))):
    pytest.skip("there is no C++ compiler", allow_module_level=True)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# batch, heads, kv_heads, length, keys, width, value width
SHAPES = {
    "one key": (1, 1, 1, 1, 1, 16, 16),
    "grouped": (2, 6, 2, 1, 37, 16, 16),
    "one key head": (1, 20, 1, 1, 50, 32, 32),
    "as many keys as queries": (2, 3, 3, 1, 65, 80, 80),
    "few queries": (1, 4, 2, 5, 33, 48, 48),
    "several parts": (2, 9, 3, 1, 1600, 64, 64),
    "shared by rows": (1, 9, 3, 1, 900, 64, 64),
    "wide": (1, 2, 1, 8, 70, 256, 208),
}
MASKS: dict[str, Callable[[int, int, int, int], tuple[int, ...]]] = {
    "for all": lambda b, h, q, n: (q, n),
    "keys only": lambda b, h, q, n: (1, n),
    "by sequence": lambda b, h, q, n: (b, 1, 1, n),
    "by head": lambda b, h, q, n: (h, q, n),
    "by head and sequence": lambda b, h, q, n: (b, h, q, n),
    "one for all keys": lambda b, h, q, n: (b, h, q, 1),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_code = pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def heads(batch: int, heads: int, kv: int, length: int, keys: int, width: int, value_width: int) -> Any:
    shapes = ((batch, heads, length, width), (batch, kv, keys, width), (batch, kv, keys, value_width))
    return tuple(torch.randn(shape) for shape in shapes)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float = 0.2, *cap: float) -> None:
    choice = attention.choose(q, k, v, mask, False, scale, *cap)
    assert choice.name == "cpu_decode"
    got = choice.function(q, k, v, mask, False, scale, *cap)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    want = attention.meaning(q.double(), k.double(), v.double(), wide, False, scale, *cap)
    assert got.dtype == q.dtype and got.is_contiguous()
    assert (got - want).norm() <= ROUNDING[q.dtype] * want.norm()


@each_shape
@each_float
def test_without_mask(shape: Any, dtype: torch.dtype) -> None:
    check(*(x.to(dtype) for x in heads(*shape)), None)


@each_shape
@pytest.mark.parametrize("mask_shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_masks(shape: Any, mask_shape: Any, additive: bool) -> None:
    for dtype in FLOATS:
        q, k, v = (x.to(dtype) for x in heads(*shape))
        size = mask_shape(*q.shape[:3], k.shape[2])
        mask = torch.rand(size) < 0.6
        mask[..., 0] = True
        check(q, k, v, torch.randn(size).to(dtype).masked_fill(~mask, -math.inf) if additive else mask)


@each_shape
@each_float
def test_soft_capping(shape: Any, dtype: torch.dtype) -> None:
    """Of logits far below the cap, and far above it."""
    q, k, v = (x.to(dtype) for x in heads(*shape))
    mask = torch.rand(q.shape[0], 1, 1, k.shape[2]) < 0.6
    mask[..., 0] = True
    for cap in (0.5, 50.0):
        check(q, k, v, None, 0.3, cap)
        check(q, k, v, mask, 0.3, cap)


@each_shape
@each_float
@each_code
def test_codes(shape: Any, dtype: torch.dtype, codes: torch.dtype) -> None:
    """Keys and values as codes with a scale a row, which are not rounded to the dtype of the queries."""
    q, *rows = (x.to(dtype) for x in heads(*shape))
    (k, of_keys), (v, of_values) = (quantize_rows(x * torch.rand(x.shape[:3])[..., None], codes) for x in rows)
    mask = torch.rand(shape[0], 1, 1, shape[4]) < 0.6
    mask[..., -1] = True
    for arguments in ((None, False, 0.2), (mask, False, 0.2, 0.5)):
        arguments = (*arguments, None)[:4]
        choice = attention.choose(q, k, v, *arguments, of_keys, of_values)
        assert choice.name == "cpu_decode"
        got = choice.function(q, k, v, *arguments, of_keys, of_values)
        want = attention.meaning(q.double(), k, v, *arguments, of_keys, of_values)
        assert got.dtype == q.dtype and (got - want).norm() <= ROUNDING[dtype] * want.norm()


@pytest.mark.parametrize("width", [16, 64])
def test_every_code(width: int) -> None:
    """Each one alone; in fp8 one of 256 is no number for each sign."""
    for codes in CODES.values():
        v = torch.arange(256, dtype=torch.uint8).view(codes).reshape(1, 256 // width, 1, width)
        q, k, scale = (
            torch.zeros(1, v.shape[1], 1, 16),
            torch.zeros(*v.shape[:3], 16, dtype=codes),
            torch.ones(v.shape[:3]),
        )
        want = dequantize_rows(v, scale * 3, torch.float32)
        for _ in range(2):
            got = attention_cpu.attention_cpu(q, k, v, None, False, 1.0, None, scale, scale * 3)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_it_compiles() -> None:
    assert attention_cpu.missing() is None


@pytest.mark.parametrize("place", ["query", "key"])
def test_what_is_no_number_shows(place: str) -> None:
    """NaN of either sign, also where arithmetic makes it: inf - inf has its sign bit set."""
    for bad in (math.nan, -math.nan, math.inf):
        q, k, v = heads(1, 2, 1, 1, 40, 16, 16)
        (q if place == "query" else k)[0, 0, 0, 3] = bad
        q[0, 0, 0, 4] = 0.0
        k[0, 0, 0, 4] = math.inf
        want = attention.meaning(q, k, v, None, False, 0.2)
        for _ in range(2):  # the first call may go through Python
            got = attention_cpu.attention_cpu(q, k, v, None, False, 0.2)
            assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()


@each_float
def test_keys_that_nobody_attends_to_are_not_read(dtype: torch.dtype) -> None:
    """A cache that is partly filled, and a window in it: elsewhere is NaN, which would show."""
    q, k, v = (x.to(dtype) for x in heads(2, 4, 2, 1, 1100, 16, 16))
    for (low, high), additive in itertools.product(((0, 129), (192, 256), (1099, 1100), (3, 1090)), (False, True)):
        mask = torch.zeros(2, 1, 1, 1100, dtype=torch.bool)
        mask[..., low:high] = True
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf) if additive else mask
        holey = [torch.full_like(x, math.nan) for x in (k, v)]
        for hole, x in zip(holey, (k, v)):
            hole[:, :, low:high] = x[:, :, low:high]
        got = attention_cpu.attention_cpu(q, *holey, bias, False, 0.2)
        assert torch.equal(got, attention_cpu.attention_cpu(q, k, v, bias, False, 0.2))
        assert got.isfinite().all()


def test_rows_that_attend_to_nothing_are_zeros() -> None:
    q, k, v = heads(1, 2, 1, 3, 40, 32, 32)
    for mask in (torch.zeros(1, 1, 3, 40, dtype=torch.bool), torch.full((3, 40), -math.inf)):
        assert attention_cpu.attention_cpu(q, k, v, mask, False, 0.2).eq(0).all()
        mask[..., 1, :7] = 1
        y = attention_cpu.attention_cpu(q, k, v, mask, False, 0.2)
        assert y[:, :, ::2].eq(0).all() and y[:, :, 1].ne(0).all()


def test_large_scores_and_numbers_that_are_none() -> None:
    q, k, v = heads(1, 2, 2, 1, 40, 32, 32)
    check(q * 1e3, k, v, None)
    k[0, 1, 5, 3] = math.nan
    y = attention_cpu.attention_cpu(q, k, v, None, False, 0.2)
    assert y[0, 0].isfinite().all() and y[0, 1].isnan().all()


@each_float
def test_views(dtype: torch.dtype) -> None:
    """Queries out of a wider linear, a cache laid out by position."""
    wide, k, v = (
        torch.randn(2, 1, 256).to(dtype),
        torch.randn(2, 50, 2, 64).to(dtype),
        torch.randn(2, 50, 128).to(dtype),
    )
    query = wide[..., 64:].view(2, 1, 6, 32).transpose(1, 2)
    check(query, k[..., 16:48].transpose(1, 2), v.view(2, 50, 2, 64).transpose(1, 2), None)


@pytest.mark.parametrize("keys, counts", [(900, (1, 2)), (3000, (1, 2, 5))], ids=["by rows", "by parts"])
@each_float
def test_threads_do_not_change_the_result(keys: int, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in heads(1, 9, 3, 1, keys, 64, 64))
    before, results = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(attention_cpu.attention_cpu(q, k, v, None, False, 0.2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_opcheck() -> None:
    q, k, v = heads(1, 6, 2, 1, 37, 16, 32)
    mask = (torch.rand(1, 1, 1, 37) < 0.6).expand(1, 6, 1, 37)
    torch.library.opcheck(attention_cpu.attend_cpu, (q, k, v, mask, 0.2, None, None, None))
    (k, of_keys), (v, of_values) = (quantize_rows(x, torch.int8) for x in (k, v))
    torch.library.opcheck(attention_cpu.attend_cpu, (q, k, v, mask, 0.2, 0.5, of_keys, of_values))


def test_refusals() -> None:
    q, k, v = heads(1, 4, 2, 1, 20, 32, 32)

    def why(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> str:
        return str(attention_cpu.refuses(q, k, v, mask, is_causal, 0.2))

    assert "needs cpu, got meta" in why(*(x.to("meta") for x in (q, k, v)))
    assert "not torch.float64" in why(q.double(), k.double(), v.double())
    assert "and torch.bfloat16" in why(q, k, v.bfloat16())
    assert "up to 8 query rows, not 9" in why(q.expand(1, 4, 9, 32), k, v)
    assert "multiples of 16 columns, not 24 and 32" in why(q[..., :24], k[..., :24], v)
    assert "columns of query, key or value" in why(q, k, v.transpose(2, 3).contiguous().transpose(2, 3))
    assert "not is_causal" in why(q, k, v, None, True)
    assert "columns of the mask" in why(q, k, v, torch.ones(1, 40, dtype=torch.bool)[:, ::2])
