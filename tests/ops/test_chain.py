"""chain: what it means, against its ops one by one."""

import math

import pytest
import torch

from qcompile.ops.attention import attention
from qcompile.ops.chain import Cache, Given, Result, Step, chain
from qcompile.ops.fused_linear import fused_linear
from qcompile.ops.rope import rope_into_cache
from qcompile.quant.packing import pack

STEPS = [
    Step("fused_linear", (Given(0), None, None, 0.0, Given(1), Given(2), None, None, None, "i8/row/sym", None, False)),
    Step(
        "rope_into_cache",
        (
            Result(0, 0, (1, 2, 1, 16), (64, 16, 64, 1)),
            Result(0, 32, (1, 1, 1, 16), (64, 16, 64, 1)),
            Result(0, 48, (1, 1, 1, 16), (64, 16, 64, 1)),
            *(Given(3), Given(4), Cache(0), Cache(1), Given(5)),
        ),
    ),
    Step("attention", (Result(1, 0, (1, 2, 1, 16), (32, 16, 16, 1)), Cache(0), Cache(1), None, False, 0.25, None)),
]


def test_text() -> None:
    for step in STEPS:
        assert Step.parse(str(step)) == step
    assert str(STEPS[2]) == "attention #1@0:1,2,1,16:32,16,16,1 &0 &1 none False 0.25 none"
    assert Step.parse("attention 1e-05").arguments == (1e-5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_its_ops_one_after_the_other(dtype: torch.dtype) -> None:
    x, data, scale = (
        torch.randn(1, 1, 48),
        pack(torch.randint(0, 256, (64, 48), dtype=torch.uint8), 8),
        torch.rand(64, 1),
    )
    cos, sin, keys, values = torch.randn(1, 1, 16), torch.randn(1, 1, 16), *torch.randn(2, 1, 1, 5, 16)
    x, cos, sin, keys, values = (tensor.to(dtype) for tensor in (x, cos, sin, keys, values))
    tensors, text = [x, data, scale / 100, cos, sin, torch.tensor([3])], "\n".join(map(str, STEPS))
    torch.library.opcheck(chain.overload, (tensors, [keys.clone(), values.clone()], text))
    wrote = keys.clone(), values.clone()
    got = chain(tensors, list(wrote), text)
    y = fused_linear(x, None, None, 0.0, data, scale / 100, None, None, None, "i8/row/sym", None, False)
    q, k, v = (part.reshape(1, 1, -1, 16).transpose(1, 2) for part in y.split([32, 16, 16], -1))
    q = rope_into_cache(q, k, v, cos, sin, keys, values, tensors[5])
    want = attention(q, keys, values, None, False, 0.25)
    assert all(map(torch.equal, (got, *wrote), (want, keys, values)))
    assert not math.isnan(float(got.float().sum()))
