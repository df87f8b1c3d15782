"""rope: what it means, on every kind of input."""

import pytest
import torch

from qcompile.ops.rope import rope, rope_into_cache
from qcompile.ops.row_codes import CODES, SCALE, quantize_rows

INPUTS = {
    "heads": lambda: torch.randn(2, 4, 7, 16),
    "heads, transposed": lambda: torch.randn(2, 7, 4, 16).transpose(1, 2),
    "bf16": lambda: torch.randn(2, 4, 7, 16).transpose(1, 2).contiguous().transpose(1, 2).bfloat16(),
    "f16": lambda: torch.randn(1, 2, 3, 8).half(),
    "f64": lambda: torch.randn(1, 2, 3, 8, dtype=torch.float64),
    "one position": lambda: torch.randn(2, 4, 1, 16),
    "no positions": lambda: torch.randn(2, 4, 0, 16),
    "part of a head": lambda: torch.randn(2, 4, 7, 40)[..., :16],
    "two columns": lambda: torch.randn(2, 4, 7, 2),
    "one head": lambda: torch.randn(7, 16),
}


def angles(x, dtype):
    """cos and sin with another angle in each column, so that a mix-up of halves shows."""
    angle = torch.rand(*x.shape[-2:], dtype=torch.float64) * 6
    return angle.cos().to(dtype), angle.sin().to(dtype)


def exact(x, cos, sin):
    """Column by column: column i of the first half turns with column i of the second."""
    x, cos, sin = (t.double().expand(x.shape) for t in (x, cos, sin))
    y, half = torch.empty_like(x), x.shape[-1] // 2
    for i in range(half):
        j = i + half
        y[..., i] = x[..., i] * cos[..., i] - x[..., j] * sin[..., i]
        y[..., j] = x[..., j] * cos[..., j] + x[..., i] * sin[..., j]
    return y


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_rope(agrees, make):
    x = make()
    cos, sin = angles(x, x.dtype)
    agrees(rope, x, cos, sin, exact=exact(x, cos, sin))


def test_wider_angles(agrees):
    x = torch.randn(2, 4, 7, 16).bfloat16()
    cos, sin = angles(x, torch.float32)
    agrees(rope, x, cos, sin, exact=exact(x, cos, sin))


def test_other_angles_for_each_sequence(agrees):
    x = torch.randn(3, 4, 7, 16)
    cos, sin = torch.rand(2, 3, 1, 7, 16)
    agrees(rope, x, cos, sin, exact=exact(x, cos, sin))


def test_pairs_turn_without_changing_their_length():
    x = torch.randn(2, 4, 7, 16, dtype=torch.float64)
    angle = torch.rand(7, 8, dtype=torch.float64).repeat(1, 2)
    y = rope(x, angle.cos(), angle.sin())
    lengths = [t.unflatten(-1, (2, 8)).norm(dim=-2) for t in (x, y)]
    torch.testing.assert_close(*lengths)


def test_symbolic_sizes(symbolic):
    cos, sin = torch.rand(2, 5, 8)
    symbolic(lambda x: rope(x, cos, sin), (torch.randn(3, 2, 5, 8),), (torch.randn(6, 2, 5, 8),))


def step(length=1, dtype=torch.float32):
    """4 heads of 16 columns over 2, values of 24, and caches of 9 positions."""
    q, k, v = (torch.randn(2, heads, length, width).to(dtype) for heads, width in ((4, 16), (2, 16), (2, 24)))
    keys, values = torch.randn(2, 2, 9, 16).to(dtype), torch.randn(2, 2, 9, 24).to(dtype)
    return [q, k, v, *angles(q, dtype), keys, values, torch.randperm(9)[:length]]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_into_cache(length, dtype):
    q, k, v, cos, sin, keys, values, positions = step(length, dtype)
    torch.library.opcheck(rope_into_cache.overload, (q, k, v, cos, sin, keys, values, positions))
    want = keys.index_copy(2, positions, rope(k, cos, sin)), values.index_copy(2, positions, v)
    assert torch.equal(rope_into_cache(q, k, v, cos, sin, keys, values, positions), rope(q, cos, sin))
    assert torch.equal(keys, want[0]) and torch.equal(values, want[1])


@pytest.mark.parametrize("dtype", CODES.values(), ids=CODES)
def test_rope_into_a_quantized_cache(dtype):
    q, k, v, cos, sin, keys, values, positions = step(3)
    keys, values = (torch.zeros(x.shape, dtype=dtype) for x in (keys, values))
    scales = [torch.zeros(x.shape[:3], dtype=SCALE) for x in (keys, values)]
    args = (q, k, v, cos, sin, keys, values, positions, *scales)
    torch.library.opcheck(rope_into_cache.overload, args)
    assert torch.equal(rope_into_cache(*args), rope(q, cos, sin))
    for new, codes, scale in ((rope(k, cos, sin), keys, scales[0]), (v, values, scales[1])):
        want = quantize_rows(new, dtype)
        assert torch.equal(codes[:, :, positions], want[0]) and torch.equal(scale[:, :, positions], want[1])
        others = torch.ones(9, dtype=torch.bool).index_fill(0, positions, False)
        assert not codes[:, :, others].any() and not scale[:, :, others].any()
