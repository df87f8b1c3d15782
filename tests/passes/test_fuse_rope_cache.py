"""fuse_rope_cache: the rotation of queries and keys and the writing of the cache become one op."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qcompile.normal import normalizing_passes
from qcompile.ops.rope import rope, rope_into_cache
from qcompile.ops.row_codes import dequantize_rows, quantize_rows, quantize_rows_by
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_attention_codes import FuseAttentionCodes
from qcompile.passes.fuse_rope import FuseRope
from qcompile.passes.fuse_rope_cache import FuseRopeCache


def turned(x, cos, sin):
    return x * cos + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * sin


def attended(q, keys, values, at):
    mask = torch.arange(12) <= at[-1]
    return F.scaled_dot_product_attention(q, keys, values, mask[None, None, None], enable_gqa=True)


def llama(q, k, v, cos, sin, keys, values, at):
    keys.index_copy_(2, at, turned(k, cos, sin))
    values.index_copy_(2, at, v)
    return attended(turned(q, cos, sin), keys, values, at)


def inputs(length=1, dtype=torch.float32, batch=2) -> Any:
    q, k, v = (torch.randn(batch, length, 8 * heads) for heads in (4, 2, 2))
    cos, sin = torch.randn(2, batch, length, 8)
    keys, values = torch.randn(2, batch, 2, 12, 8)
    return [*(x.to(dtype) for x in (q, k, v, cos, sin, keys, values)), torch.arange(3, 3 + length)]


@pytest.fixture
def fused(step):
    def run(function, *tensors, **tolerance):
        g = step(function, *(tensors or inputs())).prepare(*normalizing_passes(), FuseRope(), FuseAttention())
        return g, g.apply(FuseRopeCache(), **tolerance)

    return run


def test_text(step, golden):
    g = step(llama, *inputs(dtype=torch.bfloat16, batch=1)).prepare(*normalizing_passes(), FuseRope(), FuseAttention())
    before = g.text()
    g.apply(FuseRopeCache())
    golden("passes/fuse_rope_cache", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_and_a_prompt(fused, length, dtype):
    g, result = fused(llama, *inputs(length, dtype))
    assert len(result.rewrites) == g.count(rope_into_cache.overload) == 1 and not result.misses
    assert not {"rope", "index_copy_"} & set(g.ops())


def test_layers_one_after_the_other(fused):
    def two(q, k, v, cos, sin, keys, values, at, more_keys, more_values):
        y = llama(q, k, v, cos, sin, keys, values, at)
        return llama(y, k, v, cos, sin, more_keys, more_values, at)

    g, result = fused(two, *inputs(), *inputs()[5:7])
    assert len(result.rewrites) == g.count(rope_into_cache.overload) == 2


def test_who_reads_the_cache_afterwards_reads_what_was_written(fused):
    def later(q, k, v, cos, sin, keys, values, at):
        y = llama(q, k, v, cos, sin, keys, values, at)
        return y, keys.sum(), values * 2

    _, result = fused(later)
    assert len(result.rewrites) == 1


def quantized(q, k, v, cos, sin, keys, values, at, key_scales, value_scales):
    rows = []
    for new, codes, scales in ((turned(k, cos, sin), keys, key_scales), (v, values, value_scales)):
        new, scale = quantize_rows(new, codes.dtype)
        codes.index_copy_(2, at, new)
        scales.index_copy_(2, at, scale)
        rows.append(dequantize_rows(codes, scales, q.dtype))
    return attended(turned(q, cos, sin), *rows, at)


def quantized_inputs():
    *others, keys, values, at = inputs()
    (keys, key_scales), (values, value_scales) = (quantize_rows(x, torch.int8) for x in (keys, values))
    return [*others, keys, values, at, key_scales, value_scales]


def test_a_quantized_cache(step):
    g = step(quantized, *quantized_inputs())
    g.prepare(*normalizing_passes(), FuseRope(), FuseAttention(), FuseAttentionCodes())
    result = g.apply(FuseRopeCache())
    assert len(result.rewrites) == g.count(rope_into_cache.overload) == 1 and not result.misses
    assert not {"rope", "index_copy_", "quantize_rows", "getitem"} & set(g.ops())


def fixed(q, k, v, cos, sin, keys, values, at, key_scales, value_scales):
    rows = []
    for new, codes, scales in ((turned(k, cos, sin), keys, key_scales), (v, values, value_scales)):
        codes.index_copy_(2, at, quantize_rows_by(new, scales.index_select(2, at), codes.dtype))
        rows.append(dequantize_rows(codes, scales, q.dtype))
    return attended(turned(q, cos, sin), *rows, at)


def other_scales(q, k, v, cos, sin, keys, values, at, key_scales, value_scales):
    codes = (quantize_rows_by(new, value_scales.index_select(2, at), torch.int8) for new in (turned(k, cos, sin), v))
    for cache, new in zip((keys, values), codes):
        cache.index_copy_(2, at, new)
    rows = (dequantize_rows(keys, key_scales, q.dtype), dequantize_rows(values, value_scales, q.dtype))
    return attended(turned(q, cos, sin), *rows, at)


def test_fixed_scales(step):
    g = step(fixed, *quantized_inputs())
    g.prepare(*normalizing_passes(), FuseRope(), FuseAttention(), FuseAttentionCodes())
    result = g.apply(FuseRopeCache())
    assert len(result.rewrites) == g.count(rope_into_cache.overload) == 1 and not result.misses
    assert not {"rope", "index_copy_", "quantize_rows_by", "index_select"} & set(g.ops())


def test_codes_by_scales_that_attention_does_not_read(step):
    g = step(other_scales, *quantized_inputs())
    g.prepare(*normalizing_passes(), FuseRope(), FuseAttention(), FuseAttentionCodes())
    assert not g.apply(FuseRopeCache()).rewrites


def two_angles(q, k, v, cos, sin, keys, values, at):
    keys.index_copy_(2, at, turned(k, sin, cos))
    values.index_copy_(2, at, v)
    return attended(turned(q, cos, sin), keys, values, at)


def two_positions(q, k, v, cos, sin, keys, values, at):
    keys.index_copy_(2, at, turned(k, cos, sin))
    values.index_copy_(2, at + 1, v)
    return attended(turned(q, cos, sin), keys, values, at)


def query_elsewhere(q, k, v, cos, sin, keys, values, at):
    q = turned(q, cos, sin)
    keys.index_copy_(2, at, turned(k, cos, sin))
    values.index_copy_(2, at, v)
    return attended(q, keys, values, at) + q


def key_elsewhere(q, k, v, cos, sin, keys, values, at):
    k = turned(k, cos, sin)
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return attended(turned(q, cos, sin), keys, values, at), k


def cache_is_read(q, k, v, cos, sin, keys, values, at):
    keys.index_copy_(2, at, turned(k, cos, sin))
    seen = keys.sum()
    values.index_copy_(2, at, v)
    return attended(turned(q, cos, sin), keys, values, at), seen


def value_is_written(q, k, v, cos, sin, keys, values, at):
    keys.index_copy_(2, at, turned(k, cos, sin))
    values.index_copy_(2, at, v)
    v.zero_()
    return attended(turned(q, cos, sin), keys, values, at)


def positions_are_written(q, k, v, cos, sin, keys, values, at):
    keys.index_copy_(2, at, turned(k, cos, sin))
    values.index_copy_(2, at, v)
    at.add_(1)
    return attended(turned(q, cos, sin), keys, values, at - 1)


MISSES = {
    "queries and keys are turned by different angles": two_angles,
    "keys and values are written at different positions": two_positions,
    "rope has another user": [query_elsewhere, key_elsewhere],
    "sum_1 reads the cache before attention does": cache_is_read,
    "transpose_2 is written to in between": value_is_written,
    "tensors_7 is written to in between": positions_are_written,
}


@pytest.mark.parametrize(
    ("reason", "function"),
    [(reason, f) for reason, fs in MISSES.items() for f in (fs if isinstance(fs, list) else [fs])],
)
def test_misses(fused, reason, function):
    _, result = fused(function)
    assert not result.rewrites and [miss for miss, _ in result.misses] == [reason]


def growing(q, k, v, cos, sin, keys, values, at):
    """A cache that grows instead of being written to."""
    keys = torch.cat([keys[:, :, :11], turned(k, cos, sin)], 2)
    return attended(turned(q, cos, sin), keys, torch.cat([values[:, :, :11], v], 2), at)


def query_as_it_is(q, k, v, cos, sin, keys, values, at):
    keys.index_copy_(2, at, turned(k, cos, sin))
    values.index_copy_(2, at, v)
    return attended(q, keys, values, at)


def key_as_it_is(q, k, v, cos, sin, keys, values, at):
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return attended(turned(q, cos, sin), keys, values, at)


@pytest.mark.parametrize("function", [growing, query_as_it_is, key_as_it_is])
def test_something_else(fused, function):
    g, result = fused(function)
    assert not result.rewrites and not result.misses and g.count(rope.overload)
