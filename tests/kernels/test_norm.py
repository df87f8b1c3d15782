"""The norms against their meanings."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.kernels import norm
from qcompile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

SHAPES = [(1, 2), (3, 7), (2, 3, 5), (5, 100), (17, 128), (2, 2, 2, 40), (9, 300), (1, 2050), (33, 65), (4, 1024)]


def doubles(*values: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value.double() for value in values]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_rms_norm(
    shape: tuple[int, ...], offset: float | None, random_tensor: Callable[..., Tensor], assert_close: Callable
) -> None:
    x, weight = random_tensor(*shape), None if offset is None else random_tensor(shape[-1])
    got = norm.rms_norm_cuda(x, weight, 1e-5, offset or 0.0)
    assert_close(got, rms_norm.meaning(*doubles(x, weight), 1e-5, offset or 0.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", ["", "weight", "weight bias"])
def test_layer_norm(
    shape: tuple[int, ...], affine: str, random_tensor: Callable[..., Tensor], assert_close: Callable
) -> None:
    x = random_tensor(*shape)
    weight, bias = (random_tensor(shape[-1]) if name in affine else None for name in ("weight", "bias"))
    got = norm.layer_norm_cuda(x, weight, bias, 1e-5)
    assert_close(got, layer_norm.meaning(*doubles(x, weight, bias), 1e-5))


@pytest.mark.parametrize("shape", SHAPES)
def test_with_the_residual(
    shape: tuple[int, ...], random_tensor: Callable[..., Tensor], assert_close: Callable
) -> None:
    x, residual, weight, bias = (random_tensor(*s) for s in (shape, shape, shape[-1:], shape[-1:]))
    normed, total = norm.add_rms_norm_cuda(x, residual, weight, 1e-6, 1.0)
    assert torch.equal(total, x + residual)
    assert_close(normed, rms_norm.meaning(total.double(), weight.double(), 1e-6, 1.0))
    normed, total = norm.add_layer_norm_cuda(x, residual, weight, bias, 1e-6)
    assert torch.equal(total, x + residual)
    assert_close(normed, layer_norm.meaning(total.double(), weight.double(), bias.double(), 1e-6))


def test_strided_inputs(random_tensor: Callable[..., Tensor], assert_close: Callable) -> None:
    heads = random_tensor(2, 3, 5 * 16).narrow(2, 16, 48).view(2, 3, 3, 16)  # as of q in a fused qkv
    for x in (heads, heads.transpose(1, 2), random_tensor(16, 6).t(), random_tensor(1, 16).expand(4, 16)):
        assert_close(norm.rms_norm_cuda(x, None, 1e-6, 0.0), rms_norm.meaning(x.double(), None, 1e-6, 0.0))
    normed, total = norm.add_rms_norm_cuda(heads, heads.flip(0), None, 1e-6, 0.0)
    assert torch.equal(total, heads + heads.flip(0))
    assert_close(normed, rms_norm.meaning(total.double(), None, 1e-6, 0.0))


def test_weight_in_another_dtype(random_tensor: Callable[..., Tensor], assert_close: Callable) -> None:
    x, weight = random_tensor(3, 64), random_tensor(64).float()
    got = norm.rms_norm_cuda(x, weight, 1e-6, 0.0)
    assert got.dtype == x.dtype
    assert_close(got, rms_norm.meaning(*doubles(x, weight), 1e-6, 0.0))


def test_refusals(device: str) -> None:
    x = torch.ones(2, 4, device=device)
    assert norm.refuses_rms(x, None, 1e-6, 0.0) is None
    assert norm.refuses_rms(x.double(), None, 1e-6, 0.0) == "handles float32, float16 and bfloat16, not float64"
    wide = torch.ones(1, 65537, device=device)
    assert norm.refuses_layer(wide, None, None, 1e-6) == "handles rows of up to 65536 elements, not 65537"
    assert norm.refuses_add_rms(x, x[:1], None, 1e-6, 0.0) == "x and residual differ in shape or dtype"
    assert norm.refuses_add_layer(x, x.half(), None, None, 1e-6) == "x and residual differ in shape or dtype"


def test_empty(device: str) -> None:
    x = torch.empty(0, 8, device=device)
    assert norm.rms_norm_cuda(x, None, 1e-6, 0.0).shape == (0, 8)
    assert [part.shape for part in norm.add_layer_norm_cuda(x, x, None, None, 1e-6)] == [(0, 8), (0, 8)]


def test_the_ops_agree_with_their_implementations(random_tensor: Callable[..., Tensor], assert_close: Callable) -> None:
    x, weight = random_tensor(3, 64), random_tensor(64)
    for op, args in (
        (rms_norm, (x, weight, 1e-6, 0.0)),
        (add_rms_norm, (x, x, weight, 1e-6, 0.0)),
        (layer_norm, (x, weight, weight, 1e-6)),
        (add_layer_norm, (x, x, weight, None, 1e-6)),
    ):
        choice = op.choose(*args)
        assert choice.name == "triton"
        got, want = choice.function(*args), op.meaning(*args)
        for one, other in zip(*((value if isinstance(value, tuple) else [value]) for value in (got, want))):
            assert_close(one, other.double(), rounded=True)
