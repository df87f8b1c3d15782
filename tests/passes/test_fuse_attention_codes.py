"""fuse_attention_codes: attention over a quantized cache reads codes."""

import pytest
import torch
import torch.nn.functional as F

from qcompile.normal import normalizing_passes
from qcompile.ops.attention import attention
from qcompile.ops.row_codes import CODES, dequantize_rows, quantize_rows
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_attention_codes import FuseAttentionCodes
from qcompile.passes.recognize_attention import RecognizeAttention


def rows(codes, scale, dtype):
    """Sizes are written down: those of an input are symbols."""
    return dequantize_rows(codes.view(2, 2, 6, 8), scale.view(2, 2, 6), dtype)


def over_codes(q, k, k_scale, v, v_scale):
    q = q.view(2, 5, 4, 8).transpose(1, 2)
    k, v = (rows(*x, q.dtype) for x in ((k, k_scale), (v, v_scale)))
    return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)


def capped(q, k, k_scale, v, v_scale):
    q = q.view(2, 5, 4, 8).transpose(1, 2)
    k, v = (rows(*x, q.dtype).repeat_interleave(2, 1) for x in ((k, k_scale), (v, v_scale)))
    return torch.softmax(torch.tanh(q @ k.transpose(2, 3)) * 2.0, -1) @ v


def written(q, k, k_scale, v, v_scale):
    q = q.view(2, 5, 4, 8).transpose(1, 2)
    keys, values = (rows(*x, q.dtype) for x in ((k, k_scale), (v, v_scale)))
    v_scale.mul_(2.0)
    return F.scaled_dot_product_attention(q, keys, values, scale=0.5, enable_gqa=True)


def inputs(dtype=torch.float32, codes=torch.int8):
    pairs = (quantize_rows(torch.randn(2, 2, 6, 8), codes) for _ in "kv")
    return [torch.randn(2, 5, 32, dtype=dtype), *(x for pair in pairs for x in pair)]


@pytest.fixture
def fused(graph):
    def run(function, *tensors, **tolerance):
        g = graph(function, *(tensors or inputs()))
        g.prepare(*normalizing_passes(), RecognizeAttention(), FuseAttention())
        return g, g.apply(FuseAttentionCodes(), **tolerance)

    return run


def test_text(graph, golden):
    g = graph(over_codes, *inputs(torch.bfloat16)).prepare(*normalizing_passes(), FuseAttention())
    before = g.text()
    g.apply(FuseAttentionCodes())
    golden("passes/fuse_attention_codes", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
@pytest.mark.parametrize("function", [over_codes, capped])
def test_codes_are_read(fused, codes, function):
    g, result = fused(function, *inputs(codes=codes))
    assert len(result.rewrites) == g.count(attention.overload) == 1 and not result.misses
    assert "dequantize_rows" not in g.ops() and not g.apply(FuseAttentionCodes()).rewrites


def test_misses_a_cache_that_is_written_to_in_between(fused):
    _, result = fused(written)
    assert not result.rewrites and [miss for miss, _ in result.misses] == ["tensors_4 is written to in between"]


def test_others_are_no_business_of_this_pass(fused):
    def one_of_two(q, k, k_scale, v, v_scale):
        q = q.view(2, 5, 4, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(
            q, rows(k, k_scale, q.dtype), v.view(2, 2, 6, 8).to(q.dtype), enable_gqa=True
        )

    _, result = fused(one_of_two)
    assert not result.rewrites and not result.misses
