"""rope against its meaning."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.kernels import rope
from qcompile.ops.rope import rope as op

# batch, heads, length, n
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 8), (1, 4, 17, 64), (3, 2, 1, 128), (1, 1, 33, 80), (2, 1, 3, 256), (1, 5, 7, 10)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batched", [True, False])
def test_meaning(
    shape: tuple[int, int, int, int], batched: bool, random_tensor: Callable[..., Tensor], assert_close: Callable
) -> None:
    b, h, s, n = shape
    cos, sin = (random_tensor(b if batched else 1, 1, s, n) for _ in range(2))
    for x in (random_tensor(*shape), random_tensor(b, s, h, n).transpose(1, 2)):
        got = rope.rope_cuda(x, cos, sin)
        assert got.is_contiguous()
        assert_close(got, op.meaning(x.double(), cos.double(), sin.double()))


def test_part_of_a_wider_tensor(random_tensor: Callable[..., Tensor], assert_close: Callable) -> None:
    """As in a fused qkv, with a part of each head turned and cos shared by all heads and batches."""
    x = random_tensor(2, 3, 6 * 16).narrow(2, 16, 64).view(2, 3, 4, 16).transpose(1, 2)[..., :8]
    cos, sin = random_tensor(3, 8), random_tensor(3, 16)[:, ::2]
    assert_close(rope.rope_cuda(x, cos, sin), op.meaning(x.double(), cos.double(), sin.double()))


def test_float32_angles_and_fewer_dimensions(random_tensor: Callable[..., Tensor], assert_close: Callable) -> None:
    x, cos, sin = random_tensor(5, 12), random_tensor(5, 12).float(), random_tensor(1, 12).float()
    got = rope.rope_cuda(x, cos, sin)
    assert got.dtype == x.dtype
    assert_close(got, op.meaning(x.double(), cos.double(), sin.double()))


def test_refusals_and_empty(device: str) -> None:
    x = torch.ones(1, 2, 3, 4, device=device)
    assert rope.refuses(x, x, x) is None
    assert rope.refuses(x[None], x, x) == "handles up to 4 dimensions, x has 5"
    assert rope.refuses(x[..., :3], x, x) == "the last dimension must be even, not 3"
    assert rope.refuses(x[0], x, x) == "cos and sin have more dimensions than x"
    assert rope.rope_cuda(x[:0], x, x).shape == (0, 2, 3, 4)
