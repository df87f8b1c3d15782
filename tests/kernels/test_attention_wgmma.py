"""Attention of long prompts on Hopper against the op's meaning; on a GPU, as Gluon has no interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import attention_prompt, attention_wgmma
from qcompile.ops.attention import attention

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.cuda(pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")(test))


# batch, heads, kv_heads, length, keys: more than 132 programs each
SHAPES = {
    "prompt": (1, 32, 8, 1000, 1000),
    "cache": (1, 32, 8, 640, 1664),
    "batch": (3, 24, 24, 250, 300),
    "one key head": (2, 70, 1, 129, 515),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
SCALE = 0.2


@pytest.fixture(params=[(torch.bfloat16, 128), (torch.float16, 128), (torch.bfloat16, 64)], ids=str)
def tensors(request: pytest.FixtureRequest) -> Callable[..., Any]:
    dtype, width = request.param

    def make(batch: int, heads: int, kv: int, length: int, keys: int) -> list[Tensor]:
        sizes = ((heads, length), (kv, keys), (kv, keys))
        return [torch.randn(batch, n, m, width, device="cuda").add(0.25).to(dtype) for n, m in sizes]

    return make


@pytest.fixture
def check(assert_close: Callable[..., None]) -> Callable[..., None]:
    def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
        assert attention_wgmma.refuses(q, k, v, None) is None
        exact_mask = mask.double() if mask.is_floating_point() else mask
        want = attention.meaning(q.double(), k.double(), v.double(), exact_mask, False, SCALE, None)
        for _ in range(3):
            assert_close(attention_prompt.attend(q, k, v, mask, SCALE), want)

    return check


def causal(length: int, keys: int, before: int = 0) -> Tensor:
    return torch.arange(keys, device="cuda") <= torch.arange(length, device="cuda")[:, None] + before


@each_shape
@on_hopper
def test_causal(shape: Any, tensors: Callable[..., Any], check: Callable[..., None]) -> None:
    """A prompt in an empty cache, and one behind others."""
    q, k, v = tensors(*shape)
    length, keys = shape[3:]
    for before in (0, keys - length):
        check(q, k, v, causal(length, keys, before)[None, None])


@on_hopper
def test_all_keys(tensors: Callable[..., Any], check: Callable[..., None]) -> None:
    check(*tensors(2, 32, 4, 384, 700), torch.ones(1, 1, 384, 700, dtype=torch.bool, device="cuda"))


@on_hopper
def test_windows_and_padding(tensors: Callable[..., Any], check: Callable[..., None]) -> None:
    """What is seen begins in the middle, and differs by sequence."""
    mask = (causal(500, 900, 400) & ~causal(500, 900, 100))[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :450] = False
    check(*tensors(2, 32, 4, 500, 900), mask)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 700), (3, 1, 300, 700), (1, 24, 300, 700)], ids=str)
@on_hopper
def test_masks(mask_shape: Any, additive: bool, tensors: Callable[..., Any], check: Callable[..., None]) -> None:
    q, k, v = tensors(3, 24, 6, 300, 700)
    mask = torch.rand(mask_shape, device="cuda") < 0.6
    if additive:
        mask = torch.where(mask, torch.randn(mask_shape, device="cuda"), float("-inf")).to(q.dtype)
    check(q, k, v, mask)


@pytest.mark.parametrize("lowest", ["bool", "-inf", "lowest number"])
@on_hopper
def test_rows_that_attend_to_nothing(
    lowest: str, tensors: Callable[..., Any], assert_close: Callable[..., None]
) -> None:
    """They are zeros; with the lowest number there is, a mean of all values."""
    q, k, v = tensors(1, 132, 4, 128, 300)
    seen = causal(128, 300, -40)[None, None]
    mask = seen
    if lowest != "bool":
        low = float("-inf") if lowest == "-inf" else torch.finfo(q.dtype).min
        mask = torch.where(seen, 0.0, low).to(q.dtype)
    got = attention_prompt.attend(q, k, v, mask, SCALE)
    want = attention.meaning(q.double(), k.double(), v.double(), seen, False, SCALE, None)
    assert_close(got[:, :, 40:], want[:, :, 40:])
    if lowest != "lowest number":
        assert not got[:, :, :40].any()
    elif q.dtype == torch.bfloat16:  # float16's is not so low that the logits are lost in it
        assert_close(got[:, :1, :40], v[:, :1].double().mean(2, keepdim=True).expand(1, 1, 40, -1))


@on_hopper
def test_keys_that_nobody_attends_to_are_not_read(tensors: Callable[..., Any], assert_close: Callable) -> None:
    q, k, v = tensors(1, 32, 8, 640, 1024)
    mask = causal(640, 1024)[None, None]
    want = attention_prompt.attend(q, k, v, mask, SCALE)
    k[:, :, 640:], v[:, :, 640:] = float("nan"), float("nan")
    assert torch.equal(attention_prompt.attend(q, k, v, mask, SCALE), want)


@on_hopper
def test_large_logits(tensors: Callable[..., Any], check: Callable[..., None]) -> None:
    q, k, v = tensors(1, 32, 8, 640, 640)
    check(q * 50, k, v, causal(640, 640)[None, None])


@on_hopper
def test_layouts(tensors: Callable[..., Any], check: Callable[..., None]) -> None:
    """As cut from a projection, heads of a token side by side; a stretch of a cache; one sequence's keys for all."""
    q, k, v = tensors(2, 32, 8, 320, 384)
    mask = causal(320, 384, 64)[None, None]
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    check(q, k, v, mask)
    width = q.shape[3]
    both = torch.cat([k, v], 3).transpose(1, 2).contiguous().transpose(1, 2)
    check(q, both[..., :width], both[..., width:], mask)
    cache = torch.cat([k, v], 2)
    check(q, cache[:, :, :384], cache[:, :, 128:512], mask)
    check(q, k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 8, -1, -1), mask)


