"""attention_prompt_cpu against the op's meaning in float64."""

import itertools
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import attention_cpu, attention_prompt_cpu
from qcompile.ops.attention import attention
from qcompile.ops.row_codes import CODES, dequantize_rows, quantize_rows

# Where there is a compiler, sources that do not compile are no reason to skip.
if not any(map(shutil.which, ("g++", "clang++"))):
    pytest.skip("there is no C++ compiler", allow_module_level=True)
if not attention_cpu.library().has_prompts():
    pytest.skip("this processor has no vectors of 512 bits", allow_module_level=True)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# batch, heads, kv_heads, length, keys, width, value width
SHAPES = {
    "one row": (1, 2, 1, 1, 1, 16, 16),
    "fewer keys than a vector": (1, 1, 1, 7, 5, 32, 16),
    "grouped": (2, 6, 2, 13, 37, 16, 48),
    "a block and a key": (1, 3, 3, 65, 65, 80, 80),
    "more keys": (2, 4, 1, 20, 150, 64, 64),
    "several pieces": (1, 2, 2, 211, 211, 16, 16),
    "wide": (1, 2, 1, 9, 70, 256, 208),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def heads(batch: int, heads: int, kv: int, length: int, keys: int, width: int, value_width: int) -> Any:
    shapes = ((batch, heads, length, width), (batch, kv, keys, width), (batch, kv, keys, value_width))
    return tuple(torch.randn(shape) for shape in shapes)


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False, *cap: float) -> Tensor:
    return attention_prompt_cpu.attention_prompt_cpu(q, k, v, mask, is_causal, 0.2, *cap)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False, *cap: float) -> None:
    assert attention_prompt_cpu.refuses(q, k, v, mask, is_causal, 0.2, *cap) is None
    got = run(q, k, v, mask, is_causal, *cap)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    want = attention.meaning(q.double(), k.double(), v.double(), wide, is_causal, 0.2, *cap)
    assert got.dtype == q.dtype and got.shape == want.shape and got.transpose(1, 2).is_contiguous()
    assert (got - want).norm() <= ROUNDING[q.dtype] * want.norm()


def test_it_serves_many_rows() -> None:
    for length, name in ((8, "cpu_decode"), (9, "cpu_prompt")):
        q, k, v = heads(1, 2, 1, length, 20, 16, 16)
        assert attention.choose(q, k, v, None, False, 0.2).name == name


@each_shape
@each_float
def test_causal_and_without_mask(shape: Any, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in heads(*shape))
    check(q, k, v, None)
    check(q, k, v, None, True)


@each_shape
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_masks(shape: Any, additive: bool) -> None:
    for dtype in FLOATS:
        q, k, v = (x.to(dtype) for x in heads(*shape))
        b, h, length, keys = *q.shape[:3], k.shape[2]
        for size in (
            (length, keys),
            (1, keys),
            (b, 1, 1, keys),
            (h, length, keys),
            (b, h, length, keys),
            (b, 1, length, 1),
        ):
            mask = torch.rand(size) < 0.6
            mask[..., 0] = True
            check(q, k, v, torch.randn(size).to(dtype).masked_fill(~mask, -math.inf) if additive else mask)


@each_float
def test_soft_capping(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in heads(1, 4, 2, 70, 90, 32, 32))
    mask = torch.rand(70, 90) < 0.6
    mask[:, 0] = True
    for cap, seen in itertools.product((0.5, 50.0), (None, mask)):
        check(q, k, v, seen, False, cap)


def static_mask(length: int, keys: int, window: int) -> Tensor:
    """A prompt behind 100 tokens in a static cache, under a sliding window."""
    position, key = torch.arange(length)[:, None] + 100, torch.arange(keys)
    return (key <= position) & (key > position - window)


@each_float
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_blocks_that_nobody_attends_to_are_not_read(dtype: torch.dtype, additive: bool) -> None:
    q, k, v = (x.to(dtype) for x in heads(1, 4, 2, 130, 700, 16, 16))
    mask = static_mask(130, 700, 80)
    mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf) if additive else mask
    check(q, k, v, mask)
    seen = run(q, k, v, mask)
    for x in (k, v):
        x[:, :, 256:] = math.nan
    assert torch.equal(run(q, k, v, mask), seen)


