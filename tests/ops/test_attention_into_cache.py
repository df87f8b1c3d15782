"""attention_into_cache: attention over the caches that rope_into_cache has written to."""

import pytest
import torch

from qcompile.ops.attention import attention
from qcompile.ops.attention_into_cache import attention_into_cache
from qcompile.ops.rope import rope


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meaning(masked, dtype, softcap):
    q, k, v = (torch.randn(2, heads, 1, width).to(dtype) for heads, width in ((4, 16), (2, 16), (2, 24)))
    cos, sin = torch.randn(2, 2, 1, 1, 16).to(dtype)
    keys, values = torch.randn(2, 2, 9, 16).to(dtype), torch.randn(2, 2, 9, 24).to(dtype)
    at, mask = torch.tensor([5]), torch.arange(9)[None, None, None] < 6 if masked else None
    torch.library.opcheck(attention_into_cache.overload, (q, k, v, cos, sin, keys, values, at, mask, 0.3, softcap))
    new = keys.index_copy(2, at, rope(k, cos, sin)), values.index_copy(2, at, v)
    want = attention(rope(q, cos, sin), *new, mask, False, 0.3, softcap)
    assert torch.equal(attention_into_cache(q, k, v, cos, sin, keys, values, at, mask, 0.3, softcap), want)
    assert torch.equal(keys, new[0]) and torch.equal(values, new[1])