@on_hopper
def test_refusals(tensors: Callable[..., Any]) -> None:
    q, k, v = tensors(2, 32, 8, 320, 320)
    refuses = attention_wgmma.refuses
    assert "soft-cap" in str(refuses(q, k, v, 30.0))
    assert "too few rows" in str(refuses(q[:1, :, :128], k, v, None))
    assert "columns" in str(refuses(q[..., :48], k[..., :48], v[..., :48], None))
    assert "multiples of 128" in str(refuses(q, k[:, :, :300], v[:, :, :300], None))
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert "16 bytes" in str(refuses(q, turned, v, None))
    assert "16 bits" in str(refuses(q.float(), k.float(), v.float(), None))


def test_rows_of_one_matrix() -> None:
    """What the copy engine would read of keys that lie in memory like this, without a GPU."""
    refuses, extent = attention_wgmma._refuses_rows, attention_wgmma._extent
    cache = torch.zeros(2, 8, 300, 64, dtype=torch.bfloat16)
    beside = cache.transpose(1, 2).contiguous().transpose(1, 2)
    shared = cache[:1, :1].expand(2, 8, -1, -1)
    for x, rows, columns in ((cache, 4800, 64), (beside, 600, 512), (shared, 300, 64), (cache[:1, :4], 1200, 64)):
        assert refuses(x) is None and extent(x) == [rows, columns]
    assert "16 bytes" in str(refuses(cache[:, :, :1].expand(-1, -1, 300, -1))), "one row for all keys"
    assert "multiples of 128" in str(refuses(cache[:, :4])), "other heads lie behind the fourth"
    assert refuses(cache[:, :4, :256]) is None
    skewed = torch.zeros(6000, dtype=torch.bfloat16).as_strided((3, 1, 9, 64), (10 * 128 + 64, 0, 128, 1))
    assert "one matrix" in str(refuses(skewed)), "the third begins behind the end of a row"