def test_rows_that_attend_to_nothing_are_zeros() -> None:
    q, k, v = heads(1, 2, 1, 30, 100, 32, 32)
    for mask in (torch.zeros(1, 1, 30, 100, dtype=torch.bool), torch.full((30, 100), -math.inf)):
        assert run(q, k, v, mask).eq(0).all()
        mask[..., 1, 70:] = 1
        y = run(q, k, v, mask)
        assert y[:, :, 2:].eq(0).all() and y[:, :, 1].ne(0).all()


def test_masks_of_the_lowest_number() -> None:
    """Rows that see nothing are the mean of all values."""
    q, k, v = heads(1, 2, 1, 30, 100, 32, 32)
    mask = torch.full((30, 100), torch.finfo(torch.float32).min)
    mask[3, 5] = 0
    y = run(q, k, v, mask)
    torch.testing.assert_close(y[0, 1, 0], v[0, 0].mean(0))
    torch.testing.assert_close(y[0, 0, 3], v[0, 0, 5])


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_what_is_no_number_shows(place: str) -> None:
    for bad in (math.nan, -math.nan, math.inf):
        q, k, v = heads(1, 2, 1, 20, 100, 16, 16)
        {"query": q, "key": k, "value": v}[place][0, 0, 3, 3] = bad
        q[..., 3] = q[..., 3].abs()
        want = attention.meaning(q, k, v, None, True, 0.2)
        assert torch.equal(run(q, k, v, None, True).isfinite(), want.isfinite()) and not want.isfinite().all()


def test_large_scores() -> None:
    q, k, v = heads(1, 2, 2, 40, 90, 32, 32)
    check(q * 1e3, k, v, None)


@each_float
@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_codes(dtype: torch.dtype, codes: torch.dtype) -> None:
    q, k, v = heads(2, 4, 2, 13, 37, 16, 48)
    (key, key_scale), (value, value_scale) = quantize_rows(k, codes), quantize_rows(v, codes)
    args = (q.to(dtype), key, value, None, True, 0.2, None, key_scale, value_scale)
    assert attention.choose(*args).name == "cpu_prompt"
    k, v = dequantize_rows(key, key_scale, torch.float64), dequantize_rows(value, value_scale, torch.float64)
    want = attention.meaning(args[0].double(), k, v, None, True, 0.2)
    assert (attention.choose(*args).function(*args) - want).norm() <= 2 * ROUNDING[dtype] * want.norm()


@each_float
def test_views(dtype: torch.dtype) -> None:
    """Queries out of a wider linear, a cache laid out by position."""
    wide, k, v = (torch.randn(size).to(dtype) for size in ((2, 11, 256), (2, 50, 2, 64), (2, 50, 128)))
    query = wide[..., 64:].view(2, 11, 6, 32).transpose(1, 2)
    check(query, k[..., 16:48].transpose(1, 2), v.view(2, 50, 2, 64).transpose(1, 2), None)


def test_threads_do_not_change_the_result() -> None:
    q, k, v = heads(1, 6, 3, 300, 500, 32, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(q, k, v, static_mask(300, 500, 130)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nothing() -> None:
    q, k, v = heads(1, 2, 1, 0, 5, 16, 16)
    assert run(q, k, v, None).shape == (1, 2, 0, 16)


def test_opcheck() -> None:
    q, k, v = heads(1, 6, 2, 12, 37, 16, 32)
    mask = (torch.rand(1, 1, 12, 37) < 0.6).expand(1, 6, 12, 37)
    torch.library.opcheck(attention_prompt_cpu.attend_prompt, (q, k, v, mask, False, 0.2, None))
    torch.library.opcheck(attention_prompt_cpu.attend_prompt, (q, k, v, None, True, 0.2, 0.5))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(1, 4, 2, 20, 20, 32, 32)

    def why(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> str:
        return str(attention_prompt_cpu.refuses(q, k, v, mask, is_causal, 0.2))

    assert "needs cpu, got meta" in why(*(x.to("meta") for x in (q, k, v)))
    assert "and torch.bfloat16" in why(q, k, v.bfloat16())
    assert "multiples of 16 columns, not 24 and 32" in why(q[..., :24], k[..., :24], v)
    assert "columns of the mask" in why(q, k, v, torch.ones(20, 40, dtype=torch.bool)[:, ::2])
    assert "not both" in why(q, k, v, torch.ones(20, 20, dtype=torch.bool), True)
    monkeypatch.setattr(attention_cpu, "library", lambda: type("Lesser", (), {"has_prompts": lambda self: 0})())
    assert "512 bits" in why(q, k, v)
